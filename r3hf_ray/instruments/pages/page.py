"""One self-contained page for `r3hf audit` and `r3hf credit`, with its numbers as JSON beside it.

Texts of models and people are untrusted: the template escapes them, the script sets them with `textContent`, and a
content security policy lets only this page's own two scripts run and nothing be loaded. CSS, coloured texts and their
script are those of a run's report.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from r3hf_ray.instruments.report.cards import notes_of
from r3hf_ray.instruments.report.report import TEMPLATES as REPORT_TEMPLATES
from r3hf_ray.instruments.report.report import hash_of, script_of
from r3hf_ray.instruments.report.summary import Tile

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure that the page's script draws.

    A series has ``label``, ``x`` and ``y``, may have ``low`` and ``high``, ``quiet`` (grey) and ``marks`` (which points
    are another colour). ``dots`` lie on a line for each category ``x`` with their value ``y`` across.
    """

    title: str
    sentence: str
    """For a reader who has not seen the code."""
    kind: Literal["lines", "dots", "bars", "scatter"]
    series: Sequence[Mapping[str, Any]]
    unit: str = ""
    x_title: str = ""
    y_title: str = ""
    reference: float | None = None
    """A dashed line, such as chance."""
    percent: bool = False
    """The horizontal axis is a share."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; a quiet one is a control."""

    cells: Sequence[str]
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of strings; the first column is text."""

    head: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    note: str = ""
    words: bool = False
    """The last column is text too."""


@dataclass(frozen=True, slots=True)
class Check:
    """A line with a mark before it: ``good``, ``bad``, ``warn`` or ``plain``."""

    tone: str
    label: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; the one with id ``texts`` holds the coloured texts."""

    id: str
    title: str
    intro: str
    settings: Sequence[tuple[str, str]] = ()
    reason: str = ""
    checks: Sequence[Check] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything a page shows besides its coloured texts."""

    brand: str
    title: str
    verdict: str
    status: str
    tone: Literal["good", "warn"]
    about: str
    """What was measured, on what."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    marks: Mapping[str, str] = field(default_factory=dict)
    """CSS class of a mark in the coloured texts -> what it means."""


def write_page(
    folder: Path, name: str, page: Page, *, cards: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any]
) -> Path:
    """Write ``name.html`` and ``name.json`` into a folder, over what an earlier call left there; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(plain(numbers), indent=2) + "\n", encoding="utf-8")
    script, plotly = script_of(TEMPLATES / "page.js"), get_plotlyjs()
    folders = FileSystemLoader([TEMPLATES, REPORT_TEMPLATES])
    environment = Environment(loader=folders, autoescape=True, undefined=StrictUndefined)
    charts = [chart for section in page.sections for chart in section.charts]
    text = environment.get_template("page.html.jinja").render(
        page=page,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        json_name=f"{name}.json",
        marks=page.marks,
        notes=notes_of(cards),
        data=plain({"charts": charts, "cards": list(cards)}),
        style=Markup((REPORT_TEMPLATES / "report.css").read_text() + (TEMPLATES / "page.css").read_text()),
        script=Markup(script),
        plotly=Markup(plotly),
        script_hashes=[hash_of(script), hash_of(plotly)],
    )
    path = folder / f"{name}.html"
    path.write_text(text, encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """Dataclasses as objects, numbers to five digits, what is not finite as null: JSON that any parser reads."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
