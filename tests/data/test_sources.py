"""Rows keep their numbers, and what cannot be read is refused with its place."""

import gzip
import json
from pathlib import Path

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
        assert rows(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])], name


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
