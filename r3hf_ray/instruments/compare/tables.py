"""The tables of a comparison: the same rows for the page and for Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.expectations import ArmResult, JudgedExpectation
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.instruments.compare.statistics import mean, mean_ratio, paired_difference
from r3hf_ray.instruments.pages.parts import Table, TableRow

NOTHING = "–"


def arm_table(config: CompareConfig, results: Sequence[ArmResult]) -> Table:
    """One row an arm, means over its finished seeds."""
    settings, what = config.compare, config.compare.measured
    return Table(
        title="Arms",
        head=[
            *("arm", "seeds", f"samples to {settings.threshold:g}", f"of {settings.baseline}, paired"),
            *(
                f"final {what}",
                "SEM",
                f"{what} at KL {settings.equal_kl:g}",
                f"{what}, whole run",
                "KL",
                "length",
                "EOS",
            ),
        ],
        rows=[TableRow(_arm_cells(result), quiet=not result.finished) for result in results],
        note=f"Samples: responses trained on until the mean {what} of {settings.window} training batches was at the "
        "threshold; at once: in the first window already. Paired: geometric mean of that number over the baseline's, "
        "seed by seed; > and < are bounds, where one of the two never got there or was there at once. Final: held-out "
        "prompts, mean ± standard deviation over seeds; SEM is the error of measuring it. At KL: steps within 20% of "
        f"{settings.equal_kl:g} nats a response. KL: mean of the last 5 steps. Grey rows have not finished.",
    )


PAIRED: dict[str, Callable[[MeasuredRun], float]] = {
    "at the end": lambda run: run.final_gold,
    "whole run": lambda run: run.mean_gold,
    "at equal KL": lambda run: run.gold_at_kl,
    "final KL": lambda run: run.final_kl,
    "final EOS": lambda run: run.final_eos,
}
"""What is subtracted, seed by seed."""


def paired_table(config: CompareConfig, results: Sequence[ArmResult]) -> Table:
    """One row an arm: its numbers minus the baseline's."""
    (baseline,) = (result for result in results if result.baseline)
    return Table(
        title=f"Minus {baseline.name}, paired by seed",
        head=["arm", *PAIRED],
        rows=[
            TableRow([result.name, *(_difference(result, baseline, value) for value in PAIRED.values())])
            for result in results
            if not result.baseline
        ],
        note=f"The first three: {config.compare.measured}. Mean over seeds ± its standard error; with how many seeds "
        "the arm is higher. Few seeds say little, and seeds that share their models say nothing about other models. "
        f"Equal KL: {config.compare.equal_kl:g} nats a response, within 20%.",
    )


def run_table(config: CompareConfig, results: Sequence[ArmResult]) -> Table:
    """One row a run."""
    final = f"final {config.compare.measured}"
    return Table(
        title="Runs",
        head=["run", "status", "samples", "to threshold", "paired ratio", final, "KL", "length", "EOS", "note"],
        rows=[
            TableRow(_run_cells(result, run), quiet=run.status != "finished")
            for result in results
            for run in result.runs
        ],
        styles={"run": "text", "status": "text", "note": "meaning"},
    )


SCREENED = ", screened: each run in one process, with the system's engine, scorer and learner but without Ray"


def numbers(config: CompareConfig, results: Sequence[ArmResult], bars: Sequence[JudgedExpectation]) -> dict[str, Any]:
    """Everything as plain data: settings, arms with their runs and curves, expectations."""
    return {
        "settings": config.model_dump(mode="json"),
        "bars": [asdict(bar) for bar in bars],
        "arms": [
            asdict(result)
            | {"samples": result.samples, "final_gold": dict(zip(("mean", "std"), result.final_gold, strict=True))}
            for result in results
        ],
    }


def summary(config: CompareConfig, results: Sequence[ArmResult], bars: Sequence[JudgedExpectation]) -> str:
    """One sentence: how far the comparison is and how many expectations are met."""
    runs = [run for result in results for run in result.runs]
    count = {status: sum(run.status == status for run in runs) for status in ("finished", "failed")}
    met, judged = sum(bar.verdict == "met" for bar in bars), sum(bar.verdict != "not run" for bar in bars)
    failed = f", {count['failed']} failed" if count["failed"] else ""
    expected = f"; of {len(bars)} expectations {judged} can be judged and {met} are met" if bars else ""
    return f"{count['finished']} of {len(runs)} runs of {len(results)} arms are finished{failed}{expected}."


def samples_text(result: ArmResult) -> str:
    """Mean samples to the threshold, or how many seeds got there."""
    if not result.finished:
        return NOTHING
    reached = result.reached.values()
    there = sum(reach.at is not None for reach in reached)
    if all(reach.at_once for reach in reached):
        return "at once"
    if there == len(result.finished):
        return f"{result.samples:.0f}"
    return f"{there} of {len(result.finished)} seeds" if there else "never"


def _arm_cells(result: ArmResult) -> list[str]:
    done = result.finished
    gold, spread = result.final_gold
    near = [run.gold_at_kl for run in done if math.isfinite(run.gold_at_kl)]
    error = math.sqrt(math.fsum(run.final_sem**2 for run in done)) / len(done) if done else math.nan
    return [
        result.name,
        f"{len(done)} of {len(result.runs)}",
        samples_text(result),
        _ratio(result),
        _number(gold) + (f" ± {spread:.2f}" if math.isfinite(spread) else ""),
        _number(error),
        _number(mean(near)) + (_of(len(near), len(done)) if near else ""),
        _number(mean([run.mean_gold for run in done])),
        _number(mean([run.final_kl for run in done]), 1),
        _number(mean([run.final_length for run in done]), 1),
        _number(mean([run.final_eos for run in done])),
    ]


def _of(known: int, all_of_them: int) -> str:
    return "" if known == all_of_them else f" ({known} of {all_of_them})"


def _difference(arm: ArmResult, baseline: ArmResult, value: Callable[[MeasuredRun], float]) -> str:
    own, other = ({run.seed: value(run) for run in result.finished} for result in (arm, baseline))
    return str(paired_difference(own, other) or NOTHING)


def _ratio(result: ArmResult) -> str:
    if result.baseline:
        return "baseline"
    ratio = mean_ratio(result.ratios)
    if not math.isfinite(ratio):
        return NOTHING
    bounds = "".join({one.bound for one in result.ratios})
    return bounds + _number(ratio) + _of(len(result.ratios), result.pairs)


def _run_cells(result: ArmResult, run: MeasuredRun) -> list[str]:
    ratio = next((str(ratio) for ratio in result.ratios if ratio.seed == run.seed), NOTHING)
    error = f" ± {run.final_sem:.2f}" if math.isfinite(run.final_sem) else ""
    return [
        f"{run.arm}-s{run.seed}",
        run.status,
        str(run.reached.of),
        NOTHING if not run.samples else "never" if run.reached.at is None else str(run.reached.at),
        "baseline" if result.baseline else ratio,
        _number(run.final_gold) + error,
        _number(run.final_kl, 1),
        _number(run.final_length, 1),
        _number(run.final_eos),
        run.reason,
    ]


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else NOTHING
