"""cluster/kuberay: every overlay renders to what Kubernetes and KubeRay take, is secure, and fits the job it starts."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from made.kuberay_rules import Document, cluster_of, faults, groups_of, quantity

from r3hf_ray import __version__
from r3hf_ray.config import PPOConfig
from r3hf_ray.settings import load

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
JOBS = ["cpu-smoke", "gpu", "spot"]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl to render the overlays with")
overlays = pytest.mark.parametrize("overlay", OVERLAYS)
jobs = pytest.mark.parametrize("overlay", JOBS)


@cache
def _rendered(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str) -> list[Document]:
    return list(yaml.safe_load_all(_rendered(overlay)))


def of_kind(documents: list[Document], kind: str) -> Document:
    [found] = [document for document in documents if document["kind"] == kind]
    return found


def job_of(overlay: str) -> tuple[Document, dict[str, Any]]:
    job = of_kind(render(overlay), "RayJob")
    return job, job["spec"]["rayClusterSpec"]


@overlays
def test_an_overlay_renders_to_what_is_taken(overlay: str) -> None:
    documents = render(overlay)
    assert faults(documents) == []
    kinds = {document["kind"] for document in documents}
    assert ("RayJob" if overlay in JOBS else "RayCluster") in kinds
    assert len(kinds & {"RayJob", "RayCluster"}) == 1, "a job brings its own cluster"


def test_there_is_an_overlay_for_each_way() -> None:
    assert set(OVERLAYS) == {*JOBS, "cluster", "cluster-fault-tolerant"}


@overlays
def test_versions_agree_with_locks_and_package(overlay: str) -> None:
    documents = render(overlay)
    spec = next(cluster_of(d) for d in documents if d["kind"] in ("RayJob", "RayCluster"))
    for lock in sorted((ROOT / "requirements").iterdir()):
        assert f"ray=={spec['rayVersion']}" in lock.read_text().splitlines(), lock.name
    flavour = "cpu" if overlay == "cpu-smoke" else "gpu"
    assert set(re.findall(r"image: (\S+)", _rendered(overlay))) == {f"r3hf_ray:{__version__}-{flavour}"}


@overlays
def test_alpha_fields_are_in_their_own_overlay_only(overlay: str) -> None:
    spec = next(cluster_of(d) for d in render(overlay) if d["kind"] in ("RayJob", "RayCluster"))
    alpha = {"networkPolicy", "gcsFaultToleranceOptions"} & spec.keys()
    assert len(alpha) == (2 if overlay == "cluster-fault-tolerant" else 0), "an operator without the gates refuses them"


@jobs
def test_the_job_is_in_the_image_and_resumes_into_the_volume(overlay: str) -> None:
    job, spec = job_of(overlay)
    program, command, path, *rest = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("r3hf", "ppo")
    assert path.startswith("/app/jobs/") and (ROOT / path.removeprefix("/app/")).is_file()
    assert rest == ["--resume", "--run.folder", "/runs"]
    for _, pod in groups_of(spec):
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert "/runs" in mounts


@jobs
def test_the_job_needs_nothing_made_first(overlay: str) -> None:
    config = load(PPOConfig, ROOT / "jobs" / Path(shlex.split(job_of(overlay)[0]["spec"]["entrypoint"])[2]).name, [])
    names = [config.model.policy, config.model.reward_model, config.data.source]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names) and not (ROOT / names[0]).exists()
    assert not any(name.startswith(("runs/", "models/", "data/")) for name in names)


@jobs
def test_wherever_actors_land_the_rest_still_fits(overlay: str) -> None:
    """They are placed by CPUs and GPUs alone, so one of them must take a whole pod, or one GPU of a pod."""
    job, spec = job_of(overlay)
    config = load(PPOConfig, ROOT / "jobs" / Path(shlex.split(job["spec"]["entrypoint"])[2]).name, [])
    asked = [(config.learner.ranks, config.learner.cpus_per_rank, config.learner.gpus_per_rank)]
    asked += [(s.actors, s.cpus_per_actor, s.gpus_per_actor) for s in (config.rollout, config.reward)]
    total, cpus, gpus = sum(count for count, _, _ in asked), asked[0][1], asked[0][2]
    assert {one[1:] for one in asked} == {(cpus, gpus)}
    places = 0
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        pod_cpus, pod_gpus = quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", 0))
        per_pod = pod_gpus / gpus if gpus else pod_cpus / cpus
        assert per_pod == int(per_pod) and per_pod * cpus <= pod_cpus
        places += int(per_pod) * group["minReplicas"]
    assert places == total, "r3hf refuses a cluster that has not all it asks for when it starts"


def test_spot_takes_samplers_and_scorers_only() -> None:
    groups = {group["groupName"]: group for group in job_of("spot")[1]["workerGroupSpecs"]}
    market = {name: group["labels"]["ray.io/market-type"] for name, group in groups.items()}
    assert market == {"learner": "on-demand", "rollout": "spot", "reward": "spot"}
    for name, group in groups.items():
        pod = group["template"]["spec"]
        assert pod["nodeSelector"]["karpenter.sh/capacity-type"] == market[name]
        keys = {toleration["key"] for toleration in pod["tolerations"]}
        assert ("cloud.google.com/gke-spot" in keys) == (name != "learner")


def test_the_image_has_what_kuberay_calls() -> None:
    packages = (ROOT / "cluster" / "image" / "Dockerfile").read_text()
    assert "wget" in packages, "its probes"
    assert "slim-bookworm" in packages, "bash, its start command"


def worker(documents: list[Document], index: int = 1) -> dict[str, Any]:
    spec = of_kind(documents, "RayJob")["spec"]["rayClusterSpec"]
    return spec["workerGroupSpecs"][index]


def container(documents: list[Document]) -> dict[str, Any]:
    return worker(documents)["template"]["spec"]["containers"][0]


def job(documents: list[Document]) -> dict[str, Any]:
    return of_kind(documents, "RayJob")["spec"]


def small_shm(documents: list[Document]) -> None:
    pod = worker(documents)["template"]["spec"]
    pod["volumes"] = [*pod["volumes"], {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}]
    pod["containers"][0]["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})


def budget(documents: list[Document]) -> dict[str, Any]:
    return next(document for document in documents if document["metadata"]["name"] == "r3hf-learner")["spec"]


MISTAKES: dict[str, tuple[Callable[[list[Document]], Any], str]] = {
    "a misspelt field": (lambda d: job(d)["rayClusterSpec"].update(authOption={}), "authOption"),
    "replicas in quotes": (lambda d: worker(d).update(minReplicas="1"), "minReplicas"),
    "a wrong key in a container": (lambda d: container(d).update(img="x"), "img"),
    "a number for num-cpus": (lambda d: worker(d).update(rayStartParams={"num-cpus": 4}), "num-cpus"),
    "an unknown backend": (
        lambda d: job(d)["rayClusterSpec"].update(gcsFaultToleranceOptions={"backend": "etcd"}),
        "etcd",
    ),
    "a group taken away": (lambda d: job(d)["rayClusterSpec"]["workerGroupSpecs"].pop(1), "groups"),
    "a head with CPUs": (lambda d: job(d)["rayClusterSpec"]["headGroupSpec"].update(rayStartParams={}), "head"),
    "no authentication": (lambda d: job(d)["rayClusterSpec"].pop("authOptions"), "token"),
    "a Ray too old for it": (lambda d: job(d)["rayClusterSpec"].update(rayVersion="2.51.0"), "2.52"),
    "the old autoscaler": (lambda d: job(d)["rayClusterSpec"]["autoscalerOptions"].update(version="v1"), "v2"),
    "more replicas than the most": (lambda d: worker(d).update(replicas=99), "maxReplicas"),
    "a label's value": (lambda d: worker(d)["labels"].update({"ray.io/market-type": "spot nodes"}), "spot nodes"),
    "labels twice": (lambda d: worker(d).update(rayStartParams={"labels": "a=b"}), "rayStartParams"),
    "a retry that is refused": (lambda d: job(d).update(entrypoint="r3hf ppo x.toml"), "--resume"),
    "a TTL without shutdown": (lambda d: job(d).update(shutdownAfterJobFinishes=False), "ttlSeconds"),
    "two ways to delete": (
        lambda d: job(d).update(deletionStrategy={"onFailure": {"policy": "DeleteCluster"}}),
        "deletionStrategy",
    ),
    "another's cluster with retries": (
        lambda d: job(d).update(clusterSelector={"ray.io/cluster": "other"}),
        "clusterSelector",
    ),
    "an unknown manager": (lambda d: job(d).update(managedBy="me"), "managedBy"),
    "a negative limit": (lambda d: job(d).update(backoffLimit=-1), "backoffLimit"),
    "a pod as root": (
        lambda d: worker(d)["template"]["spec"].update(securityContext={"runAsUser": 0}),
        "root",
    ),
    "a restart policy": (lambda d: worker(d)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy"),
    "capabilities": (lambda d: container(d).update(securityContext={}), "capabilities"),
    "a key in the manifest": (
        lambda d: container(d).update(env=[{"name": "HF_TOKEN", "value": "hf_x"}]),
        "Secret",
    ),
    "no CPU limit": (lambda d: container(d)["resources"]["limits"].pop("cpu"), "cpu is not the same"),
    "no ephemeral storage": (
        lambda d: [container(d)["resources"][part].pop("ephemeral-storage") for part in ("requests", "limits")],
        "ephemeral-storage",
    ),
    "more asked than allowed": (lambda d: container(d)["resources"]["requests"].update(memory="999Gi"), "memory"),
    "a /dev/shm below the default": (small_shm, "/dev/shm"),
    "a mount of no volume": (lambda d: worker(d)["template"]["spec"].update(volumes=[]), "no volume"),
    "a claim that is not there": (
        lambda d: of_kind(d, "PersistentVolumeClaim")["metadata"].update(name="other"),
        "no claim",
    ),
    "a budget nobody honours": (lambda d: budget(d).update(minAvailable="50%"), "minAvailable"),
    "a budget of no pod": (lambda d: budget(d).update(selector={"matchLabels": {"a": "b"}}), "protects"),
    "a pod the policy leaves out": (lambda d: worker(d)["template"]["metadata"].update(labels={}), "leaves a pod out"),
    "an open door": (lambda d: of_kind(d, "NetworkPolicy")["spec"]["ingress"].append({}), "anybody"),
    "no policy at all": (lambda d: d.remove(of_kind(d, "NetworkPolicy")), "who may reach"),
    "a name too long": (lambda d: of_kind(d, "RayJob")["metadata"].update(name="r" * 48), "rrr"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    plant, expected = MISTAKES[mistake]
    documents = copy.deepcopy(render("spot"))
    plant(documents)
    found = faults(documents)
    assert any(expected in fault for fault in found), found
