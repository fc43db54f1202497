"""``comparison.html``, ``comparison.md`` and ``comparison.json``: what a comparison shows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun
from r3hf_ray.instruments.compare.expectations import ArmResult, ComparisonResults
from r3hf_ray.instruments.compare.settings import CompareSection
from r3hf_ray.instruments.compare.statistics import by_cell, mean, shared_points, trailing_mean
from r3hf_ray.instruments.compare.tables import numbers, samples_text, summary, tables
from r3hf_ray.instruments.pages.parts import Check, Page, PageSection, Series, Tile
from r3hf_ray.instruments.pages.texts import page_text, section
from r3hf_ray.instruments.pages.writing import write_page

TEXT = page_text(Path(__file__).with_suffix(".toml"))
Curve = tuple[Sequence[float], Sequence[float]]
KL_CELL = 1.0
"""Width of a point of the curve over KL. [nats a response]"""
POINTS = 30
"""Of a curve, at most about."""
TONES = {"met": "good", "missed": "bad", "not run": "plain"}
OF_SEEDS = " Lines are means over finished seeds, bands reach from the lowest to the highest seed."
SCREENED = ", screened: each run in one process, with the system's engine, scorer and learner but without Ray"


def write_comparison(folder: Path, results: ComparisonResults) -> Path:
    """Write the page, its Markdown and its numbers over what an earlier call left there; returns the page."""
    return write_page(folder, "comparison", comparison_page(results), numbers(results))


def comparison_page(results: ComparisonResults) -> Page:
    """The page, from the results."""
    settings = results.config.compare
    missed = any(one.verdict == "missed" for one in results.expectations)
    complete = all(run.status == "finished" for run in results.runs)
    words = {
        "what": settings.measured,
        "What": settings.measured[0].upper() + settings.measured[1:],
        "threshold": settings.threshold,
        "window": settings.window,
        "equal_kl": settings.equal_kl,
        "baseline": settings.baseline,
        "lacking": results.lacking,
    }
    checks = [Check(TONES[one.verdict], one.verdict, f"{one.sentence}: {one.found}") for one in results.expectations]
    return Page(
        brand="r3hf_ray comparison",
        title=results.config.run.name,
        verdict=summary(results),
        status=("expectations missed" if missed else "complete") if complete else "not complete",
        tone="good" if complete and not missed else "warn",
        about=f"variants of {settings.job}{SCREENED if settings.in_process else ''}",
        tiles=_tiles(results),
        sections=[
            *([section(TEXT, "expected", checks=checks)] if checks else []),
            *_groups(results, words),
            section(TEXT, "ends", words, charts=_ends(results)),
            section(TEXT, "numbers", words, tables=tables(results)),
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


def _groups(results: ComparisonResults, words: Mapping[str, Any]) -> list[PageSection]:
    """One section a group of arms that has a curve, with the baseline in each."""
    sections: list[PageSection] = []
    for number, group in enumerate(dict.fromkeys(arm.group for arm in results.arms)):
        charts = _curves(results.config.compare, [arm for arm in results.arms if arm.group == group or arm.baseline])
        if any(charts.values()):
            of_it = {**words, "lines": "" if sections else OF_SEEDS}
            found = section(TEXT, "group", of_it, id=f"group-{number}", title=group, charts=charts)
            dashed = [replace(chart, reference=results.config.compare.threshold) for chart in found.charts]
            sections.append(replace(found, charts=dashed))
    return sections


def _curves(settings: CompareSection, arms: Sequence[ArmResult]) -> dict[str, list[Series]]:
    """Over samples and over KL, of each arm that has a line."""
    window = settings.window

    def over_samples(run: MeasuredRun) -> Curve:
        return list(map(float, run.samples[window - 1 :])), trailing_mean(run.gold, window)

    def over_kl(run: MeasuredRun) -> Curve:
        return by_cell(trailing_mean(run.kl, window), trailing_mean(run.gold, window), width=KL_CELL)

    def lines(curve: Callable[[MeasuredRun], Curve]) -> list[Series]:
        return [line for arm in arms if (line := _banded(arm, [curve(run) for run in arm.finished])).x]

    return {"samples": lines(over_samples), "kl": lines(over_kl)}


def _banded(arm: ArmResult, curves: Sequence[Curve]) -> Series:
    """The mean of an arm's seeds, in a band from the lowest to the highest."""
    points = list(shared_points(curves).items())
    points = points[:: max(1, math.ceil(len(points) / POINTS))]
    x, values = [place for place, _ in points], [found for _, found in points]
    low, high = (list(map(min, values)), list(map(max, values))) if len(curves) > 1 else ([], [])
    return Series(label=arm.name, x=x, y=list(map(mean, values)), low=low, high=high, quiet=arm.baseline)


def _ends(results: ComparisonResults) -> dict[str, list[Series]]:
    def dots(value: Callable[[MeasuredRun], float]) -> list[Series]:
        """Mean of what an arm's finished runs have, with its range."""
        found = {arm.name: list(filter(math.isfinite, map(value, arm.finished))) for arm in results.arms}
        known = {name: values for name, values in found.items() if values}
        low, high = list(map(min, known.values())), list(map(max, known.values()))
        return [Series(label="", x=list(known), y=list(map(mean, known.values())), low=low, high=high)] if known else []

    return {
        "speed": dots(lambda run: float(run.reached.at or math.nan)),
        "final": dots(lambda run: run.final_gold),
    }
