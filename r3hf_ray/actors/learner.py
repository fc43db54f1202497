"""The learner group: what Ray Train starts it with, what ends it, and what each rank does.

A rank pulls its share of a batch, updates, publishes weights, and checkpoints.

The learner pulls because `TorchTrainer.fit()` owns its ranks and blocks. Everything outside is found by name and looked
up again after every restart; a restarted group begins at the last committed checkpoint and tells the coordinator so.
"""

import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode, UserCallback

from r3hf_ray.actors.environment import of_threads
from r3hf_ray.actors.shares import RankShare, fetch
from r3hf_ray.actors.train_group import TrainGroup, train_group
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import DivergenceError, ModelError, RunFailed, TelescopingError, sentence_of
from r3hf_ray.models.sharding import barrier, make_mesh
from r3hf_ray.training.experience import RewardScale
from r3hf_ray.training.guard_rails import warnings_of
from r3hf_ray.training.ppo import PPOLearner
from r3hf_ray.types import ScoredTrajectory
from r3hf_ray.weights.contract import LearnerEnd, Probe
from r3hf_ray.weights.media import make_sender
from r3hf_ray.weights.tensors import TORCH_TYPES

SampleWriter = Callable[[Path, int, list[dict[str, Any]]], object]
"""(run folder, step, per-token rows): writes one dump; given by the driver, since the form of files is its side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """What each rank is started with."""

    config: PPOConfig
    run_folder: Path
    namespace: str
    probe_ids: list[int]
    write_samples: SampleWriter
    token: str
    """Name of a file that the driver has written into the run folder, and its own host's name."""


