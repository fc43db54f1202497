"""The arms of a comparison over their seeds, and whether they do what was expected of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.settings import CompareConfig, CompareSection, Expectation
from r3hf_ray.instruments.compare.statistics import Ratio, Reach, mean, mean_ratio, paired_ratios, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """The runs of one arm; numbers are over its finished ones."""

    name: str
    group: str
    baseline: bool
    runs: tuple[MeasuredRun, ...]
    ratios: tuple[Ratio, ...]
    """Samples to the threshold over the baseline's, by seed; empty for the baseline itself."""
    pairs: int
    """Seeds that both have finished; those that tell nothing have no ratio."""

    @property
    def finished(self) -> tuple[MeasuredRun, ...]:
        """Runs that got to the end."""
        return tuple(run for run in self.runs if run.status == "finished")

    @property
    def reached(self) -> dict[int, Reach]:
        """Seed -> samples to the threshold, of finished runs."""
        return {run.seed: run.reached for run in self.finished}

    @property
    def final_gold(self) -> tuple[float, float]:
        """Mean and spread over seeds of the held-out gold at the end."""
        golds = [run.final_gold for run in self.finished]
        return mean(golds), spread(golds)

    @property
    def samples(self) -> float:
        """Mean samples to the threshold; NaN if a seed never got there or none has finished."""
        reached = [float(reach.at) for reach in self.reached.values() if reach.at is not None]
        return mean(reached) if len(reached) == len(self.reached) else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedExpectation:
    """An expectation and what became of it."""

    sentence: str
    found: str
    """What was measured."""
    verdict: Literal["met", "missed", "not run"]


def arm_results(config: CompareConfig, records: Sequence[MeasuredRun]) -> list[ArmResult]:
    """Arms in the order of the configuration."""
    reached = {
        arm.name: {r.seed: r.reached for r in records if r.arm == arm.name and r.status == "finished"}
        for arm in config.arms
    }
    baseline = config.compare.baseline
    return [
        ArmResult(
            name=arm.name,
            group=arm.group,
            baseline=arm.name == baseline,
            runs=tuple(record for record in records if record.arm == arm.name),
            ratios=() if arm.name == baseline else tuple(paired_ratios(reached[arm.name], reached[baseline])),
            pairs=len(set(reached[arm.name]) & set(reached[baseline])),
        )
        for arm in config.arms
    ]


def judge_expectations(config: CompareConfig, results: Sequence[ArmResult]) -> list[JudgedExpectation]:
    """Every expectation of the configuration against the finished runs."""
    arms = {result.name: result for result in results}
    return [_judge(bar, arms, config.compare) for bar in config.bars]


def _judge(bar: Expectation, arms: Mapping[str, ArmResult], settings: CompareSection) -> JudgedExpectation:
    arm, against, goal = arms[bar.arm], arms[bar.against], f"{settings.measured} {settings.threshold:g}"
    if bar.measure == "gold":
        return _gold(bar, arm, against, settings.measured)
    ratios = paired_ratios(arm.reached, against.reached)
    shared = set(arm.reached) & set(against.reached)
    ratio, bounds, told = mean_ratio(ratios), {one.bound for one in ratios}, len(ratios) == len(shared)
    if bar.measure == "samples":
        sentence = f"{bar.arm} reaches {goal} in at most {bar.bound:.0%} of the samples of {bar.against}"
        holds = told and ratio <= bar.bound and ">" not in bounds  # `<` makes the mean an upper bound: enough
    else:
        sentence = f"{bar.arm} needs within {bar.bound:.0%} of the samples of {bar.against} to {goal}"
        holds = told and bounds == {""} and abs(math.log(ratio)) <= math.log1p(bar.bound) + 1e-9
    if not shared:
        return JudgedExpectation(sentence=sentence, found="no seed of both has finished", verdict="not run")
    found = (
        f"mean paired ratio {ratio:.2f} ({ratio_text(ratios)})" if ratios else "no seed tells: both never, or at once"
    )
    return JudgedExpectation(sentence=sentence, found=found, verdict="met" if holds else "missed")


def _gold(bar: Expectation, arm: ArmResult, against: ArmResult, measured: str) -> JudgedExpectation:
    sentence = f"final {measured} of {bar.arm} is not more than {bar.bound:g} below that of {bar.against}"
    seeds = set(arm.reached) & set(against.reached)
    own, other = (mean(r.final_gold for r in a.finished if r.seed in seeds) for a in (arm, against))
    if not (math.isfinite(own) and math.isfinite(other)):
        return JudgedExpectation(sentence=sentence, found="no seed of both has finished", verdict="not run")
    return JudgedExpectation(
        sentence=sentence,
        found=f"{own:.2f} against {other:.2f}, seeds {', '.join(map(str, sorted(seeds)))}",
        verdict="met" if own >= other - bar.bound else "missed",
    )


def ratio_text(ratios: Sequence[Ratio]) -> str:
    """`seed 0 0.63, seed 1 >3.40`."""
    return ", ".join(f"seed {ratio.seed} {ratio}" for ratio in ratios)
