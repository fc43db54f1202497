"""The driver of a PPO run: start the actors, follow the coordinator, write and show what happens (layer 4).

The learner group runs in a thread (`TorchTrainer.fit()` blocks). Only this process writes `metrics.jsonl` and
`events.jsonl` and talks to wandb. No tensor passes through here.
"""

import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from rich.console import Console
from rich.table import Table

from r3hf_ray.actors.coordinator import Coordinator
from r3hf_ray.actors.learner import LearnerSettings, learner_group
from r3hf_ray.actors.makers import named_actor, reward_maker, rollout_maker
from r3hf_ray.actors.shares import Snapshot
from r3hf_ray.actors.train_group import TrainGroup
from r3hf_ray.config import PPOConfig
from r3hf_ray.counts_and_warnings import arithmetic
from r3hf_ray.errors import CoordinatorLost, RunFailed, Terminated, sentence_of
from r3hf_ray.models.finished import require_finished
from r3hf_ray.operations.lookout import Lookout
from r3hf_ray.preflight import Plan, bundles, check, check_memory, check_resources, shortage
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.lease import Held, hold, new_lease
from r3hf_ray.records.ledger import write_ledger
from r3hf_ray.records.metrics import STEP, read_metrics
from r3hf_ray.records.progress import Progress
from r3hf_ray.records.provenance import redacted, versions
from r3hf_ray.records.run_folder import PPO_MAY_CHANGE, check_run, open_run
from r3hf_ray.records.samples import read_samples, sample_steps, write_samples
from r3hf_ray.records.tensorboard import TensorBoardLog
from r3hf_ray.records.wandb_run import WandbRun
from r3hf_ray.session import driver_facts, job_ended, ray_session, seconds_to_end, sigterm_noted
from r3hf_ray.weights.object_ref import WeightStore

POLL_SECONDS = 0.25
SHOWN = (
    "restart",
    "failure",
    "joined",
    "away",
    "recovered",
    "slow",
    "draining",
    "scaled",
    "left",
    "lost_samples",
    "quarantined",
    "checkpoint",
    "warning",
)
"""Events that are told in the terminal too."""
UNSAID = ("time", "log")
"""Of an event, what only its record holds."""
STOP_SECONDS = 10.0
"""How long a failed run waits for its learner ranks to leave by themselves. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    folder: Path
    rows: list[dict[str, float]]
    """One row a step, evaluations merged in."""
    seconds: float


def run_ppo(config: PPOConfig, *, resume: bool, console: Console) -> RunResult:
    """Run PPO from a checked configuration to a folder with metrics, checkpoints and a model.

    Raises:
        ConfigError: found before any actor started.
        RunFailed: the run could not go on; what was done stays in its folder, and `resume` continues it.
    """
    start = time.monotonic()
    plan = check(config)
    config = plan.config
    if config.run.cpus is not None and "RAY_ADDRESS" not in os.environ and not ray.is_initialized():
        check_resources(config, {"CPU": config.run.cpus, "GPU": torch.cuda.device_count()})
    if "RAY_ADDRESS" not in os.environ:
        check_memory(config)
    folder = check_run(config, config.run, resume=resume, may_change=PPO_MAY_CHANGE)
    with ray_session(config.run.cpus):
        if "RAY_ADDRESS" not in os.environ:
            check_resources(config, ray.cluster_resources())
        with hold(folder, new_lease(**driver_facts()), ended=lambda other: job_ended(other.job, other.session)) as held:
            if "RAY_ADDRESS" in os.environ:
                wait_for_nodes(config, console)
            _follow(config, plan, console, held, resume=resume)
    return RunResult(folder=folder, rows=read_metrics(folder), seconds=time.monotonic() - start)


def _follow(config: PPOConfig, plan: Plan, console: Console, held: Held, *, resume: bool) -> None:
    """Follow a run to its end, built anew from its last checkpoint where its coordinator or its weights are lost."""
    lost = 0
    while True:
        folder, attempt = open_run(config, config.run, resume=resume or lost > 0)
        if not lost:
            _print_plan(console, config, plan)
        try:
            with _Follower(config, plan, folder, console, held, attempt=attempt) as follower:
                follower.follow()
            return
        except CoordinatorLost as error:
            lost += 1
            if lost > config.run.max_restarts or follower.learner_runs:
                raise
            console.print(f"{error}; building everything anew, {lost} of {config.run.max_restarts} (run.max_restarts)")


def wait_for_nodes(config: PPOConfig, console: Console) -> None:
    """Wait until the cluster can hold the learner group, one sampler and one reward actor, and say what is missing.

    All that the run asks for is told to an autoscaler at once.

    Raises:
        RunFailed: it does not within `run.wait_for_nodes`.
    """
    least = config.model_copy(
        update={name: dict(config)[name].model_copy(update={"actors": 1}) for name in ("rollout", "reward")}
    )
    deadline = time.monotonic() + config.run.wait_for_nodes
    request_resources(bundles=bundles(config))
    said = ""
    while missing := shortage(least, ray.cluster_resources()):
        if time.monotonic() > deadline:
            raise RunFailed(f"{missing}, and no node came within run.wait_for_nodes ({config.run.wait_for_nodes:g} s)")
        if missing != said:
            console.print(f"waiting for nodes (at most {config.run.wait_for_nodes:g} s): {missing}")
            said = missing
        time.sleep(1.0)
    request_resources(bundles=[])  # from here on pending actors are the demand


@dataclass(slots=True)
class _Actors:
    """Handles of what the driver starts; rollout and reward actors are the coordinator's, and end with it."""

    coordinator: Any
    store: Any
    learner: TrainGroup
    store_answer: Any


