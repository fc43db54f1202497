"""``comparison.html``, ``comparison.md`` and ``comparison.json``: what a comparison shows."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.expectations import ArmResult, ComparisonResults
from r3hf_ray.instruments.compare.statistics import band, by_cell, mean, trailing_mean
from r3hf_ray.instruments.compare.tables import numbers, samples_text, summary, tables
from r3hf_ray.instruments.pages.parts import Chart, Check, Page, PageSection, Series, Tile
from r3hf_ray.instruments.pages.writing import write_page

KL_CELL = 1.0
"""Width of a point of the curve over KL. [nats a response]"""
POINTS = 30
"""Of a curve, at most about."""
TONES = {"met": "good", "missed": "bad", "not run": "plain"}
SCREENED = ", screened: each run in one process, with the system's engine, scorer and learner but without Ray"


def write_comparison(folder: Path, results: ComparisonResults) -> Path:
    """Write the page, its Markdown and its numbers over what an earlier call left there; returns the page."""
    return write_page(folder, "comparison", comparison_page(results), numbers(results))


def comparison_page(results: ComparisonResults) -> Page:
    """The page, from the results."""
    missed = any(one.verdict == "missed" for one in results.expectations)
    complete = all(run.status == "finished" for run in results.runs)
    expected = PageSection(
        id="expected",
        title="What was expected",
        intro="Redistribution keeps the optimum and changes speed. It should be faster than sparse reward with a cold "
        "critic, and no faster than sparse reward with a critic loaded from the reward model, head included: an arm "
        "that beats that one by far is suspect.",
        checks=[Check(TONES[one.verdict], one.verdict, f"{one.sentence}: {one.found}") for one in results.expectations],
    )
    return Page(
        brand="r3hf_ray comparison",
        title=results.config.run.name,
        verdict=summary(results),
        status=("expectations missed" if missed else "complete") if complete else "not complete",
        tone="good" if complete and not missed else "warn",
        about=f"variants of {results.config.compare.job}{SCREENED if results.config.compare.in_process else ''}",
        tiles=_tiles(results),
        sections=[
            *([expected] if results.expectations else []),
            *_curve_sections(results),
            PageSection(
                id="ends",
                title="Speed and end",
                intro="Every arm with a finished run: points are means over seeds, bars their range. Read speed and "
                "end together, at equal KL too: an arm can be fast because it moves further.",
                charts=_ends(results),
            ),
            PageSection(
                id="numbers",
                title="All numbers",
                intro=f"As in comparison.md and comparison.json. One seed is a hint, three are little more. "
                f"{results.lacking}",
                tables=tables(results),
            ),
        ],
    )


def _tiles(results: ComparisonResults) -> list[Tile]:
    runs, judged, baseline = results.runs, results.judged, results.baseline
    done, failed = (sum(run.status == status for run in runs) for status in ("finished", "failed"))
    met = sum(one.verdict == "met" for one in judged)
    ended = [arm for arm in results.arms if math.isfinite(arm.final_gold[0])]
    best = max(ended, key=lambda arm: arm.final_gold[0], default=None)
    what, threshold = results.config.compare.measured, results.config.compare.threshold
    tiles = [
        Tile("Runs finished", f"{done} of {len(runs)}", f"{failed} failed", "bad" if failed else ""),
        Tile(f"Samples to {what} {threshold:g}", samples_text(baseline), f"baseline: {baseline.name}"),
    ]
    if results.expectations:
        tone = "" if not judged else "good" if met == len(judged) else "bad"
        not_run = len(results.expectations) - len(judged)
        tiles.append(Tile("Expectations met", f"{met} of {len(judged)}", f"{not_run} not run", tone))
    if best:
        seeds = f"{len(best.finished)} seed{'s' if len(best.finished) > 1 else ''}"
        tiles.append(Tile(f"Highest final {what}", f"{best.final_gold[0]:.2f}", f"{best.name}, {seeds}"))
    return tiles


def _curve_sections(results: ComparisonResults) -> list[PageSection]:
    """One section a group, with the baseline in each."""
    sections: list[PageSection] = []
    for number, group in enumerate(dict.fromkeys(arm.group for arm in results.arms)):
        charts = _curves(results, [arm for arm in results.arms if arm.group == group or arm.baseline])
        if charts:
            intro = "In grey, the baseline."
            if not sections:
                intro += " Lines are means over finished seeds, bands reach from the lowest to the highest seed."
            sections.append(PageSection(id=f"group-{number}", title=group, intro=intro, charts=charts))
    return sections


Curve = tuple[Sequence[float], Sequence[float]]


def _curves(results: ComparisonResults, arms: Sequence[ArmResult]) -> list[Chart]:
    """Over samples and over KL, those of the two that have a line."""
    settings, window = results.config.compare, results.config.compare.window

    def over_samples(run: MeasuredRun) -> Curve:
        return list(map(float, run.samples[window - 1 :])), trailing_mean(run.gold, window)

    def over_kl(run: MeasuredRun) -> Curve:
        return by_cell(trailing_mean(run.kl, window), trailing_mean(run.gold, window), width=KL_CELL)

    def chart(over: str, x_title: str, sentence: str, curve: Callable[[MeasuredRun], Curve]) -> Chart:
        lines = [_banded(arm, [curve(run) for run in arm.finished]) for arm in arms]
        return Chart(
            title=f"{settings.measured[0].upper()}{settings.measured[1:]} over {over}",
            unit=settings.measured,
            sentence=sentence,
            kind="lines",
            series=[line for line in lines if line.x],
            x_title=x_title,
            reference=settings.threshold,
        )

    charts = [
        chart(
            "samples",
            "responses trained on",
            f"Mean of {window} training batches. The dashed line is the threshold of the table.",
            over_samples,
        ),
        chart(
            "KL",
            "KL to the reference [nats a response]",
            f"What each arm gets for its distance from the reference: both are means of {window} batches, then of the "
            "steps within one nat. Only where all seeds have been; between points nothing was measured.",
            over_kl,
        ),
    ]
    return [chart for chart in charts if chart.series]


def _banded(arm: ArmResult, curves: Sequence[Curve]) -> Series:
    found = band(curves)
    thin = slice(None, None, max(1, math.ceil(len(found.x) / POINTS)))
    low, high = (found.low[thin], found.high[thin]) if found.seeds > 1 else ([], [])
    return Series(label=arm.name, x=found.x[thin], y=found.mean[thin], low=low, high=high, quiet=arm.baseline)


def _ends(results: ComparisonResults) -> list[Chart]:
    def chart(title: str, sentence: str, values: Mapping[str, Sequence[float]], across: str) -> Chart:
        known = {name: finite for name, found in values.items() if (finite := [v for v in found if math.isfinite(v)])}
        lows, highs = [min(found) for found in known.values()], [max(found) for found in known.values()]
        series = Series(label=title, x=list(known), y=[mean(found) for found in known.values()], low=lows, high=highs)
        return Chart(title=title, sentence=sentence, kind="dots", series=[series] if known else [], y_title=across)

    threshold, what = results.config.compare.threshold, results.config.compare.measured
    charts = [
        chart(
            f"Samples to {what} {threshold:g}",
            "Fewer is faster. Seeds that never got there are left out here; the table counts them.",
            {arm.name: [float(run.reached.at) for run in arm.finished if run.reached.at] for arm in results.arms},
            "responses trained on",
        ),
        chart(
            f"Final {what} on held-out prompts",
            "Two runs that differ in rounding only can end apart by several SEM: read the paired differences below.",
            {arm.name: [run.final_gold for run in arm.finished] for arm in results.arms},
            what,
        ),
    ]
    return [chart for chart in charts if chart.series]
