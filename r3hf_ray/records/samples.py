"""Per-token samples of a step on disk: `samples/step_000010.parquet`, one row a response token."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # 0-based in the response
        pa.field("token_id", pa.int64(), nullable=False),
        pa.field("token", pa.string(), nullable=False),  # decoded text
        pa.field("prompt", pa.string(), nullable=False),  # the same on every row of a response
        pa.field("reward", pa.float64()),  # scaled, without the KL penalty
        pa.field("kl", pa.float64()),  # old - ref logprob [nats]
        pa.field("value", pa.float64()),  # V before the token [scaled reward]
        pa.field("advantage", pa.float64()),  # before whitening [scaled reward]
        pa.field("prefix_score", pa.float64()),  # R(x, y_<=t) after the token [reward model's units]
        pa.field("logprob", pa.float64()),  # old logprob [nats]
        pa.field("score", pa.float64()),  # R(x, y) of the response [reward model's units]
        pa.field("prompt_score", pa.float64()),  # R(x, empty) of the prompt alone [reward model's units]
        pa.field("gold", pa.float64()),  # an independent judge's score, null without one
        pa.field("gold_credit", pa.float64()),  # what the token is truly worth, null where it is not known
        pa.field("finish", pa.string(), nullable=False),  # eos | length
    ]
)
"""Columns of a dump. A float that is not finite is kept as it is; what an older dump lacks is null."""
MAY_BE_MISSING = ("gold", "gold_credit")
"""Of a row to be written."""
PART = "reward/"
"""Start of the names of further columns: each model's part of the reward, where a run sums several."""


def write_samples(run_folder: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the dump of one step and return its path; a dump of the same step is replaced.

    The file appears whole or not at all, so a reader beside a running job never sees half of it.

    Raises:
        KeyError: a row lacks a column that is not one of `MAY_BE_MISSING`.
    """
    rows = list(rows)
    parts = [name for name in (rows[0] if rows else ()) if name.startswith(PART)]
    names = [name for name in SCHEMA.names if name not in ("step", *MAY_BE_MISSING)] + parts
    given = [{name: row.get(name) for name in MAY_BE_MISSING} | {name: row[name] for name in names} for row in rows]
    table = pa.Table.from_pylist(
        [{"step": step} | row for row in given],
        schema=pa.schema([*SCHEMA, *(pa.field(name, pa.float64()) for name in parts)]),
    )
    folder = run_folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.parquet"
    temporary = path.with_suffix(".parquet.tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
    return path


def sample_steps(run_folder: Path) -> list[int]:
    """Steps that have a dump, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_folder / "samples").glob("step_*.parquet"))


def read_samples(run_folder: Path, step: int) -> list[list[dict[str, Any]]]:
    """The dump of a step: one list of token rows for each response, in the order written, tokens in order."""
    path = run_folder / "samples" / f"step_{step:06d}.parquet"
    table = pq.read_table(path, schema=pa.unify_schemas([SCHEMA, pq.read_schema(path)]))
    responses: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        responses.setdefault((row["prompt_id"], row["sample"]), []).append(row)
    return [sorted(tokens, key=lambda row: row["position"]) for tokens in responses.values()]