class _Follower:
    """Starts a run, polls its coordinator, and writes and shows what it says."""

    def __init__(
        self, config: PPOConfig, plan: Plan, folder: Path, console: Console, held: Held, *, attempt: int
    ) -> None:
        self._config, self._plan, self._folder, self._console, self._held = config, plan, folder, console, held
        self._attempt = attempt
        self._namespace = f"{config.run.name}-{os.urandom(4).hex()}"
        self._rows_seen = self._events_seen = 0
        self._latest: dict[str, float] = {}
        self._end_by: float | None = None
        self._lookout = Lookout(folder, self._namespace)
        self._tables = set(sample_steps(folder))
        self.learner_runs = False
        """Whether ranks were still running when all was stopped: another group must not begin beside them."""

    def __enter__(self) -> "_Follower":
        config, folder = self._config, self._folder
        self._metrics, self._events = JsonlLog(folder / "metrics.jsonl"), JsonlLog(folder / "events.jsonl")
        self._progress = Progress(self._console)
        settings = redacted(config.model_dump(mode="json"))
        self._wandb = WandbRun(folder, config.tracking, name=config.run.name, config=settings, warn=self._warn)
        self._tensorboard = TensorBoardLog(folder, on=config.tracking.tensorboard, warn=self._warn)
        self._events.write({"event": "settings", "versions": versions(), "data": str(self._plan.report)})
        for warning in self._plan.warnings:
            self._warn(warning)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            what = "stopped" if issubclass(kind, KeyboardInterrupt) else "failure"
            self._events.write({"event": what, "reason": str(error) or kind.__name__})
        self._wandb.finish(failed=kind is not None)
        self._tensorboard.finish()
        self._metrics.close()
        self._events.close()

    def follow(self) -> None:
        """Run to the end.

        Raises:
            RunFailed: it could not get there; nothing of it is left running.
        """
        with self._progress, sigterm_noted() as asked:
            actors = self._start()
            try:
                while actors.learner.is_alive():
                    actors.learner.join(POLL_SECONDS)
                    self._held.check()
                    self._watch_store(actors)
                    self._take(self._poll(actors))
                    if asked():
                        self._save_and_end(actors)
                self._finish(actors)
            except RayError as error:
                if asked():
                    raise Terminated from error
                raise CoordinatorLost(f"the coordinator or the weight store is gone: {sentence_of(error)}") from error
            finally:
                self._stop(actors)

    def _save_and_end(self, actors: _Actors) -> None:
        """After SIGTERM: let the step under way end and be saved; raises `Terminated` where that cannot be."""
        if self._end_by is None:
            seconds, can_save = seconds_to_end(self._config.run.save_within), False
            with suppress(RayError):
                can_save = seconds > 0 and ray.get(actors.coordinator.stop.remote(), timeout=STOP_SECONDS)
            if not can_save:
                raise Terminated("at once: no step is under way that could be saved")
            self._end_by = time.monotonic() + seconds
            self._progress.note(f"asked to end: the step under way is finished and saved (at most {seconds:.0f} s)")
        if time.monotonic() > self._end_by:
            raise Terminated("the step under way was not saved in time (run.save_within)")

    def _start(self) -> _Actors:
        config, plan, space = self._config, self._plan, self._namespace
        self._held.update(namespace=space, attempt=self._attempt)
        makers = {
            "rollout": rollout_maker(config.rollout, plan.engine, namespace=space),
            "reward": reward_maker(plan.scoring, namespace=space, overlap=config.rollout.max_lag > 0),
        }
        store = named_actor(WeightStore, "weight_store", namespace=space)
        token = f"{space}.{platform.node()}"
        (self._folder / token).touch()  # seen by a rank that shares the folder
        data = {"prompts": plan.prompts, "heldout": plan.heldout, "attempt": self._attempt}
        coordinator = named_actor(Coordinator, "coordinator", config, makers, namespace=space, **data)
        learner = learner_group(
            LearnerSettings(
                config=config,
                run_folder=self._folder,
                namespace=space,
                probe_ids=plan.probe_ids,
                write_samples=write_samples,
                token=token,
            )
        )
        learner.start()
        return _Actors(coordinator, store, learner, store.ping.remote())

    def _watch_store(self, actors: _Actors) -> None:
        """Raise Ray's own error if the weight store is gone; a rank would find it out only when it publishes."""
        if ray.wait([actors.store_answer], timeout=0)[0]:
            ray.get(actors.store_answer)
            actors.store_answer = actors.store.ping.remote()

    def _poll(self, actors: _Actors) -> Snapshot:
        snapshot: Snapshot = ray.get(actors.coordinator.poll.remote(self._rows_seen, self._events_seen))
        if "learner" not in snapshot.doing:
            snapshot.doing["learner"] = f"starting {self._config.learner.ranks} rank(s)"
        return snapshot

    def _take(self, snapshot: Snapshot) -> None:
        """Write and show what is new; raise if the run has failed."""
        for event in self._lookout.told(snapshot.events):
            self._events.write(event)
            if event["event"] in SHOWN:
                self._progress.note("  ".join(f"{key}: {value}" for key, value in event.items() if key not in UNSAID))
        for ledger, loads in snapshot.ledgers:
            write_ledger(self._folder, ledger, loads)
        for row in snapshot.rows:
            plain = self._metrics.write(row)
            self._wandb.log(plain)
            self._tensorboard.log(plain)
            self._lookout.step_done(plain)
            self._latest |= plain
            self._show(snapshot)
        self._rows_seen += len(snapshot.rows)
        self._events_seen += len(snapshot.events)
        self._show(snapshot)
        self._log_samples()
        self._held.note(snapshot.doing)
        places, said = self._lookout.look(int(self._latest.get(STEP, 0)))
        for place in places:
            self._events.write(place)
        if said:
            self._progress.note(said)
        if snapshot.failed:
            raise RunFailed(snapshot.failed)

    def _show(self, snapshot: Snapshot) -> None:
        self._progress.update(
            {
                "step": int(self._latest.get(STEP, 0)),
                "steps": self._config.ppo.steps,
                "metrics": self._latest,
                "doing": snapshot.doing,
            }
        )

    def _log_samples(self) -> None:
        for step in sample_steps(self._folder):
            if step not in self._tables:
                self._tables.add(step)
                self._wandb.log_samples(step, read_samples(self._folder, step))

    def _finish(self, actors: _Actors) -> None:
        self._take(self._poll(actors))  # why the learner has failed is what the coordinator knows
        if error := actors.learner.error:
            raise RunFailed(f"the learner failed: {sentence_of(error)}") from error
        if self._end_by is not None and self._latest.get(STEP, 0) < self._config.ppo.steps:
            raise Terminated(f"step {self._latest.get(STEP, 0):.0f} is done and saved")
        waiting = actors.coordinator.finish.remote()
        while not ray.wait([waiting], timeout=POLL_SECONDS)[0]:
            self._take(self._poll(actors))
        self._take(self._poll(actors))  # first: out of `finish` a run's failure comes as an error of Ray
        ray.get(waiting)
        require_finished(self._folder / "model")
        self._events.write({"event": "finished", "step": int(self._latest.get(STEP, 0))})

    def _stop(self, actors: _Actors) -> None:
        """End whatever still runs: after a failure too, since the Ray instance may serve other runs."""
        if actors.learner.is_alive():
            with suppress(RunFailed, RayError):  # ranks hear of it where they wait for a batch
                ray.get(actors.coordinator.fail.remote("the driver has stopped"), timeout=STOP_SECONDS)
            actors.learner.join(STOP_SECONDS)
        self.learner_runs = actors.learner.is_alive()
        for actor in (actors.coordinator, actors.store):
            ray.kill(actor)

    def _warn(self, text: str) -> None:
        self._events.write({"event": "warning", "reason": text})
        self._progress.note(f"warning: {text}")


def _print_plan(console: Console, config: PPOConfig, plan: Plan) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in [("data", str(plan.report)), *arithmetic(config, len(plan.prompts))]:
        table.add_row(name, text)
    console.print(table)
