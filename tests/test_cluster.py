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


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


kuberay = pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])


@kuberay
def test_kuberay_is_secure_and_spares_the_head(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["learner", "rollout"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert [volume["emptyDir"]["medium"] for volume in pod["volumes"] if volume["name"] == "shm"] == ["Memory"]
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
            assert "env" not in container, "keys come from a Secret"


@kuberay
def test_versions_agree(name: str) -> None:
    spec = cluster_spec(name)
    assert f"ray=={spec['rayVersion']}" in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    package = re.search(r'__version__ = "(.+)"', (ROOT / "r3hf_ray" / "__init__.py").read_text())
    assert package is not None
    images = set(re.findall(r"image: (\S+)", (CLUSTER / name).read_text()))
    assert images == {f"r3hf_ray:{package[1]}"}


def test_the_job_runs_on_the_same_cluster() -> None:
    assert cluster_spec("kuberay/rayjob.yaml") == cluster_spec("kuberay/raycluster.yaml")


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


@pytest.mark.parametrize("path", sorted(p for p in CLUSTER.rglob("*") if p.is_file()), ids=lambda path: path.name)
def test_no_insecure_setting(path: Path) -> None:
    text = path.read_text()
    forbidden = ["0.0.0.0", "INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE", "trust_remote_code", "privileged: true"]
    assert not [word for word in forbidden if word in text]
    assert not re.search(r"(hf_|sk-)[A-Za-z0-9]{20,}", text), "a key"
