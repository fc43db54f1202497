"""Rows keep their numbers, and what cannot be read is refused with its place."""

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from r3hf_ray.data.sources import open_source
from r3hf_ray.errors import DataError
from r3hf_ray.sections.data import DataSection

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d é", "chosen": "e", "rejected": "f"}]


def rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    return list(open_source(DataSection(source=str(path))).rows)


def test_every_local_kind_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "a.csv")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"):
        first = 2 if name == "a.csv" else 1  # the header is a line
        assert rows(tmp_path / name) == [(first, ROWS[0]), (first + 1, ROWS[1])], name


def test_blank_lines_keep_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [number for number, _ in rows(path)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', "a.jsonl:2: is no JSON object"),
        ("a.json", '[{"prompt": "a"},\n 3', "a.json:2: not JSON"),
        ("a.json", '{"prompt": "a"}', "a.json: holds no JSON array"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "a.json:2: not JSON: Extra data at column 1; one object a line"),
        ("a.json", "[" * 100_000, "a.json: cannot be read as JSON: maximum recursion depth"),
        ("a.jsonl", '{"prompt": ' + "1" * 5_000 + "}", "a.jsonl:1: cannot be read as JSON: Exceeds the limit"),
        ("a.csv", 'prompt\n"a\n', "a.csv:2: not CSV: unexpected end of data"),
        ("a.csv", 'prompt,chosen\n"a\nb",c\n"d" e,f\n', "a.csv:4: not CSV"),
        ("a.csv", "prompt,chosen\na\n", "a.csv:2: has 1 cells and the header 2"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: two columns have the same name"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz:1: cannot be read"),
        ("a.parquet", "not parquet", "a.parquet: cannot be read"),
    ],
)
def test_unreadable_data_is_refused_with_its_place(tmp_path: Path, name: str, text: str, place: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        rows(tmp_path / name)
    assert place in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_gzip_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 3)[:-8])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: cannot be read"):
        rows(path)


def test_a_damaged_gzip_names_the_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    content = bytearray(gzip.compress("".join(f'{{"prompt": "{draw.random()}"}}\n' for _ in range(999)).encode()))
    content[2000:2060] = bytes(60)
    for name, place in (("a.jsonl.gz", r"a\.jsonl\.gz:\d+"), ("a.json.gz", r"a\.json\.gz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{place}: cannot be read"):
            rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "a"}\n'),
        ("a.jsonl", '{"prompt": "a"}\r\n\r\n'),
        ("a.jsonl", '{"prompt": "a"}\r'),
        ("a.json", '[{"prompt": "a"}]'),
        ("a.csv", "prompt\na\n"),
        ("a.csv", "prompt\r\na\r\n"),
    ],
)
def test_a_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row for _, row in rows(tmp_path / name)] == [{"prompt": "a"}]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    if name != "a.csv":
        assert [row for _, row in rows(tmp_path / f"{name}.gz")] == [{"prompt": "a"}]


def test_text_of_another_encoding_names_its_line(tmp_path: Path) -> None:
    places = {"a.jsonl": "a.jsonl:3", "a.json": "a.json:3", "a.csv": "a.csv:3"}
    texts = {
        "a.jsonl": '{"p": "a"}\n{"p": "b"}\n{"p": "é"}\n',
        "a.json": '[{"p": "a"},\n3,\n"é"]',
        "a.csv": "p\na\né\n",
    }
    for name, text in texts.items():
        for encoding, place in (("latin-1", places[name]), ("utf-16", f"{name}")):
            (tmp_path / name).write_bytes(text.encode(encoding))
            with pytest.raises(DataError, match=rf"{place}.*: is not UTF-8 text; save the file as UTF-8"):
                rows(tmp_path / name)


def test_a_cell_of_a_csv_file_is_text(tmp_path: Path) -> None:
    cells = ["None", "NA", "N/A", "null", "nan", "2", "007", "1e5", "True", "", " x ", "2020-01-01", "a\nb", 'say "x"']
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([str(n), cell] for n, cell in enumerate(cells))])
    assert [row["text"] for _, row in rows(tmp_path / "a.csv")] == cells
    (tmp_path / "hub").mkdir()  # a dataset of the hub that holds CSV files is read by `datasets`, as this folder is
    (tmp_path / "a.csv").rename(tmp_path / "hub" / "a.csv")
    assert [row["text"] for _, row in rows(tmp_path / "hub")] == cells


def test_nested_rows_of_a_parquet_file_keep_their_nulls(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]},
    ]
    nested = [{"messages": turns, "image": {"bytes": b"x", "path": None}}, {"messages": None, "image": None}]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [(1, nested[0]), (2, nested[1])]


def test_parquet_text_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    broken = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read after row 0: .*utf-8"):
        rows(tmp_path / "a.parquet")


def test_a_missing_file_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source: no file .*absent\.jsonl"):
        rows(tmp_path / "absent.jsonl")


def test_a_dataset_that_is_a_script_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").touch()
    with pytest.raises(DataError, match=r"^data\.source: .*scripts are no longer supported.*; name one that holds"):
        open_source(DataSection(source=str(tmp_path / "scripted")))


def test_a_hub_name_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        assert kwargs == {"name": None, "data_dir": "harmless-base", "split": "train"}
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'Anthropic/hh-rlhf' \(.*harmless-base.*\(offline\)"):
        open_source(DataSection(source="Anthropic/hh-rlhf", data_dir="harmless-base"))
