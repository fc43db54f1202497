"""The curves of a report: figures as `report.toml` has them, with the numbers of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from r3hf_ray.instruments.pages.parts import Chart, PageSection, Series
from r3hf_ray.instruments.pages.texts import page_text
from r3hf_ray.records.metrics import STEP

MetricRows = Sequence[Mapping[str, float]]
"""Lines of `metrics.jsonl`."""
MAX_POINTS = 1000
TEXT = page_text(Path(__file__).with_name("report.toml"))
CHAPTERS = {name: chapter for name, chapter in TEXT.items() if "figures" in chapter}
"""Parts of the report that hold curves."""
T = TypeVar("T")


def chapter_sections(rows: MetricRows, events: Sequence[int]) -> list[PageSection]:
    """The chapters, of each the figures that have a number to draw; ``events`` are steps for vertical lines."""
    sections: list[PageSection] = []
    for name, chapter in CHAPTERS.items():
        charts = [chart for figure in chapter["figures"] if (chart := _chart(rows, events, **figure)).series]
        note = " Dotted vertical lines are failures and restarts." if events and not sections else ""
        if charts:
            intro = f"{chapter['intro']}{note}"
            sections.append(PageSection(id=name, title=chapter["title"], intro=intro, charts=charts))
    return sections


def _chart(
    rows: MetricRows,
    events: Sequence[int],
    *,
    lines: Sequence[Sequence[str]],
    stacked: Sequence[Sequence[str]] = (),
    **described: Any,
) -> Chart:
    """Curves over training steps, those without a number left out."""
    drawn = [*(_series(rows, *line, stacked=True) for line in stacked), *(_series(rows, *line) for line in lines)]
    usual: dict[str, Any] = {"kind": "lines", "x_title": "step", "y_axis": "from zero", "events": events}
    return Chart(**usual | described, series=[found for found in drawn if found.x])


def _series(rows: MetricRows, metric: str, label: str, band: str = "", *, stacked: bool = False) -> Series:
    """A metric; ``band`` is one that is drawn as a half-width around it."""
    steps, values = series(rows, metric)
    widths = dict(zip(*series(rows, band), strict=True)) if band else {}
    points = thinned([(step, value, widths.get(step, 0.0)) for step, value in zip(steps, values, strict=True)])
    return Series(
        label=label,
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
