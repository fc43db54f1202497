"""Reward actor: reward models and one reference, scoring chunks of trajectories that arrive as a ref."""

import os
import time
from typing import Any

import ray

from r3hf_ray.actors.environment import VLLM, VLLM_ON_CPU
from r3hf_ray.types import ChunkReport, Failure, ScoredTrajectory, Trajectory


class RewardActor:
    """Stateless, so Ray may restart it and run a call again: the same ids give the same scores."""

    def __init__(self, settings: Any) -> None:
        """Load the models of `ScoringSettings`; `reward.backend` runs the reward models, transformers the reference."""
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
    def ping(self) -> None:
        """Answer, once the models are loaded."""

    def score(self, trajectories: list[Trajectory], keys: list[tuple[int, int]]) -> list[Any]:
        """Score a chunk; one object for each key (None where it failed), then the report.

        Args:
            trajectories: what the rollout actor made of the chunk; fewer than `keys` where generation failed.
            keys: (prompt_id, sample) of every request of the chunk, which fixes the number of returned objects.
        """
        start = time.perf_counter()
        results = self._scorer.score(trajectories)
        scored = [item for item in results if isinstance(item, ScoredTrajectory)]
        by_key = {(item.trajectory.prompt_id, item.trajectory.sample): item for item in scored}
        report = ChunkReport(
            infos=[self._scorer.judge(item) for item in scored],
            failures=[item for item in results if isinstance(item, Failure)],
            seconds=time.perf_counter() - start,
        )
        return [*(by_key.get(key) for key in keys), report]
