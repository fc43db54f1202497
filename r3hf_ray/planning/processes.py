"""Each kind of process of a run, and what it holds by part on its device and on its host."""

import math
from collections import Counter
from dataclasses import dataclass

from r3hf_ray.config import PPOConfig
from r3hf_ray.models.sharding import DTYPES
from r3hf_ray.planning.learner_memory import MASTER, Microbatch, largest, logit_bytes, moments, parameters_of
from r3hf_ray.planning.model_shapes import ModelShape
from r3hf_ray.weights.object_ref import VERSIONS_KEPT
from r3hf_ray.weights.tensors import TORCH_TYPES

GIB = 2**30
LIBRARIES = {"learner": 350, "sampler": 450, "reward": 300, "coordinator, weight store": 250, "driver": 400}
"""Anonymous memory of a process that has imported what it needs, as measured. [MiB]"""
CONTEXT = GIB
"""CUDA's context, NCCL's buffers and cuBLAS' workspace in a process on a GPU: assumed. [bytes]"""
ENGINE_TOKENS = 8192
"""Tokens of one step of a vLLM engine on a GPU, by its own choice. [tokens]"""
ENGINE_ROWS = 256
"""Rows whose logits one step of an engine has. [responses]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The models of a run.

    Example: ``Shapes(policy=qwen, critic=qwen_rm, reference=qwen, rewards={"reward": qwen_rm})``
    """

    policy: ModelShape
    critic: ModelShape | None
    reference: ModelShape | None
    """None where nothing uses it."""
    rewards: dict[str, ModelShape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of ``count`` equal processes.

    Example: ``Process(name="learner", count=4, cpus=4.0, gpus=1.0, device={"train policy: blocks": Counter(...)},
    host=Counter({"libraries": 367_001_600}))``
    """

    name: str
    count: int
    cpus: float
    gpus: float
    device: dict[str, Counter[str]]
    """Bytes by part of each of its moments, where it computes: on its GPU, or on the host like the rest."""
    host: Counter[str]
    """Bytes by part on the host beside those, at most."""

    @property
    def at_most(self) -> tuple[str, Counter[str]]:
        """The largest moment on its device, and its parts."""
        return largest(self.device)

    @property
    def on_gpu(self) -> int:
        """Bytes on each GPU it has, at most."""
        return self.at_most[1].total() if self.gpus else 0

    @property
    def on_host(self) -> int:
        """Bytes of host memory, at most."""
        return self.host.total() + (0 if self.gpus else self.at_most[1].total())


def processes(config: PPOConfig, shapes: Shapes, *, gpu_bytes: int) -> list[Process]:
    """Every kind of process, the learner first; ``gpu_bytes`` is what one GPU has."""
    return [
        _learner(config, shapes),
        _sampler(config, shapes.policy, gpu_bytes),
        _reward(config, shapes),
        _alone("rank 0 besides", {"final model": shapes.policy.parameters * DTYPES[config.learner.dtype].itemsize}),
        _alone("coordinator, weight store", {"object store": VERSIONS_KEPT * published_bytes(config, shapes.policy)}),
        _alone("driver", {}),
    ]


def published_bytes(config: PPOConfig, policy: ModelShape) -> int:
    """Of one version of the weights, as samplers compute with them."""
    return policy.parameters * TORCH_TYPES[config.rollout.dtype].itemsize


def checkpoint_bytes(config: PPOConfig, shapes: Shapes) -> int:
    """Of one checkpoint: weights and both moments of everything that is trained."""
    critic = 0 if shapes.critic is None else parameters_of("critic", shapes.critic)
    return 3 * MASTER * (shapes.policy.parameters + critic)


def tensor_parallel(config: PPOConfig) -> int:
    """GPUs that one engine is asked to spread a model over."""
    return int(config.rollout.engine_args.get("tensor_parallel_size", 1))


def _learner(config: PPOConfig, shapes: Shapes) -> Process:
    learner, policy = config.learner, shapes.policy
    device = moments(config, policy, shapes.critic)
    shard = checkpoint_bytes(config, shapes) * learner.replicas // learner.ranks
    gathered = MASTER * policy.vocabulary * policy.hidden + 2 * config.weights.bucket_mb * 2**20
    host = Counter({"libraries": LIBRARIES["learner"] * 2**20})
    if learner.gpus_per_rank:
        device = {name: parts + Counter({"context": CONTEXT}) for name, parts in device.items()}
        host += Counter({"checkpoint": shard})
    else:
        held = {name: size for name, size in device["evaluate"].items() if name.startswith(("policy", "critic"))}
        device["publish"] = Counter(held | {"buckets": gathered})
    return Process(
        name="learner",
        count=learner.ranks,
        cpus=learner.cpus_per_rank,
        gpus=learner.gpus_per_rank,
        device=device,
        host=host,
    )


def _sampler(config: PPOConfig, policy: ModelShape, gpu_bytes: int) -> Process:
    rollout, dtype = config.rollout, TORCH_TYPES[config.rollout.dtype]
    length = config.data.max_prompt_tokens + rollout.max_response_tokens
    spread = tensor_parallel(config)
    tokens = max(ENGINE_TOKENS if rollout.gpus_per_actor else 4096, length)
    parts = Counter(
        {
            "weights": published_bytes(config, policy) // spread,
            "activations": policy.activations(math.ceil(tokens / length), length, dtype).forward // spread,
            "logits": 3 * MASTER * ENGINE_ROWS * policy.vocabulary,
        }
    )
    one_row = policy.cached_per_token * dtype.itemsize * length // spread
    if rollout.gpus_per_actor:
        free = int(rollout.gpu_memory_utilization * gpu_bytes) - parts.total()
        parts["key-value cache"] = max(one_row, free)
        if free < one_row:
            parts["left by gpu_memory_utilization"] = int((1.0 - rollout.gpu_memory_utilization) * gpu_bytes)
    else:
        parts["key-value cache"] = rollout.kv_cache_gb * GIB
    return Process(
        name="sampler",
        count=rollout.actors,
        cpus=rollout.cpus_per_actor,
        gpus=rollout.gpus_per_actor,
        device={"generate": parts},
        host=Counter({"libraries": LIBRARIES["sampler"] * 2**20, "buckets": config.weights.bucket_mb * 2**20}),
    )


def _reward(config: PPOConfig, shapes: Shapes) -> Process:
    reward, dtype = config.reward, DTYPES[config.reward.dtype]
    batch = Microbatch.of(config, budget=reward.microbatch_tokens, rows=config.responses_per_step)
    frozen = [] if shapes.reference is None else [shapes.reference]
    models = [*shapes.rewards.values(), *frozen]
    parts = Counter({f"{name} weights": shape.parameters * dtype.itemsize for name, shape in shapes.rewards.items()})
    parts["reference weights"] = sum(shape.parameters * dtype.itemsize for shape in frozen)
    parts["activations"] = max(shape.activations(batch.rows, batch.length, dtype).forward for shape in models)
    parts["logits"] = sum(logit_bytes(config, batch, shape) for shape in frozen)
    loading = max(shape.parameters * dtype.itemsize for shape in models)
    if reward.gpus_per_actor:
        parts["context"] = CONTEXT
    if reward.backend == "vllm":
        parts["key-value cache"] = GIB * len(shapes.rewards)
    return Process(
        name="reward",
        count=reward.actors,
        cpus=reward.cpus_per_actor,
        gpus=reward.gpus_per_actor,
        device={"score": parts},
        host=Counter({"libraries": LIBRARIES["reward"] * 2**20, "loading": loading if reward.gpus_per_actor else 0}),
    )


def _alone(name: str, parts: dict[str, int]) -> Process:
    """A process without a device of its own, on the driver's node."""
    libraries = Counter({"libraries": LIBRARIES.get(name, 0) * 2**20})
    return Process(name=name, count=1, cpus=0.0, gpus=0.0, device={"always": Counter(parts)}, host=libraries)
