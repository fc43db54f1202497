"""Rows of a data source with their numbers: a local file or a hub dataset (layer 4)."""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from r3hf_ray.errors import DataError
from r3hf_ray.sections.data import DataSection

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one source, in order.

    Example: ``Source(name="pairs.jsonl", unit="line", rows=iter([(1, {"chosen": ..., "rejected": ...}), ...]))``
    """

    name: str
    unit: str
    """What a row's number counts from 1: ``line`` of a JSON Lines file, else ``row``."""
    rows: Iterator[tuple[int, dict[str, Any]]]


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
    return Source(data.source, "row", _numbered(_table(path)))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((number, dict(row)) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(json.loads(line), f"{path}:{number}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}; correct the line") from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read: {error}") from None


def _json_array(path: Path) -> list[dict[str, Any]]:
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg}; one object a line belongs in a .jsonl file"
        ) from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds no JSON array of objects; one object a line belongs in a .jsonl file")
    return [_object(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is no JSON object; each row is one object with named fields")
    return value


def _table(path: Path) -> datasets.Dataset:
    read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_csv
    try:
        return read(str(path))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read: {' '.join(str(cause).split())}") from None


def _hub_rows(data: DataSection) -> datasets.Dataset:
    try:
        return datasets.load_dataset(data.source, name=data.config, data_dir=data.data_dir, split=data.split)
    except RuntimeError as error:  # "Dataset scripts are no longer supported, but found ...": `datasets` 5 runs none
        raise DataError(
            f"data.source: hub dataset {data.source!r} cannot be loaded: {' '.join(str(error).split())}; name one that "
            "holds its rows as files (parquet, JSON, CSV), or a local file of them"
        ) from None
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        OSError,
        ValueError,
    ) as error:
        raise DataError(
            f"data.source: hub dataset {data.source!r} (config {data.config}, data_dir {data.data_dir}, split "
            f"{data.split}) cannot be loaded: {' '.join(str(error).split())}"
        ) from None
