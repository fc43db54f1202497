"""A model folder is finished when configuration, every shard of the weights and the tokenizer can be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r3hf_ray.errors import RunFailed
from r3hf_ray.models.finished import WEIGHTS, require_finished, what_is_missing


@pytest.fixture
def folder(tiny_models: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.policy, tmp_path / "model"))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def in_shards(folder: Path) -> None:
    """The same weights under the name of a shard, and a second one that was never written."""
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_a_whole_folder_is_finished(folder: Path) -> None:
    require_finished(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "weights"),
        (lambda folder: torn(folder / WEIGHTS), "weights"),
        (in_shards, "weights"),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "weights"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
    ],
    ids=["no folder", "torn config", "no weights", "torn weights", "a shard is missing", "torn index", "no tokenizer"],
)
def test_an_unfinished_folder_is_named(folder: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(folder)
    assert words in what_is_missing(folder)
    with pytest.raises(RunFailed, match="no complete model") as caught:
        require_finished(folder)
    assert "\n" not in str(caught.value)
