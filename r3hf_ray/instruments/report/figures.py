"""The curves of a report, as `figures.toml` names them, with the numbers of a run."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from r3hf_ray.instruments.pages.parts import Chart, PageSection, Series
from r3hf_ray.records.metrics import STEP

MetricRows = Sequence[Mapping[str, float]]
"""Lines of `metrics.jsonl`."""
MAX_POINTS = 1000
LINES = ("lines", "stacked")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a figure.

    Example: ``Line("eval/heldout/gold/mean", "held-out", band="eval/heldout/gold/sem")``
    """

    metric: str
    label: str
    band: str = ""
    """Metric whose value is drawn as a half-width around the curve."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart over training steps; it is left out when no row has any of its metrics."""

    title: str
    sentence: str
    """For a reader who has not seen the code."""
    lines: tuple[Line, ...]
    unit: str = ""
    stacked: tuple[Line, ...] = ()
    """Drawn as stacked bars below the lines."""
    log: bool = False
    """Logarithmic vertical axis."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Chapter:
    """A part of the report: some figures under one question."""

    id: str
    title: str
    intro: str
    figures: tuple[Figure, ...]


CHAPTERS = tuple(
    Chapter(
        **chapter
        | {
            "figures": tuple(
                Figure(**figure | {name: tuple(Line(*line) for line in figure.get(name, ())) for name in LINES})
                for figure in chapter["figures"]
            )
        }
    )
    for chapter in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["chapters"]
)
"""Of `figures.toml`, in the order of the page."""


def chapter_sections(rows: MetricRows, events: Sequence[int]) -> list[PageSection]:
    """The chapters, of each the figures that have a number to draw; ``events`` are steps for vertical lines."""
    sections: list[PageSection] = []
    for chapter in CHAPTERS:
        charts = [chart for figure in chapter.figures if (chart := _chart(figure, rows, events)).series]
        note = " Dotted vertical lines are failures and restarts." if events and not sections else ""
        if charts:
            sections.append(
                PageSection(id=chapter.id, title=chapter.title, intro=f"{chapter.intro}{note}", charts=charts)
            )
    return sections


def _chart(figure: Figure, rows: MetricRows, events: Sequence[int]) -> Chart:
    drawn = [(line, True) for line in figure.stacked] + [(line, False) for line in figure.lines]
    return Chart(
        title=figure.title,
        unit=figure.unit,
        sentence=figure.sentence,
        kind="lines",
        series=[found for line, stacked in drawn if (found := _series(line, rows, stacked)).x],
        x_title="step",
        y_axis="log" if figure.log else "from zero",
        events=events,
        wide=figure.wide,
    )


def _series(line: Line, rows: MetricRows, stacked: bool) -> Series:
    steps, values = series(rows, line.metric)
    widths = dict(zip(*series(rows, line.band), strict=True)) if line.band else {}
    points = thinned([(step, value, widths.get(step, 0.0)) for step, value in zip(steps, values, strict=True)])
    return Series(
        label=line.label,
        x=[step for step, _, _ in points],
        y=[value for _, value, _ in points],
        low=[value - width for _, value, width in points] if widths else (),
        high=[value + width for _, value, width in points] if widths else (),
        stacked=stacked,
    )


def series(rows: MetricRows, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is a finite number."""
    points = [(int(row[STEP]), row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    return [step for step, _ in points], [value for _, value in points]


def thinned(points: list[T]) -> list[T]:
    """At most about `MAX_POINTS` of a list, evenly, the last always kept."""
    stride = math.ceil(len(points) / MAX_POINTS) if points else 1
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
