"""Weights through Ray's object store: any number of readers, late joiners, no GPU needed.

The last two versions outlive the process that made them, because a `WeightStore` actor on a stable node owns them (an
object put by a learner rank dies with the rank). Neither side's code here imports vLLM.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import ray

from r3hf_ray.weights.contract import LearnerEnd, Probe, Publication, WeightTensor, buckets, published
from r3hf_ray.weights.tensors import Parameters, in_transit

VERSIONS_KEPT = 2


class WeightStore:
    """Owns the last versions of the weights; needs no CPU and no GPU, and stays off preemptible nodes."""

    def __init__(self) -> None:
        self._versions: dict[int, list[Any]] = {}

    def ping(self) -> None:
        """Answer."""

    def put(self, version: int, bucket: list[WeightTensor]) -> Any:
        """Take ownership of one bucket; returns its ref in a list, so that Ray does not resolve it."""
        ref = ray.put(bucket)
        self._versions.setdefault(version, []).append(ref)
        return [ref]

    def drop_before(self, version: int) -> None:
        """Forget versions older than the last two, and whatever an interrupted publication of `version` left."""
        keep = range(version - VERSIONS_KEPT + 1, version)
        self._versions = {v: refs for v, refs in self._versions.items() if v in keep}


class ObjectRefSender:
    """The learner's end: rank 0 hands buckets to the store."""

    def __init__(self, end: LearnerEnd) -> None:
        """``end``: this rank's."""
        self._end = end

    def send(self, version: int, parameters: Parameters, probe: Probe | None) -> Publication | None:
        """All ranks gather; rank 0 publishes and returns what it has published."""
        if self._end.rank:
            deque(parameters(), maxlen=0)
            return None
        tensors = in_transit(parameters(), self._end.dtype)
        max_bytes = self._end.section.bucket_mb * 2**20
        return publish(self._end.store, version, tensors, probe=probe, max_bytes=max_bytes)


def publish(
    store: Any, version: int, tensors: Iterable[WeightTensor], *, probe: Probe | None, max_bytes: int
) -> Publication:
    """Hand all tensors to the store and describe them; the caller passes the result to the coordinator."""
    ray.get(store.drop_before.remote(version))
    sent = ((ray.get(store.put.remote(version, bucket))[0], bucket) for bucket in buckets(tensors, max_bytes=max_bytes))
    return published(version, sent, probe=probe)


def fetch(part: Any) -> list[WeightTensor]:
    """The sampler's end: one bucket at a time, zero-copy on the store's node."""
    bucket: list[WeightTensor] = ray.get(part)
    return bucket
