"""cluster/ as text: nothing insecure is switched on, no key is written down, every start of Ray asks for the token."""

import re
import subprocess
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
FORBIDDEN = (
    *("0.0.0.0", "INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE", "trust_remote_code", "privileged: true"),
    *("hostNetwork", "hostPath", "10001:", "RAY_AUTH_MODE=disabled", "StrictHostKeyChecking=no"),
)
KEY = re.compile(r"\b(hf_|sk-|AKIA|ghp_)[A-Za-z0-9]{16,}|\b[0-9a-f]{40,}\b")

files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))


def findings(text: str) -> list[str]:
    return [word for word in FORBIDDEN if word in text] + [found[0] for found in KEY.finditer(text)]


@files
def test_no_insecure_setting_and_no_key(path: Path) -> None:
    assert findings(path.read_text()) == []


@pytest.mark.parametrize("text", ["--dashboard-host=0.0.0.0", "HF_TOKEN=hf_" + "a" * 20, "token: " + "0f" * 32])
def test_each_can_be_found(text: str) -> None:
    assert len(findings(text)) == 1


@pytest.mark.parametrize(
    "path", [path for path in FILES if "ray start" in path.read_text()], ids=lambda path: path.name
)
def test_whoever_starts_ray_asks_for_the_token(path: Path) -> None:
    text = path.read_text()
    assert "RAY_AUTH_MODE=token" in text and "RAY_AUTH_TOKEN_PATH=" in text
    assert "--dashboard-host=127.0.0.1" in text


@pytest.mark.parametrize("path", [p for p in FILES if p.read_text().startswith("#!/bin/bash")], ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_the_first_error(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in path.read_text()


SUBMITTED = [
    ("r3hf_ray/models/load.py", True),
    ("jobs/tldr.toml", True),
    ("pyproject.toml", True),
    ("models/smollm2/model.safetensors", False),
    ("runs/x/metrics.jsonl", False),
    ("keys.env", False),
    (".env", False),
    ("jobs/.env", False),
    ("id.pem", False),
    (".ray_token_7", False),
]


@pytest.mark.parametrize(("path", "sent"), SUBMITTED)
def test_what_a_submitted_working_folder_takes_along(path: str, sent: bool) -> None:
    leave_out = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    assert any(rule(ROOT / path) for rule in leave_out) is not sent
