"""JSON Lines files that survive a crash: one object a line, appended at once, mended when opened again (floor 4)."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from r3hf_ray.errors import ConfigError

TIME = "time"


class JsonlLog:
    """An append-only file of JSON objects, one a line, safe against a crash.

    Each row is one write and reaches the operating system at once. A line torn by a crash is repaired when the
    file is opened again, so rows of a resumed run never stick to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append a row, with the time in unix seconds if it has none, and return the row as a reader will see it.

        A number that is not finite becomes null: NaN is not JSON.
        """
        seen: dict[str, Any] = plain({TIME: time.time()} | dict(row))
        self._file.write((json.dumps(seen, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return seen

    def close(self) -> None:
        """Close the file; further writes raise ValueError."""
        self._file.close()

    def __enter__(self) -> "JsonlLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file written by `JsonlLog`; a torn last line is left out, a missing file has no rows.

    Raises:
        ConfigError: a line before the last is not a JSON object; it names the file and the line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None and number < len(lines):
            raise ConfigError(f"{path}:{number}: is no JSON object; remove the line or restore the file")
        if row is not None:
            rows.append(row)
    return rows


def plain(value: Any, number: Callable[[float], float] = float) -> Any:
    """What JSON can say of a value: a dataclass as an object, null for a number that is not finite, else its text.

    Args:
        value: of any kind.
        number: applied to each float, such as a rounding.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, number) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend_torn_line(path: Path) -> None:
    """End the file with a newline: a last line that is whole is completed, one that is torn is cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return
    with path.open("r+b") as file:
        if _parse(tail) is None:
            file.truncate(len(content) - len(tail))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
