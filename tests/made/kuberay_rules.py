"""What Kubernetes and KubeRay refuse, or take and then do wrong: KubeRay's schemas, and by hand what they cannot say.

The rules by hand are those of the CRDs' CEL expressions and of the operator's `ValidateRayClusterSpec` and
`ValidateRayJobSpec` as far as these manifests touch them, and this project's own: security, storage and budgets.
"""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from packaging.version import Version

Document = dict[str, Any]

SCHEMAS = Path(__file__).parents[1] / "cluster" / "schemas"
OPERATORS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 47
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | int) -> float:
    """`500m` is 0.5, `2Gi` is 2147483648."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def faults(documents: list[Document]) -> list[str]:
    """One sentence for each thing that is wrong with what one overlay renders to."""
    found = [fault for document in documents for fault in _schema(document)]
    if found:
        return found  # the rules below need the shape
    specs = [cluster_of(document) for document in documents if document["kind"] in ("RayCluster", "RayJob")]
    found += [fault for spec in specs for fault in _cluster(spec)]
    found += [fault for document in documents if document["kind"] == "RayJob" for fault in _job(document)]
    pods = [pod for spec in specs for _, pod in groups_of(spec)]
    pods += [d["spec"]["submitterPodTemplate"] for d in documents if "submitterPodTemplate" in d["spec"]]
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for pod in pods:
        found += [*_labels(pod["metadata"].get("labels", {})), *_pod(pod["spec"]), *_storage(pod["spec"], claims)]
    for document in documents:
        found += [*_names(document), *_budget(document, specs), *_network(document, pods)]
    if not any(d["kind"] == "NetworkPolicy" for d in documents) and not all("networkPolicy" in spec for spec in specs):
        found.append("nothing says who may reach the pods")
    return found


def cluster_of(document: Document) -> dict[str, Any]:
    """The spec of a RayCluster, or of the one in a RayJob."""
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups_of(spec: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each group with its pod template, the head first."""
    return [(group, group["template"]) for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


@cache
def _validator(kind: str) -> Any:
    return jsonschema.Draft202012Validator(json.loads(gzip.open(SCHEMAS / f"{kind.lower()}s.schema.json.gz").read()))


def _schema(document: Document) -> Iterator[str]:
    if document["apiVersion"].startswith("ray.io/"):
        for error in _validator(document["kind"]).iter_errors(document):
            yield f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def _names(document: Document) -> Iterator[str]:
    name = document["metadata"]["name"]
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        yield f"{name}: a name of small letters, digits and dashes, {LONGEST_NAME} at most"


def _labels(labels: dict[str, str]) -> Iterator[str]:
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield f"label {key}={value}: not the syntax of Kubernetes"


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    ray = Version(spec.get("rayVersion", "0"))
    if spec.get("authOptions") != {"mode": "token"} or ray < Version("2.52"):
        yield "token authentication is not on, or rayVersion is below 2.52, where it begins"
    if spec["autoscalerOptions"].get("version") != "v2" or ray < Version("2.10"):
        yield "autoscaler v2 is not asked for, or rayVersion is below 2.10, where it begins"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head offers CPUs to actors"
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    if names != ["learner", "rollout", "reward"]:
        yield f"groups {names}: an overlay's patch took one away, or moved it"
    for group in spec["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"
        if "labels" in group["rayStartParams"] or ("resources" in group and group["rayStartParams"]):
            yield f"{group['groupName']}: rayStartParams against labels or resources of the group"
        yield from _labels(group.get("labels", {}))
    backend = spec.get("gcsFaultToleranceOptions", {}).get("backend")
    if backend == "rocksdb" and "redisAddress" in spec["gcsFaultToleranceOptions"]:
        yield "gcsFaultToleranceOptions: Redis against rocksdb"
    if not spec["enableInTreeAutoscaling"]:
        yield "the rollout group never grows"


def _job(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if "deletionStrategy" in spec and spec.get("shutdownAfterJobFinishes"):
        yield "deletionStrategy against shutdownAfterJobFinishes"
    if "clusterSelector" in spec and (spec.get("backoffLimit") or spec.get("suspend") or "rayClusterSpec" in spec):
        yield "clusterSelector against backoffLimit, suspend or rayClusterSpec"
    if spec.get("managedBy", OPERATORS[0]) not in OPERATORS:
        yield f"managedBy: one of {OPERATORS}"
    if spec["backoffLimit"] < 0 or spec["activeDeadlineSeconds"] <= 0:
        yield "backoffLimit and activeDeadlineSeconds are positive"
    if spec["backoffLimit"] and "--resume" not in spec["entrypoint"].split():
        yield "backoffLimit without --resume: the second try finds the run's folder and is refused"


def _pod(pod: dict[str, Any]) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "a pod may run as root, or without a seccomp profile"
    if pod.get("restartPolicy", "Never") != "Never":
        yield "restartPolicy must be Never with autoscaler v2"
    for container in pod["containers"]:
        name, own = container["name"], container.get("securityContext", {})
        if own.get("capabilities") != {"drop": ["ALL"]} or own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: capabilities are not dropped"
        if any("value" in variable and "SECRET" not in variable for variable in container.get("env", [])):
            yield f"{name}: a value in env; keys come from a Secret, settings from the job"
        sizes = container["resources"]
        for kind, amount in sizes["requests"].items():
            if quantity(amount) > quantity(sizes["limits"].get(kind, amount)):
                yield f"{name}: requests more {kind} than its limit"
        if name.startswith("ray-") and name != "ray-job-submitter":
            yield from _ray_container(name, sizes)


def _ray_container(name: str, sizes: dict[str, dict[str, str]]) -> Iterator[str]:
    for kind in ("cpu", "memory", "ephemeral-storage"):
        if sizes["requests"].get(kind) != sizes["limits"].get(kind, ""):
            yield f"{name}: {kind} is not the same in requests and limits"


def _storage(pod: dict[str, Any], claims: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"volume {volume['name']}: no claim {claim} among the documents"
    for container in pod["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{container['name']}: mounts {mount['name']}, which is no volume"
            elif mount["mountPath"] == "/dev/shm":
                size = quantity(volumes[mount["name"]]["emptyDir"].get("sizeLimit", "0"))
                if size <= quantity(container["resources"]["limits"]["memory"]):
                    yield f"{container['name']}: a /dev/shm no larger than the one KubeRay gives"


def _budget(document: Document, specs: list[dict[str, Any]]) -> Iterator[str]:
    if document["kind"] != "PodDisruptionBudget":
        return
    spec, name = document["spec"], document["metadata"]["name"]
    if not isinstance(spec.get("minAvailable"), int):
        yield f"{name}: pods of a custom resource take minAvailable as a number, and nothing else"
        return
    wanted = spec["selector"]["matchLabels"].items()
    selected = [
        group.get("replicas", 1)
        for cluster in specs
        for group, pod in groups_of(cluster)
        if wanted <= pod["metadata"]["labels"].items()
    ]
    if sum(selected) != spec["minAvailable"]:
        yield f"{name}: protects {spec['minAvailable']} of {sum(selected)} pods"


def _network(document: Document, pods: list[dict[str, Any]]) -> Iterator[str]:
    if document["kind"] != "NetworkPolicy":
        return
    keys = {rule["key"] for rule in document["spec"]["podSelector"]["matchExpressions"]}
    if not all(keys <= pod["metadata"]["labels"].keys() for pod in pods):
        yield "the network policy leaves a pod out"
    if not all(rule.get("from") for rule in document["spec"]["ingress"]):
        yield "the network policy lets anybody in"
