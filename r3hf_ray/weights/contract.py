"""Weights between the learner and the samplers: what is published, who owns it, how a tensor is fingerprinted.

Promise: a publication is complete or it does not exist; the last two versions outlive the process that made them,
because a `WeightStore` actor on a stable node owns them (an object put by a learner rank dies with the rank).
Not promised: delivery. The coordinator sends publications, and every sampler proves what it loaded (`weights.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import ray
import xxhash

VERSIONS_KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One weight in transit; bfloat16 travels as its 16-bit pattern, since numpy has no such type.

    Example: ``Tensor(name="lm_head.weight", dtype="bfloat16", array=uint16[49152, 576], fingerprint="9f2c...")``
    """

    name: str
    dtype: str
    array: np.ndarray
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed token sequence and the logprobs the learner's own weights give it: the end-to-end proof of a load."""

    token_ids: list[int]
    logprobs: list[float]
    """log pi(token_t | tokens_<t) for t >= 1, at temperature 1. [nats]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One version of the policy's weights: refs to its buckets, and what a sampler must be able to show."""

    version: int
    buckets: list[Any]
    """Object refs of `list[Tensor]`, owned by the WeightStore; empty where the weights came another way (nccl)."""
    fingerprint: str
    """Fingerprint over all tensors' names and fingerprints, in name order."""
    num_bytes: int
    probe: Probe | None


class TransferStep(StrEnum):
    """The four calls of vLLM's weight-sync client, for backends in which learner and samplers act together (nccl)."""

    INIT = "init_weight_transfer_engine"
    START = "start_weight_update"
    UPDATE = "update_weights"
    FINISH = "finish_weight_update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A sampler's answer to a publication."""

    version: int
    fingerprint: str
    """Over the tensors as the model loaded them."""
    probe_gap: float
    """Mean absolute difference of the probe's logprobs, sampler minus learner; 0 without a probe. [nats]"""
    seconds: float


class WeightStore:
    """Owns the last versions of the weights; needs no CPU and no GPU, and stays off preemptible nodes."""

    def __init__(self) -> None:
        self._versions: dict[int, list[Any]] = {}

    def put(self, version: int, bucket: list[Tensor]) -> Any:
        """Take ownership of one bucket; returns its ref in a list, so that Ray does not resolve it."""
        ref = ray.put(bucket)
        self._versions.setdefault(version, []).append(ref)
        return [ref]

    def drop_before(self, version: int) -> None:
        """Forget versions older than the last two, and whatever an interrupted publication of `version` left."""
        keep = range(version - VERSIONS_KEPT + 1, version)
        self._versions = {v: refs for v, refs in self._versions.items() if v in keep}


def fingerprint(array: np.ndarray) -> str:
    """128-bit xxHash of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data)


def fingerprint_of_all(fingerprints: dict[str, str]) -> str:
    """One fingerprint of a whole model, independent of the order in which tensors arrived."""
    lines = "\n".join(f"{name} {fingerprints[name]}" for name in sorted(fingerprints))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def buckets(tensors: Iterable[Tensor], *, max_bytes: int) -> Iterator[list[Tensor]]:
    """Group tensors into lists of at most `max_bytes` (a larger tensor stands alone)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.array.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.array.nbytes
    if bucket:
        yield bucket


def publish(store: Any, version: int, tensors: Iterable[Tensor], *, probe: Probe | None, max_bytes: int) -> Publication:
    """Hand all tensors to the store and describe them; the caller passes the result to the coordinator."""
    ray.get(store.drop_before.remote(version))
    refs: list[Any] = []
    fingerprints: dict[str, str] = {}
    num_bytes = 0
    for bucket in buckets(tensors, max_bytes=max_bytes):
        fingerprints |= {tensor.name: tensor.fingerprint for tensor in bucket}
        num_bytes += sum(tensor.array.nbytes for tensor in bucket)
        refs += ray.get(store.put.remote(version, bucket))
    return Publication(
        version=version,
        buckets=refs,
        fingerprint=fingerprint_of_all(fingerprints) if refs else "",
        num_bytes=num_bytes,
        probe=probe,
    )
