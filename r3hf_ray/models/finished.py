"""Whether a model folder holds what a command promises: a configuration, whole weights, and a tokenizer that reads."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from r3hf_ray.errors import ModelError, RunFailed
from r3hf_ray.models.folder import load_tokenizer

WEIGHTS = "model.safetensors"


def require_finished(folder: Path) -> None:
    """Refuse to call a command done whose model could not be loaded; nothing is read but names and sizes of weights.

    Raises:
        RunFailed: something is missing, torn or unreadable; it names the file.
    """
    if missing := what_is_missing(folder):
        raise RunFailed(f"{folder}: no complete model: {missing}; start the command again (with --resume to go on)")


def what_is_missing(folder: Path) -> str:
    """The first thing that keeps a model folder from being loaded; empty where nothing does."""
    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return f"config.json cannot be read ({str(error).strip().splitlines()[0]})"
    try:
        shards = _shards(folder)
        held = sum(len(_names(shard)) for shard in shards)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"its weights cannot be read ({str(error).strip().splitlines()[0]})"
    if not held:
        return f"{WEIGHTS} holds no weights"
    try:
        load_tokenizer(folder)
    except ModelError as error:
        return f"its tokenizer cannot be read ({error})"
    return ""


def _shards(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _names(shard: Path) -> list[str]:
    """Opening it compares the header with the length of the file."""
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())
