"""Rows of a data source with their numbers: a local file or a hub dataset (layer 4)."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from r3hf_ray.errors import DataError
from r3hf_ray.sections.data import DataSection

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one source, in order.

    Example: ``Source(name="pairs.jsonl", unit="line", rows=iter([(1, {"chosen": ..., "rejected": ...}), ...]))``
    """

    name: str
    unit: str
    """What a row's number counts from 1: ``line`` of a JSON Lines or CSV file, else ``row``."""
    rows: Iterator[tuple[int, dict[str, Any]]]

    def place(self, number: int) -> str:
        """Where a row stands: ``pairs.jsonl:3`` or ``pairs.parquet: row 3``."""
        return f"{self.name}:{number}" if self.unit == "line" else f"{self.name}: row {number}"


def open_source(data: DataSection) -> Source:
    """Open `data.source`: a name with one of the local suffixes is a file, anything else a hub dataset.

    Rows come lazily, so a parse error is raised when its line is reached.

    Raises:
        DataError: no such file, a file or dataset that cannot be read, or a line that is no JSON object (file:line).
    """
    path = Path(data.source)
    if not data.source.endswith(LOCAL_SUFFIXES):
        return Source(data.source, "row", _numbered(_hub_rows(data)))
    if not path.is_file():
        raise DataError(f"data.source: no file {path}; name a {', '.join(LOCAL_SUFFIXES)} file or a hub dataset")
    if data.source.endswith((".jsonl", ".jsonl.gz")):
        return Source(data.source, "line", _json_lines(path))
    if data.source.endswith((".json", ".json.gz")):
        return Source(data.source, "row", _numbered(_json_array(path)))
    if data.source.endswith(".csv"):
        return Source(data.source, "line", _csv_rows(path))
    return Source(data.source, "row", _numbered(_arrow_rows(_parquet(path), str(path))))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((number, dict(row)) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                text = _utf8(line.lstrip("\ufeff"), f"{path}:{number}")
                if text.strip():
                    yield number, _object(_json(text, f"{path}:{number}"), f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from None


def _json_array(path: Path) -> list[dict[str, Any]]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    text = _utf8(content.decode("utf-8-sig", errors="surrogateescape"), str(path))
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds no JSON array of objects; one object a line belongs in a .jsonl file")
    return [_object(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every cell as the text it is: a number, "None" or "NA" is an answer like any other."""
    csv.field_size_limit(sys.maxsize)
    number = 1
    names: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                place = f"{path}:{number}"
                if not names:
                    names = [_utf8(name, place) for name in cells]
                    if len(set(names)) < len(names):
                        raise DataError(f"{place}: two columns have the same name; rename one")
                elif len(cells) not in (0, len(names)):
                    raise DataError(f"{place}: has {len(cells)} cells and the header {len(names)}; correct the line")
                elif cells:
                    yield number, dict(zip(names, (_utf8(cell, place) for cell in cells), strict=True))
                number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{number}: not CSV: {error}; correct the line, a quote inside a cell is doubled"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text.rstrip() else ""
        what = (
            "one object a line belongs in a .jsonl file" if error.msg == "Extra data" and line else "correct the line"
        )
        raise DataError(f"{place}{line}: not JSON: {error.msg} at column {error.colno}; {what}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list in a list a thousand times
        raise DataError(f"{place}: cannot be read as JSON: {error}; correct it") from None


def _utf8(text: str, place: str) -> str:
    """Text of a file decoded with `surrogateescape`, which keeps what is no UTF-8 until its line is known."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lines = text[: error.start].count("\n")
        raise DataError(
            f"{place}{f':{lines + 1}' if lines else ''}: is not UTF-8 text; save the file as UTF-8"
        ) from None
    return text


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is no JSON object; each row is one object with named fields")
    return value


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(path).iter_batches(batch_size=_BATCH)


def _arrow_rows(batches: Iterable[Any], place: str) -> Iterator[dict[str, Any]]:
    """Rows of Arrow data as Python values; images stay bytes."""
    read = 0
    try:
        for batch in batches:
            rows = batch.to_pylist()
            read += len(rows)
            yield from rows
    except (pa.ArrowException, OSError, ValueError, TypeError, ImportError) as error:
        raise DataError(f"{place}: cannot be read after row {read}: {_line(error)}") from None


def _hub_rows(data: DataSection) -> Iterator[dict[str, Any]]:
    where = f"config {data.config}, data_dir {data.data_dir}, split {data.split}"
    place = f"data.source: hub dataset {data.source!r}"
    wanted = {"name": data.config, "data_dir": data.data_dir, "split": data.split}
    try:
        rows = datasets.load_dataset(data.source, **wanted)
        if rows.info.builder_name == "csv":  # its reader makes numbers and missing values of text
            text = datasets.Features({name: datasets.Value("string") for name in rows.column_names})
            rows = datasets.load_dataset(data.source, **wanted, features=text, keep_default_na=False)
    except RuntimeError as error:  # "Dataset scripts are no longer supported, but found ...": `datasets` 5 runs none
        raise DataError(
            f"{place} cannot be loaded: {_line(error)}; name one that holds its rows as files (parquet, JSON, CSV), or "
            "a local file of them"
        ) from None
    except Exception as error:  # of the hub, of `datasets`, or of the library behind a kind of file
        raise DataError(f"{place} ({where}) cannot be loaded: {_line(error)}") from None
    return _arrow_rows(rows.with_format("arrow").iter(_BATCH), place)


def _line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())
