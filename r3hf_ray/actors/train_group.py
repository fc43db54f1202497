"""A group of Ray Train in a thread of its own: what it is started with, and what has ended it."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from r3hf_ray.actors.environment import ACTORS
from r3hf_ray.errors import Caught
from r3hf_ray.sections.actors import LearnerSection, TrainerSection

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2 s by default: each save, and a tiny stage, would wait for a poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # 600 s by default before a stopped rank is given up
}
"""Environment of the process that starts a group; Ray hands it on to the group's controller."""


class TrainGroup(threading.Thread):
    """A Ray Train group in a thread, since `fit` owns the ranks and blocks; it begins with `start`."""

    def __init__(self, fit: Callable[[], object]) -> None:
        """``fit``: of a trainer."""
        super().__init__(daemon=True, name="train group")
        self.error: BaseException | None = None
        """What ended it, whatever it was; None while it runs, and where it came to its end."""
        self._fit = fit

    def run(self) -> None:
        """Fit; not only Ray Train's own errors are kept: what is not would pass for success."""
        with Caught() as caught:
            self._fit()
        self.error = caught.error


def train_group(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    section: LearnerSection | TrainerSection,
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainGroup:
    """A group whose ranks each run ``loop(settings)``, with checkpoints below ``folder``; not yet started."""
    from ray.train.torch import TorchTrainer

    from r3hf_ray.actors.meeting import MeetingConfig

    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    gpu = section.gpus_per_rank > 0
    resources = {"CPU": section.cpus_per_rank} | ({"GPU": section.gpus_per_rank} if gpu else {})
    restarts, keep = 0, None
    if isinstance(section, LearnerSection):  # how many restarts without progress are too many, the coordinator says
        restarts, keep = -1, section.keep_checkpoints
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=MeetingConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=section.ranks, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            worker_runtime_env={"env_vars": ACTORS | (environment or {})},
            callbacks=list(callbacks),
        ),
    )
    return TrainGroup(trainer.fit)
