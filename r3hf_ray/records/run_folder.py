"""A run's folder: made once, refused if it is there already, with the settings it was started with (layer 4)."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from r3hf_ray.errors import ConfigError
from r3hf_ray.records.lease import LIVE
from r3hf_ray.records.metrics import next_attempt
from r3hf_ray.sections.runs import RunSection
from r3hf_ray.settings import Command, load

PPO_MAY_CHANGE = frozenset(
    {
        "run.folder",
        "run.cpus",
        "run.wait_for_nodes",
        "run.patience",
        "run.max_restarts",
        "run.save_within",
        "ppo.steps",
        "tracking",
        "evaluation",
        "reward.gold_credit",
        *(f"rollout.{name}" for name in ("actors", "cpus_per_actor", "gpus_per_actor", "threads")),
        *(f"rollout.{name}" for name in ("kv_cache_gb", "gpu_memory_utilization", "engine_args")),
        *(f"reward.{name}" for name in ("actors", "cpus_per_actor", "gpus_per_actor", "threads")),
        *(f"learner.{name}" for name in ("ranks", "cpus_per_rank", "gpus_per_rank", "threads")),
        *(f"learner.{name}" for name in ("checkpoint_every", "keep_checkpoints", "max_failures")),
    }
)
"""Fields, and whole sections, of `r3hf ppo` that a resumed run may change: how long and where it runs, not what it
computes."""

STAGE_MAY_CHANGE = frozenset({"run.name", "run.folder", "run.cpus", "trainer", "tracking"})
"""The same of `r3hf sft` and `r3hf reward`, whose batches are those of all ranks: what the run is called, where it is
and on what it runs. The seed is no part of that."""

STAGE_MAY_MOVE = frozenset({"model.base", "data.source"})
"""What these two read, which a folder of runs that is copied as a whole takes along."""


def check_run(
    config: Command,
    run: RunSection,
    *,
    resume: bool,
    may_change: Collection[str] | None = None,
    may_move: Collection[str] = (),
) -> Path:
    """Whether `run.folder/run.name` can take this run; nothing is written. Returns its absolute path.

    Args:
        config: of the run.
        run: its section of that name.
        resume: whether an existing folder is to be continued.
        may_change: fields (`ppo.steps`) and sections (`tracking`) in which a resumed run may differ from its own
            `config.toml`; None: all of them.
        may_move: fields that name a file or folder, in which it may differ as far as the place is still the same, on
            disk or as seen from `run.folder`.

    Raises:
        ConfigError: the folder exists and `resume` was not asked for: two runs in one folder would mix their records,
            and Ray Train would quietly take up the old run's checkpoint. Or the resumed run would be another one.
    """
    folder = (run.folder / run.name).resolve()
    # A driver that only waited for nodes has left no more than its lease.
    begun = folder.exists() and any(LIVE not in path.name for path in folder.iterdir())
    if begun and not resume:
        raise ConfigError(f"run.name: {run.folder / run.name} exists; use another name or continue it with --resume")
    if begun and may_change is not None:
        _require_same(config, folder, may_change, may_move)
    return folder


def open_run(config: Command, run: RunSection, *, resume: bool) -> tuple[Path, int]:
    """Make `run.folder/run.name`, write `config.toml` in it, and return its absolute path and this attempt's number.

    Raises:
        ConfigError: as `check_run`, or the folder cannot be written.
    """
    folder = check_run(config, run, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(config))
    except OSError as error:
        raise ConfigError(f"run.folder: {folder} cannot be written: {error.strerror}") from None
    return folder, next_attempt(folder)


def to_toml(config: Command) -> str:
    r"""A configuration as a TOML file that `config.load` reads back to an equal one.

    Example: ``[run]\nname = "toy"\nfolder = "runs"\nseed = 0\n``
    """
    sections = config.model_dump(mode="json", exclude_none=True)
    return "\n".join(
        "\n".join([f"[{section}]", *(f"{name} = {_value(value)}" for name, value in fields.items())]) + "\n"
        for section, fields in sections.items()
    )


def _require_same(config: Command, folder: Path, may_change: Collection[str], may_move: Collection[str]) -> None:
    old, new = load(type(config), folder / "config.toml", []).model_dump(), config.model_dump()
    for section, fields in new.items():
        for name, value in fields.items():
            was, field = old[section][name], f"{section}.{name}"
            if was == value or {section, field} & set(may_change):
                continue
            if field in may_move and _same_place((was, old["run"]["folder"]), (value, new["run"]["folder"])):
                continue
            raise ConfigError(
                f"{field}: the run in {folder} was started with {was!r} and cannot go on with {value!r}; set it "
                "back, take another run.name, or remove the folder"
            )


def _same_place(old: tuple[str, Path], new: tuple[str, Path]) -> bool:
    """Of two (path, run.folder): whether the paths are one, or each lies alike beside its folder."""
    (was, was_beside), (path, beside) = ((Path(place).resolve(), folder.resolve()) for place, folder in (old, new))
    return was == path or os.path.relpath(was, was_beside) == os.path.relpath(path, beside)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(name))} = {_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
