"""Whatever stands in a file: rows are used, counted, or refused in one sentence that names the file."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from r3hf_ray.data.loading import is_ranked, load_examples, load_groups, load_pairs, load_prompts
from r3hf_ray.data.sources import open_source
from r3hf_ray.errors import ConfigError
from r3hf_ray.sections.data import DataSection, RowFormat

Load = Callable[[DataSection, PreTrainedTokenizerFast], object]
LOADERS: list[Load] = [
    load_prompts,
    lambda data, tokenizer: load_examples(data, tokenizer, max_tokens=200),
    lambda data, tokenizer: load_pairs(data, tokenizer, max_tokens=200),
    lambda data, tokenizer: load_groups(data, tokenizer, max_tokens=200),
    lambda data, tokenizer: is_ranked(data),
]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SPOKEN = "\n\nHuman: Hi\n\nAssistant: Yes"
ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi", "completion": "Yes", "label": True},
    {"instruction": "Hi", "input": "there", "output": "Yes"},
    {"messages": TALK, "tools": []},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "system": "S"},
    {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "score_chosen": 2, "score_rejected": 1, "winner": "a"},
    {"prompt": "Hi", "chosen": TALK, "rejected": TALK},
    {"chosen": SPOKEN, "rejected": SPOKEN + "!"},
    {"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1, "safer_response_id": 0},
    {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}, {"text": "e"}], "choice": 1},
    {"prompt": SPOKEN, "answers": [{"answer": "No", "rank": 2}, {"answer": "Yes", "rank": 1}]},
    {"prompt": "Hi", "responses": ["No", "Yes"], "pairs": [[1, 0]]},
    {"prompt": "Hi", "responses": ["No", "Yes"], "scores": [0, 1.5]},
    {"conversation_a": TALK, "conversation_b": TALK, "winner": "model_b"},
    {"context": TALK[:1], "response1": "Yes", "response2": "No", "overall_preference": -1},
]
TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ["", " ", "\n\nHuman:", SPOKEN, "<|im_end|>", "None", "1", "tie", "\x00", "\ud83d", "{{ x }}", "user", "assistant"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
few_checks = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A row of some shape in which some parts, at any depth, are gone or something else."""
    return _damage(draw, draw(st.sampled_from(ROWS)), depth=0)


def _damage(draw: st.DrawFn, value: Any, depth: int) -> Any:
    if depth and draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    if isinstance(value, list):
        return [_damage(draw, part, depth + 1) for part in value if draw(st.integers(0, 19))]
    if isinstance(value, dict):
        return {name: _damage(draw, part, depth + 1) for name, part in value.items() if draw(st.integers(0, 19))}
    return value


def used_or_refused(data: DataSection, tokenizer: PreTrainedTokenizerFast) -> None:
    for load in LOADERS:
        try:
            load(data, tokenizer)
        except ConfigError as error:
            sentence = str(error)
            assert data.source in sentence and sentence.isprintable(), sentence
            assert len(sentence) < 2_000


@few_checks
@given(rows=st.lists(damaged(), max_size=4), form=st.sampled_from(get_args(RowFormat)), heldout=st.integers(0, 2))
def test_any_values_in_rows_of_any_shape(
    rows: list[Any], form: RowFormat, heldout: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    used_or_refused(DataSection(source=str(path), format=form, heldout=heldout), tokenizer)
    used_or_refused(DataSection(source=str(path), heldout=heldout), tokenizer)


@few_checks
@given(row=st.dictionaries(st.sampled_from(sorted({name for row in ROWS for name in row})), JSON, min_size=1))
def test_any_columns(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    used_or_refused(DataSection(source=str(path)), tokenizer)


@few_checks
@given(cells=st.lists(st.lists(TEXT.filter(lambda text: "\ud83d" not in text), min_size=2, max_size=2), max_size=4))
def test_any_cells(cells: list[list[str]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([["prompt", "completion"], *cells])
    used_or_refused(DataSection(source=str(path)), tokenizer)


@few_checks
@given(
    content=st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz"]),
    packed=st.booleans(),
    cut=st.integers(0, 8),
)
def test_any_bytes(content: bytes, name: str, packed: bool, cut: int, tmp_path: Path) -> None:
    path = tmp_path / name
    content = gzip.compress(content) if packed else content
    path.write_bytes(content[: len(content) - cut])
    try:
        list(open_source(DataSection(source=str(path))).rows)
    except ConfigError as error:
        assert str(path) in str(error) and str(error).isprintable(), str(error)


@few_checks
@given(rows=st.lists(st.sampled_from(ROWS), min_size=1, max_size=4), form=st.sampled_from(get_args(RowFormat)))
def test_shapes_together_in_one_parquet_file(
    rows: list[dict[str, Any]], form: RowFormat, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A table gives every row every column, with nulls where it has none."""
    path = tmp_path / "rows.parquet"
    try:
        table = pa.Table.from_pylist([dict.fromkeys(name for row in rows for name in row) | row for row in rows])
    except pa.ArrowException:  # one column cannot hold text and lists
        return
    pq.write_table(table, path)
    used_or_refused(DataSection(source=str(path), format=form), tokenizer)
    used_or_refused(DataSection(source=str(path)), tokenizer)
