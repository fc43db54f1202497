"""The texts of pages: read once, filled with words, and joined with numbers."""

from pathlib import Path

import pytest

import r3hf_ray.instruments
from r3hf_ray.instruments.pages.parts import Chart, PageSection, Series, Table, TableRow, table_of
from r3hf_ray.instruments.pages.texts import page_text, section

TEXT = """
[speed]
title = "How fast?"
intro = "Of {count:,} runs."
[speed.charts.samples]
title = "Samples to {what}"
sentence = "Fewer is faster."
kind = "dots"
[speed.charts.never]
title = "Never drawn"
sentence = "It has no series."
kind = "dots"
[speed.tables.all]
title = "Every run"
styles = { note = "meaning" }
"""
ONE = Series(label="mean", x=["r3hf"], y=[96.0])


@pytest.fixture
def text(tmp_path: Path) -> object:
    (tmp_path / "page.toml").write_text(TEXT)
    return page_text(tmp_path / "page.toml")


def test_a_section_has_its_words_and_numbers(text: dict) -> None:
    table = Table(head=["run", "note"], rows=[TableRow(["a", "{kept}"])])
    words = {"count": 1200, "what": "gold {1}"}
    made = section(
        text, "speed", words, charts={"samples": [ONE], "never": []}, tables={"all": table}, note="{as it is}"
    )
    assert made == PageSection(
        id="speed",
        title="How fast?",
        intro="Of 1,200 runs.",
        charts=[Chart(title="Samples to gold {1}", sentence="Fewer is faster.", kind="dots", series=[ONE])],
        tables=[Table(head=["run", "note"], rows=table.rows, title="Every run", styles={"note": "meaning"})],
        note="{as it is}",
    )
    assert section(text, "speed", words, id="speed-2", title="{again}").title == "{again}"


def test_a_word_that_is_not_given_is_an_error(text: dict) -> None:
    with pytest.raises(KeyError, match="count"):
        section(text, "speed")


def test_a_table_has_a_row_a_thing_and_headings_may_repeat() -> None:
    made = table_of([1, 2], [("n", str), ("n", lambda one: str(one * one))], quiet=lambda one: one == 2)
    assert made == Table(head=["n", "n"], rows=[TableRow(["1", "1"]), TableRow(["2", "4"], quiet=True)])


@pytest.mark.parametrize(
    "path", sorted(Path(r3hf_ray.instruments.__file__).parent.rglob("*.toml")), ids=lambda p: p.stem
)
def test_every_text_has_the_fields_of_a_page(path: Path) -> None:
    for described in page_text(path).values():
        assert described.keys() <= {"charts", "tables", "figures", *PageSection.__dataclass_fields__}
        for chart in described.get("charts", {}).values():
            assert {"title", "sentence", "kind"} <= chart.keys() <= set(Chart.__dataclass_fields__)
        for table in described.get("tables", {}).values():
            assert table.keys() <= set(Table.__dataclass_fields__)
