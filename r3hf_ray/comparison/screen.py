"""Many runs at once, each in a process of its own that goes from run to run (`in_process.Workbench`)."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from typing import Any

from r3hf_ray.actors.pipeline import RunFailed
from r3hf_ray.comparison.records import PlannedRun
from r3hf_ray.config import ConfigError
from r3hf_ray.training.divergence import DivergenceError


def screened(runs: Sequence[PlannedRun], *, processes: int) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
    """Each run with what became of it, as they end.

    Args:
        runs: of a comparison; a folder that exists is refused, since nothing resumes inside a run.
        processes: at a time, each with the threads of its run's `learner.threads`.
    """
    context = multiprocessing.get_context("spawn")
    with _threads(1), ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting: dict[Future[dict[str, Any]], PlannedRun] = {pool.submit(_run, run): run for run in runs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _run(run: PlannedRun) -> dict[str, Any]:
    """In the child."""
    start = time.monotonic()
    try:
        _workbench().run(run.config, run.schedules)
    except (RunFailed, ConfigError, DivergenceError) as error:
        outcome = {"event": "failed", "reason": str(error)}
    else:
        outcome = {"event": "finished"}
    return outcome | {"seconds": round(time.monotonic() - start, 1)}


@cache
def _workbench() -> Any:
    from r3hf_ray.comparison.in_process import Workbench  # torch and vLLM, in the children only

    return Workbench()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """What a child's OpenMP reads when it starts: processes that share cores must not take all of them."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
