"""What would have to change where a process does not fit, in the order in which a person would try."""

from collections.abc import Callable, Iterator
from typing import Any

from r3hf_ray.config import PPOConfig
from r3hf_ray.planning.processes import Process, tensor_parallel

Memory = Callable[[PPOConfig], int]
"""Bytes of a process under other settings."""


def advice(config: PPOConfig, process: Process, memory: Memory, room: int) -> list[str]:
    """One sentence a change, each on top of those before it, until the process fits into ``room`` bytes."""
    changes = {"learner": _learner, "sampler": _sampler, "reward": _reward}
    said: dict[str, str] = {}
    for sentence, section, values in changes[process.name](config) if process.name in changes else ():
        config = config.model_copy(update={section: dict(config)[section].model_copy(update=values)})
        now = memory(config)
        said[sentence.partition(" = ")[0]] = f"{sentence}: {now / 2**30:.1f} GiB"
        if now <= room:
            return list(said.values())
    return [*said.values(), f"nothing that a setting can change makes a {process.name} fit into {room / 2**30:.1f} GiB"]


Change = tuple[str, str, dict[str, Any]]
"""As it is said, the section, and its new values."""


def _learner(config: PPOConfig) -> Iterator[Change]:
    learner, longest = config.learner, config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing = true", "learner", {"gradient_checkpointing": True}
    if learner.gpus_per_rank and learner.dtype == "float32":
        yield "learner.dtype = bfloat16", "learner", {"dtype": "bfloat16"}
    budget = config.ppo.microbatch_tokens
    while budget // 2 >= longest:
        budget //= 2
        yield f"ppo.microbatch_tokens = {budget}", "ppo", {"microbatch_tokens": budget}
    ranks = learner.ranks
    while ranks * 2 * config.ppo.minibatches <= config.responses_per_step:
        ranks *= 2
        yield f"learner.ranks = {ranks}", "learner", {"ranks": ranks}
    if config.has_critic:
        yield "ppo.advantage = r3hf_baseline (no critic)", "ppo", {"advantage": "r3hf_baseline"}


def _sampler(config: PPOConfig) -> Iterator[Change]:
    rollout = config.rollout
    if rollout.dtype == "float32":
        yield "rollout.dtype = bfloat16", "rollout", {"dtype": "bfloat16"}
    if rollout.gpus_per_actor and rollout.gpu_memory_utilization < 0.92:
        yield "rollout.gpu_memory_utilization = 0.92", "rollout", {"gpu_memory_utilization": 0.92}
    if not rollout.gpus_per_actor and rollout.kv_cache_gb > 1:
        yield "rollout.kv_cache_gb = 1", "rollout", {"kv_cache_gb": 1}


def _reward(config: PPOConfig) -> Iterator[Change]:
    reward, longest = config.reward, config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if reward.dtype == "float32":
        yield "reward.dtype = bfloat16", "reward", {"dtype": "bfloat16"}
    budget = reward.microbatch_tokens
    while budget // 2 >= longest:
        budget //= 2
        yield f"reward.microbatch_tokens = {budget}", "reward", {"microbatch_tokens": budget}


def unready(config: PPOConfig) -> list[str]:
    """What a job asks for that does not work yet."""
    if tensor_parallel(config) == 1:
        return []
    return [
        "rollout.engine_args.tensor_parallel_size: an engine on several GPUs is planned, and cannot yet take the "
        "learner's weights"
    ]
