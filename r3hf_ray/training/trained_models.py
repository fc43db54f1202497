"""The models that PPO trains: loaded by slices where there are several ranks, else whole, and sharded."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from r3hf_ray.config import PPOConfig
from r3hf_ray.models.load import load_policy
from r3hf_ray.models.load_sharded import Files, Shard, sharded_critic, sharded_policy
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import DTYPES, checkpoint_activations, shard
from r3hf_ray.models.values import Critic, critic_from_policy, critic_from_reward_model
from r3hf_ray.training.experience import RewardScale

WHOLE_BELOW = 250_000_000
"""Up to this many parameters every rank reads the whole model: the forwards of its checks would cost more in slices (12
against 4 s at 135 million, two ranks on a CPU)."""


def trained_policy(config: PPOConfig, *, device: torch.device, mesh: DeviceMesh | None) -> Policy:
    """The policy on this rank. All ranks call it.

    Raises:
        ModelError: it cannot be used.
    """
    source, attention, chunk = config.model.policy, config.model.attention, config.learner.logits_chunk
    policy = None
    if _in_slices(source, mesh):
        policy = sharded_policy(source, _shard(config, mesh), device, chunk=chunk, attention=attention)
    if policy is None:
        policy = Policy(load_policy(source, torch.float32, attention=attention), chunk=chunk).eval().to(device)
        _shard(config, mesh)(policy)
    return policy


def trained_critic(
    config: PPOConfig, scale: RewardScale, *, device: torch.device, mesh: DeviceMesh | None
) -> Critic | None:
    """The critic on this rank, where advantages need one. All ranks call it.

    Raises:
        ModelError: it cannot be used.
    """
    if not config.has_critic:
        return None
    of_policy, keep_head = config.critic_init == "sft", config.critic_init == "reward_model"
    source = config.model.policy if of_policy else config.critic.source or config.model.reward_model
    attention, critic = config.model.attention, None
    units = {"mean": scale.mean, "scale": scale.scale / config.model.reward_weight} if keep_head else {}
    if _in_slices(source, mesh):
        critic = sharded_critic(
            source,
            _shard(config, mesh),
            device,
            of_policy=of_policy,
            keep_head=keep_head,
            attention=attention,
            **units,
        )
    if critic is None:
        if of_policy:
            critic = critic_from_policy(source, torch.float32, attention=attention)
        else:
            critic = critic_from_reward_model(
                source, torch.float32, keep_head=keep_head, attention=attention, **({"mean": 0.0, "scale": 1.0} | units)
            )
        critic = critic.eval().to(device)
        _shard(config, mesh)(critic)
    return critic


def _in_slices(source: str, mesh: DeviceMesh | None) -> bool:
    """Whether each rank reads its own part only."""
    return mesh is not None and mesh.size() > 1 and Files(source).parameters > WHOLE_BELOW


def _shard(config: PPOConfig, mesh: DeviceMesh | None) -> Shard:
    learner = config.learner

    def apply(module: nn.Module) -> None:
        if learner.gradient_checkpointing:
            checkpoint_activations(module)
        head = module.head if isinstance(module, Critic) else None
        shard(module, mesh, blocks=learner.shard_blocks, dtype=DTYPES[learner.dtype], keep_float32=head)

    return apply
