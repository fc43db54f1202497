"""Manifests in cluster/: they parse, agree with the lock and with each other, and are secure by default."""

import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_launcher_matches_rays_schema() -> None:
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    config = manifest("launcher/onprem.yaml")
    jsonschema.validate(config, schema)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [line for line in commands if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


def test_slurm_script_parses() -> None:
    done = subprocess.run(["bash", "-n", str(CLUSTER / "slurm" / "r3hf.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", sorted(p for p in CLUSTER.rglob("*") if p.is_file()), ids=lambda path: str(path.relative_to(CLUSTER))
)
def test_no_insecure_setting(path: Path) -> None:
    text = path.read_text()
    forbidden = ["0.0.0.0", "INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE", "trust_remote_code", "privileged: true"]
    assert not [word for word in forbidden if word in text]
    assert not re.search(r"(hf_|sk-)[A-Za-z0-9]{20,}", text), "a key"
