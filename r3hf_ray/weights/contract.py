"""The contract between learner and samplers: what is published, what a sampler answers, and what counts as proof.

Promise: a publication is complete or it does not exist. Not promised: delivery, which is the coordinator's. How the
content travels is a medium's business (`media.py`); whether it arrived is judged here, alike for all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import xxhash

from r3hf_ray.sections.actors import WeightsSection


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTensor:
    """One weight in transit; bfloat16 travels as its 16-bit pattern, since numpy has no such type.

    Example: ``WeightTensor(name="lm_head.weight", dtype="bfloat16", array=uint16[49152, 576], fingerprint="9f2c...")``
    """

    name: str
    dtype: str
    array: np.ndarray
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed token sequence and the logprobs the learner's own weights give it: the end-to-end proof of a load.

    Example: ``Probe(token_ids=[1, 5, 3], logprobs=[-4.1, -3.9])``
    """

    token_ids: list[int]
    logprobs: list[float]
    """log pi(token_t | tokens_<t) for t >= 1, at temperature 1. [nats]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One version of the policy's weights: where its parts are, and what a sampler must be able to show.

    Example: ``Publication(version=3, parts=[ObjectRef(...)], fingerprint="17ab...", num_bytes=538090408, probe=...)``
    """

    version: int
    parts: list[Any]
    """What the medium fetches, each a list of `WeightTensor`; empty where the weights were broadcast (nccl)."""
    fingerprint: str
    """Over all tensors' names and fingerprints, in name order; empty where nothing was fingerprinted (nccl)."""
    num_bytes: int
    probe: Probe | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A sampler's answer to a publication.

    Example: ``Loaded(version=3, fingerprint="17ab...", probe_gap=4e-7, seconds=0.21)``
    """

    version: int
    fingerprint: str
    """Over the tensors as the model loaded them."""
    probe_gap: float
    """Mean absolute difference of the probe's logprobs, sampler minus learner; 0 without a probe. [nats]"""
    seconds: float


class TransferStep(StrEnum):
    """The calls of vLLM's weight-transfer interface at a sampler; learner and samplers take them together (nccl)."""

    INIT = "init_weight_transfer_engine"
    START = "start_weight_update"
    UPDATE = "update_weights"
    FINISH = "finish_weight_update"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerEnd:
    """What a medium may need at a learner rank."""

    rank: int
    section: WeightsSection
    dtype: str
    """Data type of the samplers."""
    samplers: int
    coordinator: Any
    store: Any


def objection(publication: Publication, loaded: Loaded, *, max_gap: float) -> str:
    """Why an answer does not prove that the sampler runs what was published; empty if it does.

    Args:
        publication: what the learner published; without content, or without anything to compare, it proves nothing.
        loaded: the sampler's answer.
        max_gap: largest mean difference of the probe's logprobs. [nats]
    """
    version = publication.version
    if not publication.num_bytes or not (publication.fingerprint or publication.probe):
        return f"holds nothing that proves weights version {version}: the learner published no content to compare"
    if (loaded.version, loaded.fingerprint) != (version, publication.fingerprint):
        return (
            f"answered version {loaded.version} with another fingerprint than the learner published for version "
            f"{version}: it does not hold the weights it should"
        )
    if not loaded.probe_gap <= max_gap:  # also when it is not a number
        return (
            f"gives the probe sequence other logprobs than the learner after loading version {version} (mean gap "
            f"{loaded.probe_gap:.2g} nats, allowed {max_gap:g}): its engine runs wrong weights or another precision; "
            "weights.max_logprob_gap sets the bound"
        )
    return ""


def fingerprint(array: np.ndarray) -> str:
    """128-bit xxHash of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).data)


def fingerprint_of_all(fingerprints: dict[str, str]) -> str:
    """One fingerprint of a whole model, independent of the order in which tensors arrived."""
    lines = "\n".join(f"{name} {fingerprints[name]}" for name in sorted(fingerprints))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def buckets(tensors: Iterable[WeightTensor], *, max_bytes: int) -> Iterator[list[WeightTensor]]:
    """Group tensors into lists of at most `max_bytes` (a larger tensor stands alone)."""
    bucket: list[WeightTensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.array.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.array.nbytes
    if bucket:
        yield bucket


def published(version: int, sent: Iterable[tuple[Any, list[WeightTensor]]], *, probe: Probe | None) -> Publication:
    """Describe what a medium has sent: (part, its tensors), one after the other, so that no bucket need be kept."""
    parts: list[Any] = []
    fingerprints: dict[str, str] = {}
    num_bytes = 0
    for part, bucket in sent:
        parts.append(part)
        fingerprints |= {tensor.name: tensor.fingerprint for tensor in bucket}
        num_bytes += sum(tensor.array.nbytes for tensor in bucket)
    whole = fingerprint_of_all(fingerprints)
    return Publication(version=version, parts=parts, fingerprint=whole, num_bytes=num_bytes, probe=probe)
