"""The numbers of a comparison in words: its tables, its summary, and all of them as plain data."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.expectations import ArmResult, ComparisonResults
from r3hf_ray.instruments.compare.statistics import mean, mean_ratio, paired_difference
from r3hf_ray.instruments.pages.parts import Table, table_of

NOTHING = "–"
PAIRED: dict[str, Callable[[MeasuredRun], float]] = {
    "at the end": lambda run: run.final_gold,
    "whole run": lambda run: run.mean_gold,
    "at equal KL": lambda run: run.gold_at_kl,
    "final KL": lambda run: run.final_kl,
    "final EOS": lambda run: run.final_eos,
}
"""What is subtracted, seed by seed."""


def tables(results: ComparisonResults) -> dict[str, Table]:
    """One row an arm, its numbers minus the baseline's, and one row a run."""
    return {"arms": _arm_table(results), "paired": _paired_table(results), "runs": _run_table(results)}


def numbers(results: ComparisonResults) -> dict[str, Any]:
    """Everything as plain data: settings, arms with their runs and curves, expectations."""
    return {
        "settings": results.config.model_dump(mode="json"),
        "bars": [asdict(one) for one in results.expectations],
        "arms": [
            asdict(arm)
            | {"samples": arm.samples, "final_gold": dict(zip(("mean", "std"), arm.final_gold, strict=True))}
            for arm in results.arms
        ],
    }


def summary(results: ComparisonResults) -> str:
    """One sentence: how far the comparison is and how many expectations are met."""
    runs, expectations = results.runs, results.expectations
    finished, failed = (sum(run.status == status for run in runs) for status in ("finished", "failed"))
    met = sum(one.verdict == "met" for one in expectations)
    told = f"; of {len(expectations)} expectations {len(results.judged)} can be judged and {met} are met"
    return (
        f"{finished} of {len(runs)} runs of {len(results.arms)} arms are finished"
        f"{f', {failed} failed' if failed else ''}{told if expectations else ''}."
    )


def samples_text(arm: ArmResult) -> str:
    """Mean samples to the threshold, or how many seeds got there."""
    if not arm.finished:
        return NOTHING
    reached = arm.reached.values()
    there = sum(reach.at is not None for reach in reached)
    if all(reach.at_once for reach in reached):
        return "at once"
    if there == len(arm.finished):
        return f"{arm.samples:.0f}"
    return f"{there} of {len(arm.finished)} seeds" if there else "never"


def _arm_table(results: ComparisonResults) -> Table:
    settings, what = results.config.compare, results.config.compare.measured
    return table_of(
        results.arms,
        [
            ("arm", lambda arm: arm.name),
            ("seeds", lambda arm: f"{len(arm.finished)} of {len(arm.runs)}"),
            (f"samples to {settings.threshold:g}", samples_text),
            (f"of {settings.baseline}, paired", _ratio),
            (f"final {what}", lambda arm: _with_error(*arm.final_gold)),
            ("SEM", lambda arm: _number(_error(arm))),
            (f"{what} at KL {settings.equal_kl:g}", _gold_at_kl),
            (f"{what}, whole run", lambda arm: _number(mean(run.mean_gold for run in arm.finished))),
            ("KL", lambda arm: _number(mean(run.final_kl for run in arm.finished), 1)),
            ("length", lambda arm: _number(mean(run.final_length for run in arm.finished), 1)),
            ("EOS", lambda arm: _number(mean(run.final_eos for run in arm.finished))),
        ],
        quiet=lambda arm: not arm.finished,
    )


def _paired_table(results: ComparisonResults) -> Table:
    def difference(value: Callable[[MeasuredRun], float]) -> Callable[[ArmResult], str]:
        def of(arm: ArmResult) -> str:
            own, other = ({run.seed: value(run) for run in one.finished} for one in (arm, results.baseline))
            return str(paired_difference(own, other) or NOTHING)

        return of

    others = [arm for arm in results.arms if not arm.baseline]
    differences = [(name, difference(value)) for name, value in PAIRED.items()]
    return table_of(others, [("arm", lambda arm: arm.name), *differences], quiet=lambda arm: False)


def _run_table(results: ComparisonResults) -> Table:
    ratios = {(arm.name, ratio.seed): str(ratio) for arm in results.arms for ratio in arm.ratios}
    baseline = results.baseline.name
    return table_of(
        results.runs,
        [
            ("run", lambda run: f"{run.arm}-s{run.seed}"),
            ("status", lambda run: run.status),
            ("samples", lambda run: str(run.reached.of)),
            ("to threshold", lambda run: str(run.reached.at or "never") if run.samples else NOTHING),
            (
                "paired ratio",
                lambda run: "baseline" if run.arm == baseline else ratios.get((run.arm, run.seed), NOTHING),
            ),
            (f"final {results.config.compare.measured}", lambda run: _with_error(run.final_gold, run.final_sem)),
            ("KL", lambda run: _number(run.final_kl, 1)),
            ("length", lambda run: _number(run.final_length, 1)),
            ("EOS", lambda run: _number(run.final_eos)),
            ("note", lambda run: run.reason),
        ],
        quiet=lambda run: run.status != "finished",
    )


def _ratio(arm: ArmResult) -> str:
    if arm.baseline:
        return "baseline"
    ratio = mean_ratio(arm.ratios)
    if not math.isfinite(ratio):
        return NOTHING
    bounds = "".join({one.bound for one in arm.ratios})
    return bounds + _number(ratio) + _of(len(arm.ratios), arm.pairs)


def _gold_at_kl(arm: ArmResult) -> str:
    near = [run.gold_at_kl for run in arm.finished if math.isfinite(run.gold_at_kl)]
    return _number(mean(near)) + (_of(len(near), len(arm.finished)) if near else "")


def _error(arm: ArmResult) -> float:
    """Of measuring the mean over seeds, each seed's own error being known."""
    return math.hypot(*(run.final_sem for run in arm.finished)) / (len(arm.finished) or math.nan)


def _of(known: int, all_of_them: int) -> str:
    return "" if known == all_of_them else f" ({known} of {all_of_them})"


def _with_error(value: float, error: float) -> str:
    return _number(value) + (f" ± {error:.2f}" if math.isfinite(error) else "")


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else NOTHING
