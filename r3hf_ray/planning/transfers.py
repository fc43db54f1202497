"""Bytes and seconds of one sync of the weights and of one checkpoint, at the speed of given links."""

from collections import Counter
from dataclasses import dataclass

from r3hf_ray.config import PPOConfig
from r3hf_ray.planning.placement import Node
from r3hf_ray.planning.processes import Shapes, checkpoint_bytes, published_bytes

COPY = 0.8e9
"""Into memory that is touched for the first time, as a new object of Ray's store is: measured 0.5 to 0.8. [bytes/s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Speeds between nodes, and to the storage of checkpoints. Example: ``Links(node=12.5e9, storage=1.25e9)``"""

    node: float
    """Of one node's network. [bytes/s]"""
    storage: float
    """Of the run folder's storage, all ranks together. [bytes/s]"""

    @classmethod
    def of_gbit(cls, *, node: float, storage: float) -> "Links":
        """From Gbit/s."""
        return cls(node=node * 1e9 / 8, storage=storage * 1e9 / 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Bytes that move, and seconds by what they are spent on.

    Example: ``Transfer(size=3_087_428_608, seconds={"copy": 3.9, "to samplers": 0.25})``
    """

    size: int
    seconds: dict[str, float]


def weight_sync(config: PPOConfig, shapes: Shapes, nodes: list[Node], links: Links) -> Transfer:
    """Gathered by rank 0, copied into the object store, read by every node that has samplers."""
    size = published_bytes(config, shapes.policy)
    ranks = Counter(node for node, held in enumerate(nodes) for _ in range(held.holds["learner"]))
    away = 1.0 - ranks[0] / max(1, ranks.total()) if ranks[0] else 0.0
    readers = sum(1 for node in nodes[1:] if node.holds["sampler"])
    seconds = {
        "gather between nodes": away * size / links.node,
        "copy into the object store": size / COPY,
        "to samplers on other nodes": readers * size / links.node,
    }
    return Transfer(size=size, seconds=seconds)


def checkpoint(config: PPOConfig, shapes: Shapes, nodes: list[Node], links: Links) -> Transfer:
    """Every rank writes its shards."""
    size = checkpoint_bytes(config, shapes)
    writers = max(1, sum(1 for node in nodes if node.holds["learner"]))
    return Transfer(size=size, seconds={"write": size / min(links.storage, writers * links.node)})
