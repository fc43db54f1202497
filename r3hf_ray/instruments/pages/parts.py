"""What a page is made of, as plain data: tiles, charts, tables, lines with a mark, coloured answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from r3hf_ray.instruments.pages.coloured_answers import ColouredAnswer, notes_of
from r3hf_ray.instruments.pages.intervals import Estimate

T = TypeVar("T")
Places = Sequence[str] | Sequence[int] | Sequence[float]
Cell = str | Sequence[float] | Sequence[int]
CellStyle = Literal["text", "num", "code", "quiet", "meaning", "spark", "kind"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top of a page.

    Example: ``Tile("Gold reward, held-out", "0.80 → 4.10", "± 0.09 → ± 0.10", "good")``
    """

    label: str
    value: str
    note: str
    tone: str = ""
    """`good`, `bad` or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series of a chart.

    Example: ``Series(label="r3hf", x=[32, 64], y=[0.5, 0.8], low=[0.4, 0.7], high=[0.6, 0.9])``
    """

    label: str
    """Empty: that of the chart."""
    x: Places
    y: Sequence[float]
    low: Sequence[float] = ()
    """With `high`, the edges of a band or of error bars; empty: none."""
    high: Sequence[float] = ()
    quiet: bool = False
    """Grey: a baseline or a control."""
    marks: Sequence[bool] = ()
    """Points of another colour; empty: none."""
    stacked: bool = False
    """In a chart of lines: bars on each other, below the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure that the page's script draws; a dot of ``dots`` is on the line of its category ``x``, at ``y``."""

    title: str
    sentence: str
    """For a reader who has not seen the code."""
    kind: Literal["lines", "dots", "bars", "scatter"]
    series: Sequence[Series]
    unit: str = ""
    x_title: str = ""
    y_title: str = ""
    y_axis: Literal["fitted", "from zero", "log"] = "fitted"
    reference: float | None = None
    """A dashed line, such as chance."""
    events: Sequence[int] = ()
    """Dotted vertical lines."""
    percent: bool = False
    """The horizontal axis is a share."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table; a quiet one is a control."""

    cells: Sequence[Cell]
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first column is text and the others are numbers, unless ``styles`` names them otherwise."""

    head: Sequence[str]
    rows: Sequence[TableRow]
    title: str = ""
    note: str = ""
    styles: Mapping[str, CellStyle] = field(default_factory=dict)
    """Heading -> style of its column; a cell of style ``spark`` is the values of a small curve."""
    folded: bool = False
    """Shown by a click on its title."""

    def style(self, column: int) -> CellStyle:
        """Of a column, by its place."""
        return self.styles.get(self.head[column], "num" if column else "text")


@dataclass(frozen=True, slots=True)
class Check:
    """A line with a mark before it: ``good``, ``bad``, ``warn`` or ``plain``."""

    tone: str
    label: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
    """A part of a page under a heading; its parts come in the order of the fields."""

    id: str
    title: str
    intro: str
    menu: str = ""
    """A shorter title for the menu."""
    settings: Sequence[tuple[str, str]] = ()
    reason: str = ""
    """Beside the settings."""
    checks: Sequence[Check] = ()
    charts: Sequence[Chart] = ()
    responses: Sequence[Mapping[str, Any]] = ()
    """Sampled responses by step, for `templates/responses.js`; one section of a page may have them."""
    answers: Sequence[ColouredAnswer] = ()
    """One section of a page may have them."""
    underlines: Mapping[str, str] = field(default_factory=dict)
    """CSS class of an underline in the coloured answers -> what it means."""
    tables: Sequence[Table] = ()
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Title -> names and values."""
    note: str = ""

    @property
    def methods(self) -> dict[str, str]:
        """What each row of the coloured answers shows, by its title."""
        return notes_of(self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything a page shows."""

    brand: str
    title: str
    verdict: str
    status: str
    tone: Literal["good", "warn"]
    about: str = ""
    """What was measured, on what."""
    tiles: Sequence[Tile]
    sections: Sequence[PageSection]

    @property
    def charts(self) -> list[Chart]:
        """Of all sections, in order."""
        return [chart for section in self.sections for chart in section.charts]


def table_of(
    shown: Sequence[T], columns: Sequence[tuple[str, Callable[[T], Cell]]], *, quiet: Callable[[T], bool]
) -> Table:
    """A row for each thing that is shown; a column is a heading and what it says of a thing."""
    rows = [TableRow([cell(one) for _, cell in columns], quiet=quiet(one)) for one in shown]
    return Table(head=[heading for heading, _ in columns], rows=rows)


def model_name(source: str) -> str:
    """What to call a model: that of ``runs/toy_reward/model`` is ``toy_reward``."""
    path = Path(source)
    return path.resolve().parent.name if path.name == "model" else path.name


def estimates(
    label: str,
    x: Places,
    values: Sequence[Estimate],
    *,
    marks: Sequence[bool] = (),
    quiet: bool = False,
) -> Series:
    """A series of estimates with their intervals."""
    low, high = [value.low for value in values], [value.high for value in values]
    return Series(label=label, x=x, y=[v.value for v in values], low=low, high=high, marks=marks, quiet=quiet)
