"""A page as files: one self-contained HTML file that opens from disk, its numbers as JSON, its tables as Markdown.

Everything that comes from models, data or events is untrusted text. The template escapes it, the script sets it with
`textContent`, and a content security policy lets only the page's own two scripts run and nothing be loaded.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from r3hf_ray.instruments.pages.coloured_answers import drawn
from r3hf_ray.instruments.pages.parts import Page, Table
from r3hf_ray.records.jsonl import plain

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("page.js", "charts.js", "coloured_answers.js", "responses.js", "start.js")
SPARK = (120, 24)
"""Width and height of a small curve in a table. [px]"""


def write_page(folder: Path, name: str, page: Page, numbers: Mapping[str, Any]) -> Path:
    """Write ``name.html``, ``name.md`` and ``name.json`` over what an earlier call left there; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(as_json(numbers), indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(page), encoding="utf-8")
    return write_html(folder / f"{name}.html", page, beside=f"{name}.json and {name}.md")


def write_html(path: Path, page: Page, *, beside: str = "") -> Path:
    """Write the page alone; ``beside`` names files with its numbers. Returns the path."""
    answers = [drawn(answer) for section in page.sections for answer in section.answers]
    responses = [step for section in page.sections for step in section.responses]
    script, plotly = "".join((TEMPLATES / part).read_text() for part in SCRIPTS), get_plotlyjs()
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["sparkline"] = sparkline
    text = environment.get_template("page.html.jinja").render(
        page=page,
        beside=beside,
        written=_now(),
        spark=SPARK,
        data=as_json({"charts": page.charts, "answers": answers, "responses": responses}),
        style=Markup((TEMPLATES / "page.css").read_text()),
        scripts=[Markup(plotly), Markup(script)],
        script_hashes=[_hash(script), _hash(plotly)],
    )
    path.write_text(text, encoding="utf-8")
    return path


def markdown(page: Page) -> str:
    """Sentences and tables of a page, without charts and coloured answers."""
    parts = [f"# {page.title}", page.verdict]
    for section in page.sections:
        if section.settings or section.checks or section.tables:
            parts += [f"## {section.title}", section.intro]
            parts += ["\n".join(f"- `{name} = {value}`" for name, value in section.settings), section.reason]
            parts += ["\n".join(f"- **{check.label}**: {check.text}" for check in section.checks)]
            for table in section.tables:
                parts += [table.title and f"### {table.title}", _markdown_table(table), table.note]
    parts.append(f"{page.brand}: {page.status}; {page.about}; written {_now()}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    columns = [i for i in range(len(table.head)) if table.style(i) != "spark"]
    lines = [table.head, ["---"] * len(table.head), *(row.cells for row in table.rows)]
    return "\n".join("| " + " | ".join(_markdown_cell(str(line[i])) for i in columns) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def as_json(value: Any) -> Any:
    """JSON that any parser reads, numbers to five digits."""
    return plain(value, lambda number: float(f"{number:.5g}"))


def sparkline(values: list[float]) -> str:
    """Points of an SVG polyline through the values, inside the box of `SPARK` with a margin of 2."""
    width, height = SPARK
    low, span = min(values), (max(values) - min(values)) or 1.0
    across = max(len(values) - 1, 1)
    return " ".join(
        f"{2 + (width - 4) * i / across:.1f},{height - 2 - (height - 4) * (value - low) / span:.1f}"
        for i, value in enumerate(values)
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _hash(script: str) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