SHARED_SECONDS = 5.0
"""How long a file of the driver's may take to be seen by a rank. [s]"""
BROKEN_CODE = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""A rank that is started again would break again, in the same line: such an error ends the run, a lost process does
not."""


class RestartGuard(UserCallback):
    """Lets Ray Train start a group again after a lost process, and not once the run is over.

    It runs in Ray Train's controller, which tears the group down on what is raised here and does not retry it.
    """

    def __init__(self, namespace: str) -> None:
        """``namespace`` of the run's named actors."""
        self._namespace = namespace

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called when a rank has raised or died.

        Raises:
            RunFailed: the run has failed, too many groups were lost, or the coordinator is gone.
        """
        reasons = [f"rank {rank}: {sentence_of(error)}" for rank, error in sorted(worker_exceptions.items())]
        try:
            coordinator = ray.get_actor("coordinator", self._namespace)
            over: str = ray.get(coordinator.group_lost.remote("; ".join(reasons) or "a rank was lost"))
        except (ValueError, RayActorError) as error:
            raise RunFailed("the coordinator is gone") from error
        if over:
            raise RunFailed(over)


def learner_group(settings: LearnerSettings) -> TrainGroup:
    """The learner group, not yet started."""
    config, learner = settings.config, settings.config.learner
    return train_group(
        train_loop,
        {"learner": settings},
        learner,
        settings.run_folder,
        environment=of_threads(learner.threads, cpus=learner.cpus_per_rank, overlap=config.rollout.max_lag > 0),
        callbacks=[RestartGuard(settings.namespace)],
    )


def train_loop(settings: dict[str, LearnerSettings]) -> None:
    """One rank's whole life.

    The driver has started the named actors before the group, and a named actor is registered when its start returns: a
    rank that does not find them is one of a run that is over. What ends a run is told to the coordinator, whose
    `RunFailed` then leaves here, so that Ray Train ends the other ranks too, in whatever collective they wait.

    Raises:
        RunFailed: the run is over; `RestartGuard` sees to it that the group is not started again.
    """
    learner = settings["learner"]
    coordinator = ray.get_actor("coordinator", learner.namespace)
    store = ray.get_actor("weight_store", learner.namespace)
    try:
        _Rank(learner, coordinator, store).run()
    except (ModelError, DivergenceError, TelescopingError) as error:
        give_up(coordinator, str(error))
    except BROKEN_CODE as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {place.filename}, line {place.lineno}"
        give_up(coordinator, f"the learner broke ({what}): {error}")


def give_up(coordinator: Any, reason: str) -> NoReturn:
    """End the whole run.

    Raises:
        RunFailed: always.
    """
    with suppress(RunFailed):  # the coordinator's own is an error of a remote task, whose text is a traceback
        ray.get(coordinator.fail.remote(reason))
    raise RunFailed(reason)


class _Rank:
    """The handles and the learner of one rank."""

    def __init__(self, settings: LearnerSettings, coordinator: Any, store: Any) -> None:
        self._settings, self._config = settings, settings.config
        self._coordinator = coordinator
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        rollout = self._config.rollout
        self._sender = make_sender(
            LearnerEnd(
                rank=self._rank,
                section=self._config.weights,
                dtype=rollout.dtype,
                samplers=rollout.actors,
                coordinator=coordinator,
                store=store,
            )
        )
        place = {"actor": f"rank {self._rank}", "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        coordinator.event.remote("placed", **place)
        self._require_shared_folder()
        self._warned: set[str] = set()
        self._saved = 0
        on_gpu = self._config.learner.gpus_per_rank > 0
        torch.set_num_threads(self._config.learner.threads)
        self._learner = PPOLearner(
            self._config,
            scale=RewardScale(),
            device=torch.device("cuda" if on_gpu else "cpu"),
            mesh=make_mesh(self._world, "cuda" if on_gpu else "cpu", self._config.learner.replicas),
            capsules=settings.run_folder / "divergence",
        )

    def run(self) -> None:
        """Restore, publish, and train until the last step."""
        self._restore()
        if self._rank == 0:
            ray.get(self._coordinator.begin.remote(self._learner.step))
        self._publish()
        if self._learner.step == 0:
            moments: dict[str, tuple[float, float]] = ray.get(self._coordinator.calibration.remote())
            for name, (mean, std) in moments.items():
                self._learner.set_scale(RewardScale(mean=mean, scale=std if std > 0 else 1.0), name)
        while self._learner.step < self._config.ppo.steps:
            if not self._step():
                return  # somebody ends the run: what was done is saved
        self._learner.save_pretrained(self._settings.run_folder / "model")

    def _require_shared_folder(self) -> None:
        """A checkpoint would find it out, after the steps before it were done for nothing."""
        deadline = time.monotonic() + SHARED_SECONDS
        while not (self._settings.run_folder / self._settings.token).is_file():
            if time.monotonic() > deadline:
                give_up(
                    self._coordinator,
                    f"run.folder: {self._settings.run_folder} on host {platform.node()} (rank {self._rank}) is not the "
                    f"driver's (host {self._settings.token.partition('.')[2]}): name a folder that all nodes share",
                )
            time.sleep(0.2)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as folder:
                self._learner.load(Path(folder))
            self._saved = self._learner.step

    def _step(self) -> bool:
        start = time.perf_counter()
        batch = self._batch()
        if batch is None:
            self._save()
            return False
        share, scored = batch
        waited = time.perf_counter() - start
        metrics = self._learner.update(scored, minibatch_of=share.minibatch_of)
        published = self._publish()
        if self._rank == 0:
            seconds = time.perf_counter() - start
            own = {
                "time/step": seconds,
                "time/wait_rollout": waited,
                "time/sync": published,
                "perf/tokens_per_sec": metrics["rollout/response_length/mean"] * share.responses / seconds,
            }
            self._coordinator.report.remote(self._learner.step, {**metrics, **share.metrics, **own})
            self._warn(metrics)
            self._dump_samples(share)
        step, every = self._learner.step, self._config.learner.checkpoint_every
        if step == self._config.ppo.steps or (every and step % every == 0):
            self._save()
        return True

    def _batch(self) -> tuple[RankShare, list[ScoredTrajectory]] | None:
        """This rank's share and what is in it; where any rank lacks a sample, all get a new one. None: it stops."""
        step, rank = self._learner.step, self._rank
        share: RankShare | None = ray.get(self._coordinator.next_share.remote(step, rank))
        while share is not None:
            scored, missing = fetch(share, timeout=self._config.learner.fetch_timeout)
            another: RankShare | None = ray.get(self._coordinator.agree.remote(step, rank, missing))
            if another is None:
                return share, scored
            share = another
        return None

    def _publish(self) -> float:
        """All ranks gather, rank 0 publishes. Returns seconds."""
        start = time.perf_counter()
        ids = self._settings.probe_ids
        probe = Probe(token_ids=ids, logprobs=self._learner.evaluate_probe(ids)[1:]) if ids else None
        gather = partial(self._learner.full_parameters, TORCH_TYPES[self._config.rollout.dtype])
        publication = self._sender.send(self._learner.step, gather, probe)
        if publication is not None:
            ray.get(self._coordinator.publish.remote(publication))
        return time.perf_counter() - start

    def _warn(self, metrics: dict[str, float]) -> None:
        """Each warning once in the life of this group."""
        for name, sentence in warnings_of(metrics, self._learner.first).items():
            if name not in self._warned:
                self._warned.add(name)
                self._coordinator.event.remote("warning", step=self._learner.step, reason=sentence)

    def _dump_samples(self, share: RankShare) -> None:
        step, tracking = self._learner.step, self._config.tracking
        due = step in (1, self._config.ppo.steps) or step % tracking.samples_every == 0
        if tracking.samples_per_dump and due:
            rows = self._learner.samples(tracking.samples_per_dump)
            rows = [row | {"gold": share.golds[(row["prompt_id"], row["sample"])]} for row in rows]
            self._settings.write_samples(self._settings.run_folder, step, rows)

    def _save(self) -> None:
        step = self._learner.step
        if step == self._saved:
            return
        name = f"checkpoint_{step:06d}"
        folder = self._settings.run_folder / "checkpoints" / name
        if self._rank == 0:  # a group that was lost while it wrote may have left a part
            shutil.rmtree(folder, ignore_errors=True)
        barrier()
        self._learner.save(folder)
        if self._rank == 0:
            pending = {str(of): keys for of, keys in ray.get(self._coordinator.pending.remote()).items()}
            (folder / "pending.json").write_text(json.dumps(pending))
        written = Checkpoint.from_directory(str(folder))
        mode = CheckpointUploadMode.NO_UPLOAD
        ray.train.report({"step": step}, written, checkpoint_dir_name=name, checkpoint_upload_mode=mode)
        # Without this barrier a checkpoint that was reported is not yet one that a restart finds.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self._saved = step
        if self._rank == 0:
            self._coordinator.event.remote("checkpoint", step=step)
