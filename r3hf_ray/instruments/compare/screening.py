"""Many runs at once, each in a process of its own that goes from run to run (`single_process.Workbench`)."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from typing import Any

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.instruments.compare.arm_runs import PlannedRun, outcome_of
from r3hf_ray.instruments.compare.single_process import Workbench


def screened(runs: Sequence[PlannedRun], *, processes: int) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
    """Each run with what became of it, as they end.

    Args:
        runs: of a comparison; one that was interrupted begins again, since nothing resumes inside a run.
        processes: at a time, each with the threads of its run's `learner.threads`.

    Raises:
        RunFailed: a process died. What was running is ended here, as at any other error or at Ctrl-C.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    done = False
    with _one_thread():
        try:
            waiting: dict[Future[dict[str, Any]], PlannedRun] = {pool.submit(_run, run): run for run in runs}
            for future in as_completed(waiting):
                yield waiting[future], future.result()
            done = True
        except BrokenProcessPool:
            raise RunFailed(
                f"one of the {processes} processes of the screening died, perhaps for want of memory: lower "
                "compare.in_process; the same command goes on with the runs that have not finished"
            ) from None
        finally:
            pool.shutdown(wait=done, cancel_futures=True)
            for child in () if done else multiprocessing.active_children():
                child.terminate()


def check_in_process(config: PPOConfig) -> None:
    """See that one process computes what the system would.

    Raises:
        ConfigError: a setting would be ignored.
    """
    ignored = {
        "rollout.max_lag": config.rollout.max_lag > 0,
        "reward.backend": config.reward.backend != "transformers",
        "learner.ranks": config.learner.ranks > 1,
        "learner.gpus_per_rank": config.learner.gpus_per_rank > 0,
        "rollout.gpus_per_actor": config.rollout.gpus_per_actor > 0,
        "reward.gpus_per_actor": config.reward.gpus_per_actor > 0,
    }
    wrong = [field for field, holds in ignored.items() if holds]
    if wrong:
        raise ConfigError(
            f"compare.in_process: {', '.join(wrong)} cannot be had in one process on the CPU, step by step: set it "
            "back, or set compare.in_process = 0"
        )


def _run(run: PlannedRun) -> dict[str, Any]:
    """In the child."""
    return outcome_of(lambda: _workbench().run(run.config, run.schedules))


@cache
def _workbench() -> Workbench:
    return Workbench()


@contextmanager
def _one_thread() -> Iterator[None]:
    """What a child's OpenMP reads when it starts: processes that share cores must not take all of them."""
    before = os.environ.copy()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update(before)
