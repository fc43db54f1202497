"""The ledger on disk: `ledger/step_000003_00.parquet`, one immutable file a step and attempt (floor 4)."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r3hf_ray.actors.ledger import COLUMNS, StepLedger
from r3hf_ray.errors import ConfigError

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("dispatch", pa.int32(), nullable=False),  # how often it had been dispatched before
        pa.field("state", pa.int8(), nullable=False),  # actors.ledger.State
        pa.field("version", pa.int32(), nullable=False),  # policy's; of a trained sample the learner's; -1: none
        pa.field("at", pa.float64(), nullable=False),  # unix seconds
    ]
)
FACTS = b"r3hf"
"""Key of a file's facts among its metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFile:
    """A step's ledger as it was read, and what its file says of the samplers' loads since the one before."""

    ledger: StepLedger
    loads: list[dict[str, Any]]
    """One for each load: member, version, matched, gap, bound; `matched` and `gap` are null where not measured."""


def write_ledger(run_folder: Path, ledger: StepLedger, loads: Sequence[dict[str, Any]]) -> Path:
    """Write a step's file, whole or not at all, and return its path; a file of the same name is kept as it is."""
    folder = run_folder / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{ledger.step:06d}_{ledger.attempt:02d}.parquet"
    if path.exists():
        return path
    facts = {"step": ledger.step, "attempt": ledger.attempt, "began_at": ledger.began_at, "loads": list(loads)}
    table = pa.table(
        [pa.array(ledger.columns[field.name], type=field.type) for field in SCHEMA],
        schema=SCHEMA.with_metadata({FACTS: json.dumps(facts).encode()}),
    )
    temporary = path.with_suffix(".parquet.tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
    return path


def read_ledger(run_folder: Path) -> list[LedgerFile]:
    """Every file of a run, by step and attempt.

    Raises:
        ConfigError: a file is damaged.
    """
    found = []
    for path in sorted((run_folder / "ledger").glob("step_*.parquet")):
        try:
            table = pq.read_table(path, schema=None)
            facts = json.loads(table.schema.metadata[FACTS])
            columns = {name: table[name].to_numpy() for name in COLUMNS}
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); restore it, or verify another run") from None
        ledger = StepLedger(step=facts["step"], attempt=facts["attempt"], began_at=facts["began_at"], columns=columns)
        found.append(LedgerFile(ledger=ledger, loads=facts["loads"]))
    return found


def surviving(files: Sequence[LedgerFile]) -> list[LedgerFile]:
    """The line of steps that the model's weights come from: what no later attempt has taken back."""
    began = {file.ledger.attempt: file.ledger.began_at for file in files}
    kept = [
        file
        for file in files
        if all(at >= file.ledger.step for attempt, at in began.items() if attempt > file.ledger.attempt)
    ]
    return sorted(kept, key=lambda file: file.ledger.step)
