"""What a page says, in a TOML file beside the code that measures; the code adds the numbers.

The file has a table for each section of the page, with the fields of `PageSection`, and in it `charts` and `tables` by
name, with the fields of `Chart` and `Table`. ``{name}`` in a text stands for a word that is known later.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r3hf_ray.instruments.pages.parts import Chart, PageSection, Series, Table

PageText = Mapping[str, Mapping[str, Any]]
"""Id of a section -> what the file says of it."""


def page_text(path: Path) -> PageText:
    """Read the texts of a page."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def section(
    text: PageText,
    name: str,
    words: Mapping[str, Any] | None = None,
    *,
    charts: Mapping[str, Sequence[Series]] | None = None,
    tables: Mapping[str, Table] | None = None,
    **more: Any,
) -> PageSection:
    """A section as the text has it, with its numbers.

    Args:
        text: of the page.
        name: of the section in it; the section's id where ``more`` has none.
        words: for the places in its texts.
        charts: series by the name of the chart; one without series is left out.
        tables: by name; what the text says of a table is put into it.
        more: fields of the section.
    """
    own = _filled(text[name], words or {})
    drawn, told = own.pop("charts", {}), own.pop("tables", {})
    return PageSection(
        **{"id": name} | own | more,
        charts=[Chart(**drawn[chart], series=series) for chart, series in (charts or {}).items() if series],
        tables=[replace(table, **told.get(title, {})) for title, table in (tables or {}).items()],
    )


def _filled(described: Any, words: Mapping[str, Any]) -> Any:
    if isinstance(described, str):
        return described.format_map(words)
    if isinstance(described, dict):
        return {name: _filled(value, words) for name, value in described.items()}
    return described
