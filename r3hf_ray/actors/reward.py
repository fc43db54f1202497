"""Reward actor: reward models and one reference, scoring groups of trajectories that arrive as a ref."""

import os
import time
from typing import Any

import ray
from ray import cloudpickle

from r3hf_ray.actors.environment import VLLM, VLLM_ON_CPU
from r3hf_ray.actors.pulse import Pulse, pulse
from r3hf_ray.types import Failure, GroupReport, ScoredTrajectory, Trajectory


class RewardActor:
    """Stateless: the same ids give the same scores, whoever scores them."""

    def __init__(self, settings: Any) -> None:
        """Load the models of `ScoringSettings`; `reward.backend` runs the reward models, transformers the reference.

        Args:
            settings: themselves, or pickled by `cloudpickle`, since who makes the actor imports no torch.
        """
        if isinstance(settings, bytes):
            settings = cloudpickle.loads(settings)
        self._scored = 0
        backend = settings.reward.backend
        if backend == "vllm":  # read when vLLM is imported, below
            os.environ.update(VLLM_ON_CPU if settings.device == "cpu" else VLLM)
        import torch

        from r3hf_ray.scoring.readers import MakeReader, SameIds
        from r3hf_ray.scoring.scorer import Scorer
        from r3hf_ray.scoring.vllm_reader import VllmReader

        torch.set_num_threads(settings.reward.threads)
        make_reader: MakeReader = VllmReader if backend == "vllm" else SameIds
        self._scorer = Scorer(settings, make_reader=make_reader)

    @ray.method(concurrency_group="health")
    def ping(self) -> Pulse:
        """Answer, once the models are loaded."""
        return pulse(self._scored)

    def score(self, trajectories: list[Trajectory], keys: list[tuple[int, int]]) -> list[Any]:
        """Score a group, or a part of it; one object for each key (None where it failed), then the report.

        Args:
            trajectories: what a rollout actor made of a group.
            keys: (prompt_id, sample) of those to score, which fixes the number of returned objects.
        """
        start = time.perf_counter()
        asked = set(keys)
        results = self._scorer.score([item for item in trajectories if (item.prompt_id, item.sample) in asked])
        scored = [item for item in results if isinstance(item, ScoredTrajectory)]
        by_key = {(item.trajectory.prompt_id, item.trajectory.sample): item for item in scored}
        report = GroupReport(
            infos=[self._scorer.judge(item) for item in scored],
            failures=[item for item in results if isinstance(item, Failure)],
            seconds=time.perf_counter() - start,
        )
        self._scored += 1
        return [*(by_key.get(key) for key in keys), report]
