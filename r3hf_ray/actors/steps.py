"""The batch of one step while it fills, each learner rank's share of it, and the scalars that come of it."""

import asyncio
import statistics
from dataclasses import dataclass, field
from typing import Any

from r3hf_ray.actors.pipeline import Sample, Tally
from r3hf_ray.config import PPOConfig
from r3hf_ray.plan import deal_to_ranks, minibatch_of
from r3hf_ray.types import MAIN, Finish, ScoreInfo

Row = dict[str, int | float]
"""Metrics of one step by name; counts are integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one learner rank trains on in one step."""

    refs: list[Any]
    """Object refs of `ScoredTrajectory`, in order of (prompt_id, sample)."""
    minibatch_of: list[list[int]]
    """[epoch][i]: the minibatch of this rank's i-th trajectory; composed without regard to the number of ranks."""
    responses: int
    """Responses of the step over all ranks."""
    golds: dict[tuple[int, int], float | None]
    """(prompt_id, sample) -> gold score, where there is a judge."""
    metrics: Row
    """Scalars of the step that only the coordinator knows."""


@dataclass(slots=True)
class Step:
    """The batch of one step while it fills."""

    expected: int
    samples: list[Sample] = field(default_factory=list)
    resolved: int = 0
    tally: Tally = field(default_factory=Tally)
    full: asyncio.Event = field(default_factory=asyncio.Event)

    def share(self, config: PPOConfig, step: int, rank: int) -> Share:
        """What rank `rank` trains on in step `step`, once the batch is full."""
        lengths = [sample.info.info.length for sample in self.samples]
        ppo = config.ppo
        mine = deal_to_ranks(lengths, minibatches=ppo.minibatches, ranks=config.learner.ranks)[rank]
        plans = [
            minibatch_of(lengths, minibatches=ppo.minibatches, seed=config.run.seed, step=step, epoch=epoch)
            for epoch in range(ppo.epochs)
        ]
        golds = [sample.info.gold for sample in self.samples if sample.info.gold is not None]
        metrics: Row = {
            "rollout/failed": self.tally.quarantined,
            "rollout/retried": self.tally.retried,
            "time/rollout": self.tally.rollout_seconds,
            "time/reward": self.tally.reward_seconds,
        }
        return Share(
            refs=[self.samples[i].ref for i in mine],
            minibatch_of=[[plan[i] for i in mine] for plan in plans],
            responses=len(lengths),
            golds={(info.info.prompt_id, info.info.sample): info.gold for info in (self.samples[i].info for i in mine)},
            metrics=metrics | ({"reward/gold/mean": statistics.fmean(golds)} if golds else {}),
        )


def calibration_of(infos: list[ScoreInfo]) -> dict[str, tuple[float, float]]:
    """(mean, std) of each model's sequence reward, by name; of at least two responses."""
    scores = {MAIN: [info.score for info in infos]}
    scores |= {name: [info.components[name] for info in infos] for name in infos[0].components}
    return {name: (statistics.fmean(values), statistics.pstdev(values)) for name, values in scores.items()}


def evaluation_metrics(infos: list[ScoreInfo]) -> Row:
    """Means over held-out prompts (at least one), with the standard error of the gold score."""
    golds = [info.gold for info in infos if info.gold is not None]
    lengths = [info.info.length - info.info.prompt_len for info in infos]
    row = {
        "eval/heldout/score/mean": statistics.fmean(info.score for info in infos),
        "eval/heldout/response_length/mean": statistics.fmean(lengths),
        "eval/heldout/eos_frac": statistics.fmean(info.info.finish is Finish.EOS for info in infos),
        "eval/heldout/prompts": len(infos),
    }
    for name in infos[0].components:
        scores = [info.components[name] for info in infos]
        row[f"eval/heldout/{name}/score/mean"] = statistics.fmean(scores)
        row[f"eval/heldout/{name}/score/sem"] = statistics.pstdev(scores) / len(scores) ** 0.5
    if golds:
        row["eval/heldout/gold/mean"] = statistics.fmean(golds)
        row["eval/heldout/gold/sem"] = statistics.pstdev(golds) / len(golds) ** 0.5
    return row
