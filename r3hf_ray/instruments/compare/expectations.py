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


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResults:
    """All that a comparison shows."""

    config: CompareConfig
    arms: list[ArmResult]
    """In the order of the configuration."""
    expectations: list[JudgedExpectation]
    lacking: str
    """Which arms of a whole comparison are not here (`baselines.lacking`)."""

    @property
    def runs(self) -> list[MeasuredRun]:
        """Of all arms."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def baseline(self) -> ArmResult:
        """The arm that the others are held against."""
        return next(arm for arm in self.arms if arm.baseline)

    @property
    def judged(self) -> list[JudgedExpectation]:
        """Expectations that the finished runs can tell."""
        return [one for one in self.expectations if one.verdict != "not run"]


def results_of(config: CompareConfig, runs: Sequence[MeasuredRun], lacking: str = "") -> ComparisonResults:
    """Every arm over its seeds, and every expectation against the finished runs."""
    reached = {
        arm.name: {run.seed: run.reached for run in runs if run.arm == arm.name and run.status == "finished"}
        for arm in config.arms
    }
    baseline = config.compare.baseline
    arms = [
        ArmResult(
            name=arm.name,
            group=arm.group,
            baseline=arm.name == baseline,
            runs=tuple(run for run in runs if run.arm == arm.name),
            ratios=() if arm.name == baseline else tuple(paired_ratios(reached[arm.name], reached[baseline])),
            pairs=len(set(reached[arm.name]) & set(reached[baseline])),
        )
        for arm in config.arms
    ]
    by_name = {arm.name: arm for arm in arms}
    expectations = [_judge(bar, by_name, config.compare) for bar in config.bars]
    return ComparisonResults(config=config, arms=arms, expectations=expectations, lacking=lacking)


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
