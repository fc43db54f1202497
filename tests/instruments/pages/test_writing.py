"""A page as files: HTML that loads nothing, its numbers as JSON, its sentences and tables as Markdown."""

import json
import math
from pathlib import Path

from r3hf_ray.instruments.pages.intervals import Estimate
from r3hf_ray.instruments.pages.parts import (
    Chart,
    Check,
    Page,
    PageSection,
    Series,
    Table,
    TableRow,
    Tile,
    estimates,
    model_name,
)
from r3hf_ray.instruments.pages.writing import as_json, markdown, sparkline, write_page

TABLE = Table(
    title="Runs",
    head=["run", "curve", "score", "note"],
    rows=[TableRow(["a|b", [1.0, 3.0], "0.5", "<b>two\nlines</b>"]), TableRow(["quiet", [], "–", ""], quiet=True)],
    styles={"curve": "spark", "note": "meaning"},
    note="As it was.",
)
AREAS = Series(label="x", x=["a", "b"], y=[0.25, math.nan])
PAGE = Page(
    brand="r3hf_ray test",
    title="small",
    verdict="All is well.",
    status="complete",
    tone="good",
    about="two runs",
    tiles=[Tile("Runs", "2", "of 2", "good")],
    sections=[
        PageSection(
            id="start",
            title="What to start with",
            menu="Start",
            intro="Settings.",
            settings=[("reward.mode", '"r3hf"')],
            reason="It is quick.",
            checks=[Check("good", "met", "it is fast")],
            charts=[Chart(title="Areas", sentence="Of two.", kind="dots", reference=0.5, series=[AREAS])],
        ),
        PageSection(id="numbers", title="All numbers", intro="Here.", tables=[TABLE], groups={"model": {"size": "2"}}),
    ],
)


def test_markdown_has_sentences_settings_and_tables() -> None:
    parts = markdown(PAGE).split("\n\n")
    assert parts[:4] == ["# small", "All is well.", "## What to start with", "Settings."]
    assert parts[4:7] == ['- `reward.mode = "r3hf"`', "It is quick.", "- **met**: it is fast"]
    table = "| run | score | note |\n| --- | --- | --- |\n| a\\|b | 0.5 | <b>two lines</b> |\n| quiet | – |  |"
    assert parts[7:12] == ["## All numbers", "Here.", "### Runs", table, "As it was."]
    assert parts[12].startswith("r3hf_ray test: complete; two runs; written ")


def test_three_files_are_written_and_overwritten(tmp_path: Path) -> None:
    for value in (1.0, 1 / 3):
        path = write_page(tmp_path / "out", "small", PAGE, {"value": value, "none": math.inf})
    assert path == tmp_path / "out/small.html" and "### Runs" in (tmp_path / "out/small.md").read_text()
    assert json.loads((tmp_path / "out/small.json").read_text()) == {"value": 0.33333, "none": None}
    assert sorted(file.name for file in path.parent.iterdir()) == ["small.html", "small.json", "small.md"]


def test_every_part_of_a_page_is_in_its_html(read_page: object, tmp_path: Path) -> None:
    page = read_page(write_page(tmp_path, "small", PAGE, {}))  # type: ignore[operator]
    texts = {text.strip() for text in page.texts}
    assert {"Start", "What to start with", "met", "it is fast", "It is quick.", "Areas", "As it was."} <= texts
    assert {"<b>two\nlines</b>", "a|b", "size", "2", "Of two."} <= texts
    assert [a["class"] for tag, a in page.tags if tag == "th"] == ["", "", "num", ""]
    assert [a.get("class") for tag, a in page.tags if tag == "tr"] == [None, None, "control"]
    assert [a["points"] for tag, a in page.tags if tag == "polyline"] == ["2.0,22.0 118.0,2.0"]
    (chart,) = page.data["charts"]
    assert (chart["kind"], chart["reference"], chart["series"][0]["y"]) == ("dots", 0.5, [0.25, None])
    assert not any(a.get("id") in ("answers", "responses-drawn") for _, a in page.tags)


def test_json_is_what_any_parser_reads() -> None:
    estimate = Estimate(0.123456789, -math.inf, math.nan, 7)
    assert as_json({1: (estimate, "x", None, True)}) == {
        "1": [{"value": 0.12346, "low": None, "high": None, "count": 7}, "x", None, True]
    }


def test_estimates_become_a_series() -> None:
    series = estimates("r3hf", ["a"], [Estimate(0.5, 0.4, 0.7, 9)], quiet=True)
    assert str(Estimate(0.5, 0.4, 0.7, 9)) == "0.50 [0.40, 0.70]" and str(Estimate(math.nan, 0.0, 1.0, 0)) == "–"
    assert (series.y, series.low, series.high, series.quiet) == ([0.5], [0.4], [0.7], True)


def test_sparkline_spans_its_box() -> None:
    assert sparkline([1.0, 3.0, 2.0]) == "2.0,22.0 60.0,2.0 118.0,12.0" and sparkline([5.0]) == "2.0,22.0"


def test_a_model_is_called_by_its_run() -> None:
    assert model_name("runs/toy_reward/model") == "toy_reward"
    assert model_name("someone/judge") == model_name("judge") == "judge"
