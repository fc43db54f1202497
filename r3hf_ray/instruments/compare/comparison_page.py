"""``comparison.html``, ``comparison.md`` and ``comparison.json``: what a comparison shows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.expectations import ArmResult, JudgedExpectation
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.instruments.compare.statistics import band, by_cell, trailing_mean
from r3hf_ray.instruments.compare.tables import (
    SCREENED,
    arm_table,
    numbers,
    paired_table,
    run_table,
    samples_text,
    summary,
)
from r3hf_ray.instruments.pages.parts import Chart, Check, Page, PageSection, Series, Tile
from r3hf_ray.instruments.pages.writing import write_page

NAME = "comparison"
KL_CELL = 1.0
"""Width of a point of the curve over KL. [nats a response]"""
POINTS = 30
"""Of a curve, at most about."""
TONES = {"met": "good", "missed": "bad", "not run": "plain"}


def write_comparison(
    folder: Path, config: CompareConfig, results: Sequence[ArmResult], bars: Sequence[JudgedExpectation], lacking: str
) -> Path:
    """Write the page, the table and the numbers over what an earlier call left there; returns the page.

    ``lacking`` says which arms of a whole comparison are not here (`baselines.lacking`).
    """
    return write_page(folder, NAME, comparison_page(config, results, bars, lacking), numbers(config, results, bars))


def comparison_page(
    config: CompareConfig, results: Sequence[ArmResult], bars: Sequence[JudgedExpectation], lacking: str
) -> Page:
    """The page, from the results."""
    missed = any(bar.verdict == "missed" for bar in bars)
    runs = [run for result in results for run in result.runs]
    complete = all(run.status == "finished" for run in runs)
    status = ("expectations missed" if missed else "complete") if complete else "not complete"
    expected = PageSection(
        id="expected",
        title="What was expected",
        intro="Redistribution keeps the optimum and changes speed. It should be faster than sparse reward with a cold "
        "critic, and no faster than sparse reward with a critic loaded from the reward model, head included: an arm "
        "that beats that one by far is suspect.",
        checks=[Check(TONES[bar.verdict], bar.verdict, f"{bar.sentence}: {bar.found}") for bar in bars],
    )
    return Page(
        brand="r3hf_ray comparison",
        title=config.run.name,
        verdict=summary(config, results, bars),
        status=status,
        tone="good" if complete and not missed else "warn",
        about=f"variants of {config.compare.job}{SCREENED if config.compare.in_process else ''}",
        tiles=_tiles(config, results, runs, bars),
        sections=[
            *([expected] if bars else []),
            *_curve_sections(config, results),
            PageSection(
                id="ends",
                title="Speed and end",
                intro="Every arm with a finished run: points are means over seeds, bars their range. Read speed and "
                "end together, at equal KL too: an arm can be fast because it moves further.",
                charts=_dots(config, results),
            ),
            PageSection(
                id="numbers",
                title="All numbers",
                intro="As in comparison.md and comparison.json. One seed is a hint, three are little more. " + lacking,
                tables=[arm_table(config, results), paired_table(config, results), run_table(config, results)],
            ),
        ],
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _tiles(
    config: CompareConfig, results: Sequence[ArmResult], runs: Sequence[MeasuredRun], bars: Sequence[JudgedExpectation]
) -> list[Tile]:
    done, failed = (sum(run.status == status for run in runs) for status in ("finished", "failed"))
    judged = [bar for bar in bars if bar.verdict != "not run"]
    met = sum(bar.verdict == "met" for bar in judged)
    baseline = next(result for result in results if result.baseline)
    ended = [result for result in results if math.isfinite(result.final_gold[0])]
    best = max(ended, key=lambda result: result.final_gold[0], default=None)
    threshold = config.compare.threshold
    tiles = [
        Tile("Runs finished", f"{done} of {len(runs)}", f"{failed} failed", "bad" if failed else ""),
        Tile(
            f"Samples to {config.compare.measured} {threshold:g}", samples_text(baseline), f"baseline: {baseline.name}"
        ),
    ]
    if bars:
        tone = "" if not judged else "good" if met == len(judged) else "bad"
        tiles.append(Tile("Expectations met", f"{met} of {len(judged)}", f"{len(bars) - len(judged)} not run", tone))
    if best:
        seeds = f"{len(best.finished)} seed{'s' if len(best.finished) > 1 else ''}"
        tiles.append(
            Tile(f"Highest final {config.compare.measured}", f"{best.final_gold[0]:.2f}", f"{best.name}, {seeds}")
        )
    return tiles


def _curve_sections(config: CompareConfig, results: Sequence[ArmResult]) -> list[PageSection]:
    """One section a group, with the baseline in each."""
    groups = dict.fromkeys(result.group for result in results)
    sections: list[PageSection] = []
    for number, group in enumerate(groups):
        arms = [result for result in results if result.group == group or result.baseline]
        charts = [_over_samples(config, arms), _over_kl(config, arms)]
        shown = [chart for chart in charts if chart.series]
        if shown:
            intro = "In grey, the baseline."
            if not sections:
                intro += " Lines are means over finished seeds, bands reach from the lowest to the highest seed."
            sections.append(PageSection(id=f"group-{number}", title=group, intro=intro, charts=shown))
    return sections


def _over_samples(config: CompareConfig, arms: Sequence[ArmResult]) -> Chart:
    window = config.compare.window
    curves = {
        arm.name: [
            ([float(at) for at in run.samples[window - 1 :]], trailing_mean(run.gold, window)) for run in arm.finished
        ]
        for arm in arms
    }
    return Chart(
        title=f"{_capital(config.compare.measured)} over samples",
        unit=config.compare.measured,
        sentence=f"Mean of {window} training batches. The dashed line is the threshold of the table.",
        kind="lines",
        series=_banded(curves, arms),
        x_title="responses trained on",
        reference=config.compare.threshold,
    )


def _over_kl(config: CompareConfig, arms: Sequence[ArmResult]) -> Chart:
    window = config.compare.window
    curves = {
        arm.name: [
            by_cell(trailing_mean(run.kl, window), trailing_mean(run.gold, window), width=KL_CELL)
            for run in arm.finished
        ]
        for arm in arms
    }
    return Chart(
        title=f"{_capital(config.compare.measured)} over KL",
        unit=config.compare.measured,
        sentence=f"What each arm gets for its distance from the reference: both are means of {window} batches, then "
        "of the steps within one nat. Only where all seeds have been; between points nothing was measured.",
        kind="lines",
        series=_banded(curves, arms),
        x_title="KL to the reference [nats a response]",
        reference=config.compare.threshold,
    )


def _banded(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], arms: Sequence[ArmResult]
) -> list[Series]:
    series: list[Series] = []
    for arm in arms:
        found = band(curves[arm.name])
        if not found.x:
            continue
        stride = math.ceil(len(found.x) / POINTS)
        low, high = (found.low[::stride], found.high[::stride]) if found.seeds > 1 else ([], [])
        x, y = found.x[::stride], found.mean[::stride]
        series.append(Series(label=arm.name, x=x, y=y, low=low, high=high, quiet=arm.baseline))
    return series


def _dots(config: CompareConfig, results: Sequence[ArmResult]) -> list[Chart]:
    def chart(title: str, sentence: str, values: Mapping[str, Sequence[float]], across: str) -> Chart:
        known = {name: finite for name, found in values.items() if (finite := [v for v in found if math.isfinite(v)])}
        means = [math.fsum(found) / len(found) for found in known.values()]
        lows, highs = [min(found) for found in known.values()], [max(found) for found in known.values()]
        series = [Series(label=title, x=list(known), y=means, low=lows, high=highs)] if known else []
        return Chart(title=title, sentence=sentence, kind="dots", series=series, y_title=across)

    finished = {result.name: result.finished for result in results}
    threshold, what = config.compare.threshold, config.compare.measured
    charts = [
        chart(
            f"Samples to {what} {threshold:g}",
            "Fewer is faster. Seeds that never got there are left out here; the table counts them.",
            {name: [float(r.reached.at) for r in runs if r.reached.at] for name, runs in finished.items()},
            "responses trained on",
        ),
        chart(
            f"Final {what} on held-out prompts",
            "Two runs that differ in rounding only can end apart by several SEM: read the paired differences below.",
            {name: [r.final_gold for r in runs] for name, runs in finished.items()},
            what,
        ),
    ]
    return [chart for chart in charts if chart.series]
