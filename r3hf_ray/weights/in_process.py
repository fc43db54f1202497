"""Weights inside one process, for loops that hold learner and engine side by side: nothing is copied."""

from r3hf_ray.weights.contract import Publication, WeightTensor, published
from r3hf_ray.weights.tensors import Parameters, in_transit


def publication(parameters: Parameters, version: int) -> Publication:
    """All parameters in float32 as one bucket, which shares their memory: load it before they change. No probe."""
    bucket = list(in_transit(parameters(), "float32"))
    return published(version, [(bucket, bucket)], probe=None)


def fetch(part: list[WeightTensor]) -> list[WeightTensor]:
    """The part is the bucket itself."""
    return part
