"""Samples outside the training stream: the scale of rewards from the first policy, and held-out scores."""

import asyncio
from dataclasses import dataclass

import numpy as np

from r3hf_ray.actors.dispatch import Dispatch, Job, Tally
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.actors.shares import MetricsRow, calibration_of, evaluation_metrics, unlike_units
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import groups_of, stream_requests
from r3hf_ray.errors import RunFailed
from r3hf_ray.types import TrajectoryInfo


@dataclass(frozen=True, slots=True)
class Judging:
    """What the coordinator asks besides the samples it trains on."""

    config: PPOConfig
    dispatch: Dispatch
    timeline: Timeline
    outcome: Outcome
    prompts: list[np.ndarray]
    heldout: list[np.ndarray]

    async def calibrate(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of each model's sequence reward over samples of the first policy, by name."""
        count = self.config.reward.calibration_samples
        infos = await self._judge("calibration", self.prompts, count, "calibration")
        if len(infos) < 2:
            self.outcome.fail(f"calibration scored fewer than 2 responses; {self.timeline.last_quarantine()}")
        try:
            found = calibration_of(infos, self.config)
        except RunFailed as error:
            self.outcome.fail(str(error))
        for name, (mean, std) in found.items():
            self.timeline.add("calibrated", model=name, mean=mean, std=std, responses=len(infos))
        lender = self.config.reward.prefixes_from
        if lender is not None and (sentence := unlike_units(found, lender)):
            self.timeline.add("warning", step=0, reason=sentence)
        return found

    def due(self, version: int) -> bool:
        """Whether held-out prompts are to be answered with these weights."""
        settings = self.config.evaluation
        if not settings.prompts or not self.heldout:
            return False
        return version in (0, self.config.ppo.steps) or bool(settings.every and version % settings.every == 0)

    async def evaluate(self, version: int) -> MetricsRow:
        """Metrics of held-out prompts; none where none could be scored."""
        count = min(self.config.evaluation.prompts, len(self.heldout))
        infos = await self._judge("heldout", self.heldout, count, f"evaluation of version {version}")
        return evaluation_metrics(infos) if infos else {}

    async def _judge(self, stream: str, prompts: list[np.ndarray], count: int, label: str) -> list[TrajectoryInfo]:
        """Generate and score; failures are retried and quarantined here too."""
        requests, tally = stream_requests(prompts, count, seed=self.config.run.seed, stream=stream), Tally()
        made = await asyncio.gather(
            *(
                self.dispatch.scored(Job(tally=tally, number=number, label=label, at_once=True), group)
                for number, group in enumerate(groups_of(requests, self.config.rollout.group_size))
            )
        )
        infos = [sample.info for samples in made for sample in samples]
        return sorted(infos, key=lambda info: info.prompt_id)
