"""cluster/local: several nodes on this machine in one command, behind a token, and nothing of them left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "local" / "nodes.sh"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}

COMMAND = """
import json, os, subprocess, sys
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
stranger = {n: v for n, v in os.environ.items() if n != "RAY_AUTH_TOKEN_PATH"} | {"RAY_AUTH_TOKEN": "0" * 64}
knock = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False, logging_level='ERROR')"]
print(json.dumps({
    "cpus": sorted(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]),
    "folder": os.path.dirname(os.environ["RAY_AUTH_TOKEN_PATH"]),
    "mode": oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777),
    "stranger": subprocess.run(knock, env=stranger, capture_output=True, timeout=120).returncode,
}))
sys.exit(3)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_join_behind_a_token_and_end_with_the_command() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), sys.executable, "-c", COMMAND],
        env=ENVIRONMENT | {"WORKERS": "2", "CPUS": "1", "PORT": "23100"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 3, f"the command's own exit code: {done.stderr[-2000:]}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cpus"] == [0.0, 1.0, 1.0], "a head without CPUs and two workers"
    assert said["mode"] == "0o600" and said["stranger"] != 0
    assert not Path(said["folder"]).exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in commands if said["folder"].encode() in line], "a process is left"


def test_a_node_that_cannot_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "ray").write_text('#!/bin/bash\n[ "$1" != start ] || echo "no room" ; exit 1\n')
    (tmp_path / "ray").chmod(0o700)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", str(SCRIPT), "true"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no room" in done.stderr
