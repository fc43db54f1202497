"""A run's folder: made once, refused if it is there already, with the settings it was started with (layer 4)."""

import json
from pathlib import Path
from typing import Any

from r3hf_ray.config import Command, ConfigError, RunSection
from r3hf_ray.tracking.metrics import next_attempt


def open_run(config: Command, run: RunSection, *, resume: bool) -> tuple[Path, int]:
    """Make `run.folder/run.name`, write `config.toml` in it, and return its absolute path and this attempt's number.

    Raises:
        ConfigError: the folder exists and `resume` was not asked for: two runs in one folder would mix their records,
            and Ray Train would quietly take up the old run's checkpoint.
    """
    folder = (run.folder / run.name).resolve()
    if folder.exists() and not resume:
        raise ConfigError(f"run.name: {run.folder / run.name} exists; use another name or continue it with --resume")
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


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(name))} = {_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
