"""What a learner rank holds at each of its moments, by part, as `training/ppo.py` and `models/sharding.py` do it."""

import math
from collections import Counter
from dataclasses import dataclass

from r3hf_ray.config import PPOConfig
from r3hf_ray.models.sharding import BLOCKS_ABOVE, DTYPES, once_a_minibatch
from r3hf_ray.planning.model_shapes import Activations, ModelShape

MASTER = 4
"""Bytes of a float32 number: weights, gradients and both of Adam's moments are kept in it."""
LOGIT_COPIES = 3
"""Float32 copies of one chunk's logits that live at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The largest forward that a job asks for.

    Example: ``Microbatch(rows=32, length=1024, responses=8192)``
    """

    rows: int
    length: int
    """Prompt + response, padding included. [tokens]"""
    responses: int
    """Sampled tokens in it. [tokens]"""

    @classmethod
    def of(cls, config: PPOConfig, *, budget: int, rows: int) -> "Microbatch":
        """At most ``rows`` sequences of the longest length that the data may have, within ``budget`` padded tokens."""
        response = config.rollout.max_response_tokens
        length = config.data.max_prompt_tokens + response
        rows = max(1, min(rows, budget // length))
        return cls(rows=rows, length=length, responses=rows * response)


def moments(config: PPOConfig, policy: ModelShape, critic: ModelShape | None) -> dict[str, Counter[str]]:
    """Bytes by part of each moment of a step on one rank, on the device it computes on.

    Args:
        config: of the run.
        policy: its shape.
        critic: the model whose trunk the critic takes; None without one.
    """
    names = {"policy": policy} | ({} if critic is None else {"critic": critic})
    held = Counter[str]()
    for name, shape in names.items():
        held[f"{name} weights"] = MASTER * _shard(config, name, shape)
        held[f"{name} optimizer"] = 2 * MASTER * _shard(config, name, shape)
    per_step = math.ceil(config.responses_per_step / config.learner.ranks)
    budget = config.ppo.microbatch_tokens
    seen = Microbatch.of(config, budget=budget, rows=per_step)
    trained = Microbatch.of(config, budget=budget, rows=math.ceil(per_step / config.ppo.minibatches))
    found = {"evaluate": held + _evaluate(config, names, seen)}
    gradients = Counter[str]()
    for name, shape in names.items():
        gradients[f"{name} gradients"] = MASTER * _shard(config, name, shape)
        whole = Counter({"whole gradients": _whole_gradients(config, name, shape)})
        for moment, parts in _backward(config, name, shape, trained).items():
            found[f"train {name}: {moment}"] = held + gradients + whole + parts
    return found


def parameters_of(name: str, shape: ModelShape) -> int:
    """Of the policy with its head, or of a critic, whose head is a number for each hidden one."""
    return shape.parameters if name == "policy" else shape.trunk_parameters + shape.hidden + 1


def logit_bytes(config: PPOConfig, batch: Microbatch, shape: ModelShape) -> int:
    """All copies of one chunk's logits."""
    return LOGIT_COPIES * MASTER * min(config.learner.logits_chunk, batch.responses) * shape.vocabulary


def largest(moments_of: dict[str, Counter[str]]) -> tuple[str, Counter[str]]:
    """The largest moment and its parts."""
    return max(moments_of.items(), key=lambda moment: moment[1].total())


def _shard(config: PPOConfig, name: str, shape: ModelShape) -> int:
    return math.ceil(parameters_of(name, shape) * config.learner.replicas / config.learner.ranks)


def _in_blocks(config: PPOConfig, name: str, shape: ModelShape) -> bool:
    choice = config.learner.shard_blocks
    return choice == "always" or (choice == "auto" and parameters_of(name, shape) > BLOCKS_ABOVE)


def _root(name: str, shape: ModelShape) -> int:
    """Parameters outside the blocks."""
    return parameters_of(name, shape) - (shape.trunk_parameters - shape.root_parameters)


def _gathered(config: PPOConfig, name: str, shape: ModelShape, *, blocks: int) -> int:
    """Weights that are whole for a while, in the data type that computes: the root and some blocks, or all."""
    learner = config.learner
    if learner.ranks == 1 and learner.dtype == "float32":
        return 0
    size = DTYPES[learner.dtype].itemsize
    if not _in_blocks(config, name, shape):
        return size * parameters_of(name, shape)
    return size * (_root(name, shape) + blocks * shape.block_parameters)


def _whole_gradients(config: PPOConfig, name: str, shape: ModelShape) -> int:
    """Of a model whose ranks add them up once an optimizer step."""
    learner = config.learner
    whole = MASTER * parameters_of(name, shape)
    if learner.ranks == 1 and learner.dtype == "float32":
        return 0
    return whole if once_a_minibatch(whole, learner.reduce_gradients) else 0


def _evaluate(config: PPOConfig, names: dict[str, ModelShape], batch: Microbatch) -> Counter[str]:
    """No gradient: one block's forward, or the logits of a chunk; what is whole of the policy stays so meanwhile."""
    dtype = DTYPES[config.learner.dtype]
    forward = max(shape.activations(batch.rows, batch.length, dtype).forward for shape in names.values())
    logits = logit_bytes(config, batch, names["policy"])
    gathered = sum(_gathered(config, name, shape, blocks=2 * (name == "policy")) for name, shape in names.items())
    return Counter({"activations": forward, "logits": logits, "gathered weights": gathered})


def _backward(config: PPOConfig, name: str, shape: ModelShape, batch: Microbatch) -> dict[str, Counter[str]]:
    """The three moments of a backward that may be the largest: at the head, in the first block, at the root."""
    learner = config.learner
    size = DTYPES[learner.dtype].itemsize
    seen = shape.activations(batch.rows, batch.length, DTYPES[learner.dtype])
    alone = learner.ranks == 1 and learner.dtype == "float32"
    whole = 0 if alone else parameters_of(name, shape) if not _in_blocks(config, name, shape) else None
    block = shape.block_parameters if whole is None else 0
    head = shape.head_parameters if name == "policy" else 0
    kept = _kept(config, shape, seen)
    found = {}
    if name == "policy":
        logits = logit_bytes(config, batch, shape)
        found["head"] = Counter(
            {
                "activations": kept + seen.tail,
                "logits": logits,
                "gradient of the head": MASTER * head + (size * head if size < MASTER else 0),
                "gathered weights": _gathered(config, name, shape, blocks=1),
            }
        )
    own = seen.kept if learner.gradient_checkpointing else 0
    found["blocks"] = Counter(
        {
            "activations": kept + own + seen.backward - seen.kept,
            "gradient of the head": size * head,
            "gathered weights": _gathered(config, name, shape, blocks=2),
            "reduced gradients": MASTER * block,
        }
    )
    root = _root(name, shape) if whole is None else whole
    unreduced = root + (head if shape.tied else 0)
    found["root"] = Counter(
        {
            "gathered weights": _gathered(config, name, shape, blocks=0),
            "reduced gradients": size * unreduced + (0 if alone else MASTER * root),
        }
    )
    return found


def _kept(config: PPOConfig, shape: ModelShape, seen: Activations) -> int:
    """What all blocks keep from their forward."""
    return shape.layers * (seen.entry if config.learner.gradient_checkpointing else seen.kept)
