"""Each model's share of the loss: one code for the learner and for replaying a capsule."""

from torch import Tensor, nn

from r3hf_ray.algorithms.losses import kl_loss, policy_loss, value_loss
from r3hf_ray.config import PPOConfig
from r3hf_ray.models.values import state_values
from r3hf_ray.training.experience import Experience

LossShare = tuple[Tensor, dict[str, Tensor]]
"""A microbatch's share of a loss, and sums over its tokens."""


def policy_share(policy: nn.Module, microbatch: Experience, config: PPOConfig, divisor: int) -> LossShare:
    """This microbatch's share of the policy loss, and sums over its tokens (see `losses.policy_loss`).

    Args:
        policy: in training.
        microbatch: rows of the optimizer step.
        config: of the run.
        divisor: of the whole optimizer step, from `policy_divisor`.
    """
    ppo, batch = config.ppo, microbatch.batch
    arrays = (batch.token_ids, batch.attention_mask, batch.response_mask)
    logprobs = policy(*arrays, temperature=config.rollout.temperature)
    loss, metrics = policy_loss(
        logprobs,
        microbatch.logprobs,
        microbatch.whitened,
        batch.response_mask,
        clip_range=ppo.clip_range,
        num_tokens=divisor,
        importance=None if ppo.importance_cap is None else microbatch.importance,
        clip_range_high=ppo.clip_range_high,
        dual_clip=ppo.dual_clip,
    )
    if ppo.kl_in == "reward":
        return loss, metrics
    kl, kl_metrics = kl_loss(
        logprobs,
        batch.ref_logprobs,
        batch.response_mask,
        coef=microbatch.kl_price,
        estimator=ppo.kl_estimator,
        num_tokens=divisor,
    )
    return loss + kl, metrics | kl_metrics


def policy_divisor(config: PPOConfig, *, num_tokens: int, num_responses: int) -> int:
    """What `ppo.loss_aggregation` divides the policy loss by: counts of the whole optimizer step over all ranks."""
    return num_tokens if config.ppo.loss_aggregation == "token_mean" else num_responses


def critic_share(critic: nn.Module, microbatch: Experience, config: PPOConfig, num_tokens: int) -> LossShare:
    """This microbatch's share of the value loss, and sums over its tokens (see `losses.value_loss`)."""
    batch = microbatch.batch
    values = state_values(critic, batch.token_ids, batch.attention_mask, batch.response_mask)
    return value_loss(
        values,
        microbatch.values,
        microbatch.returns,
        batch.response_mask,
        clip_range=config.ppo.value_clip_range,
        num_tokens=num_tokens,
    )
