"""The batch of one step while it fills, each learner rank's share of it, and what the driver hears of it."""

import asyncio
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from r3hf_ray.actors.dispatch import ScoredRef, Tally
from r3hf_ray.actors.ledger import StepLedger
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import deal_to_ranks, minibatch_of
from r3hf_ray.errors import RunFailed
from r3hf_ray.sections.models import field_of
from r3hf_ray.types import MAIN, Finish, TrajectoryInfo

MetricsRow = dict[str, int | float]
"""Metrics of one step by name; counts are integers."""
UNIT_FACTOR = 2.0
"""How far the spreads of two models trained on the same preferences may lie apart without a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the driver shows and writes; scalars and words."""

    rows: list[MetricsRow]
    events: list[dict[str, Any]]
    doing: dict[str, str]
    """What each kind of actor does now."""
    failed: str | None
    ledgers: list[tuple[StepLedger, list[dict[str, Any]]]]
    """Steps that were closed, each with the samplers' loads since the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one learner rank trains on in one step."""

    refs: list[Any]
    """Object refs of `ScoredTrajectory`, in order of (prompt_id, sample)."""
    minibatch_of: list[list[int]]
    """[epoch][i]: the minibatch of this rank's i-th trajectory; composed without regard to the number of ranks."""
    responses: int
    """Responses of the step over all ranks."""
    golds: dict[tuple[int, int], float | None]
    """(prompt_id, sample) -> gold score, where there is a judge; in the order of the refs."""
    metrics: MetricsRow
    """Scalars of the step that only the coordinator knows."""


@dataclass(slots=True)
class Agreement:
    """What the ranks say of their shares: a batch is trained on once every rank has all of its own."""

    answers: int = 0
    missing: set[tuple[int, int]] = field(default_factory=set)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Every rank has said it, and what was missing is there again."""

    def hear(self, missing: Iterable[tuple[int, int]]) -> None:
        """One rank's word."""
        self.answers += 1
        self.missing |= set(missing)


@dataclass(slots=True)
class FillingBatch:
    """The batch of one step while it fills."""

    expected: int
    samples: list[ScoredRef] = field(default_factory=list)
    resolved: int = 0
    tally: Tally = field(default_factory=Tally)
    full: asyncio.Event = field(default_factory=asyncio.Event)
    agreement: Agreement = field(default_factory=Agreement)
    _shares: list[RankShare] = field(default_factory=list)

    def settle(self) -> None:
        """No sample comes any more: sort them, so that nothing depends on who came first."""
        self.samples.sort(key=lambda sample: (sample.info.prompt_id, sample.info.sample))
        self._shares = []

    def share(self, config: PPOConfig, step: int, rank: int) -> RankShare:
        """What rank `rank` trains on in step `step`, once the batch is full; worked out once for all ranks."""
        if not self._shares:
            self._shares = self._deal(config, step)
        return self._shares[rank]

    def _deal(self, config: PPOConfig, step: int) -> list[RankShare]:
        lengths = [sample.info.length for sample in self.samples]
        ppo = config.ppo
        plans = [
            minibatch_of(lengths, minibatches=ppo.minibatches, seed=config.run.seed, step=step, epoch=epoch)
            for epoch in range(ppo.epochs)
        ]
        golds = [sample.info.gold for sample in self.samples if sample.info.gold is not None]
        metrics: MetricsRow = {
            "rollout/failed": self.tally.quarantined,
            "rollout/retried": self.tally.retried,
            "time/rollout": self.tally.rollout_seconds,
            "time/reward": self.tally.reward_seconds,
        }
        return [
            RankShare(
                refs=[self.samples[i].ref for i in mine],
                minibatch_of=[[plan[i] for i in mine] for plan in plans],
                responses=len(lengths),
                golds={(info.prompt_id, info.sample): info.gold for info in (self.samples[i].info for i in mine)},
                metrics=metrics | ({"reward/gold/mean": statistics.fmean(golds)} if golds else {}),
            )
            for mine in deal_to_ranks(lengths, minibatches=ppo.minibatches, ranks=config.learner.ranks)
        ]


def fetch(share: RankShare, *, timeout: float) -> tuple[list[Any], list[tuple[int, int]]]:
    """The samples of a share, and the keys of those that are lost: none of them has come for `timeout` seconds.

    Without a bound Ray waits minutes for an object whose host is gone.
    """
    found, waiting = dict[int, Any](), list(share.refs)
    numbers = {ref: number for number, ref in enumerate(share.refs)}
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=timeout)
        if not ready:
            break
        for number, ref in ((numbers[ref], ref) for ref in ready):
            with suppress(ObjectLostError, GetTimeoutError):
                found[number] = ray.get(ref, timeout=timeout)
    keys = list(share.golds)
    missing = [keys[number] for number in range(len(keys)) if number not in found]
    return [found[number] for number in sorted(found)], missing


def calibration_of(infos: list[TrajectoryInfo], config: PPOConfig) -> dict[str, tuple[float, float]]:
    """(mean, std) of each model's sequence reward, by name; of at least two responses.

    Raises:
        RunFailed: a model that is trained on scores all of them alike. One of weight 0 may.
    """
    scores = {name: [info.scores[name] for info in infos] for name in infos[0].scores}
    found = {name: (statistics.fmean(values), statistics.pstdev(values)) for name, values in scores.items()}
    for name, (mean, std) in found.items():
        if name in config.summed and not std > 0.0:
            raise RunFailed(
                f"{field_of(name)} gives every sampled response the same score ({mean:g}): it tells nothing apart; use "
                "another model, or weight 0"
            )
    return found


def unlike_units(calibration: Mapping[str, tuple[float, float]], lender: str) -> str:
    """What to say where the model of `reward.prefixes_from` is not in the main one's unit; empty where it is."""
    own, lent = calibration[MAIN][1], calibration[lender][1]
    if max(own, lent) <= UNIT_FACTOR * min(own, lent):
        return ""
    return (
        f"reward.prefixes_from = {lender}: its scores spread by {lent:.3g}, those of model.reward_model by {own:.3g}; "
        "both must be in one unit, or the last token pays for the difference: see r3hf/eos_jump_mass"
    )


def evaluation_metrics(infos: list[TrajectoryInfo]) -> MetricsRow:
    """Means over held-out prompts (at least one), with the standard error of the gold score."""
    golds = [info.gold for info in infos if info.gold is not None]
    lengths = [info.length - info.prompt_len for info in infos]
    row = {
        "eval/heldout/score/mean": statistics.fmean(info.scores[MAIN] for info in infos),
        "eval/heldout/response_length/mean": statistics.fmean(lengths),
        "eval/heldout/eos_frac": statistics.fmean(info.finish is Finish.EOS for info in infos),
        "eval/heldout/prompts": len(infos),
    }
    for name in [name for name in infos[0].scores if name != MAIN]:
        scores = [info.scores[name] for info in infos]
        row[f"eval/heldout/{name}/score/mean"] = statistics.fmean(scores)
        row[f"eval/heldout/{name}/score/sem"] = statistics.pstdev(scores) / len(scores) ** 0.5
    if golds:
        row["eval/heldout/gold/mean"] = statistics.fmean(golds)
        row["eval/heldout/gold/sem"] = statistics.pstdev(golds) / len(golds) ** 0.5
    return row
