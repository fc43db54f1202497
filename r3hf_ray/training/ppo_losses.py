"""What PPO's losses read, and each model's share of the loss: one code for the learner and for replaying a capsule."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from r3hf_ray.algorithms.losses import kl_loss, policy_loss, value_loss
from r3hf_ray.config import PPOConfig
from r3hf_ray.models.values import state_values


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Rows of a batch as the losses see them; nothing here carries a gradient. ``[B, T]``, 0 outside ``response_mask``.

    Example: a response of 2 tokens to a prompt of 2, whitened advantages:
    ``response_mask=[[0, 0, 1, 1]], old_logprobs=[[0, 0, -0.1, -1.3]], advantages=[[0, 0, -0.7, 1.2]]``.
    """

    token_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    """Of the policy at the start of the PPO step. [nats]"""
    old_values: Float[Tensor, "B T"]
    """Of the critic at the start of the PPO step."""
    advantages: Float[Tensor, "B T"]
    """As the loss uses them: whitened where that is on."""
    returns: Float[Tensor, "B T"]
    """Targets of the critic."""
    importance: Float[Tensor, "B T"]
    """Off-policy weights; 1 on the response without `ppo.importance_cap`."""
    ref_logprobs: Float[Tensor, "B T"]
    """Of the frozen reference. [nats]"""
    kl_price: Float[Tensor, "B T"]
    """Price of the KL inside the loss; 0 where it is paid inside the reward. [scaled reward a nat]"""

    def rows(self, index: Sequence[int]) -> "LossInputs":
        """The rows ``index`` (at least one), trimmed to the longest of them."""
        chosen = torch.as_tensor(index, dtype=torch.long, device=self.token_ids.device)
        width = int(self.attention_mask[chosen].sum(1).max())
        return LossInputs(**{name: x[chosen, :width] for name, x in self.tensors().items()})

    def filler(self) -> "LossInputs":
        """One short row without a response token: it joins the other ranks' collectives and adds exactly 0."""
        row = self.rows([int(self.attention_mask.sum(1).argmin())])
        empty = {name: torch.zeros_like(x) for name, x in row.tensors().items()}
        return LossInputs(**(empty | {"token_ids": row.token_ids, "attention_mask": row.attention_mask}))

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Share = tuple[Tensor, dict[str, Tensor]]


def policy_share(policy: nn.Module, inputs: LossInputs, config: PPOConfig, divisor: int) -> Share:
    """This microbatch's share of the policy loss, and sums over its tokens (see `losses.policy_loss`).

    Args:
        policy: in training.
        inputs: of the microbatch.
        config: of the run.
        divisor: of the whole optimizer step, from `policy_divisor`.
    """
    ppo = config.ppo
    logprobs = policy(
        inputs.token_ids, inputs.attention_mask, inputs.response_mask, temperature=config.rollout.temperature
    )
    loss, metrics = policy_loss(
        logprobs,
        inputs.old_logprobs,
        inputs.advantages,
        inputs.response_mask,
        clip_range=ppo.clip_range,
        num_tokens=divisor,
        importance=None if ppo.importance_cap is None else inputs.importance,
        clip_range_high=ppo.clip_range_high,
        dual_clip=ppo.dual_clip,
    )
    if ppo.kl_in == "reward":
        return loss, metrics
    kl, kl_metrics = kl_loss(
        logprobs,
        inputs.ref_logprobs,
        inputs.response_mask,
        coef=inputs.kl_price,
        estimator=ppo.kl_estimator,
        num_tokens=divisor,
    )
    return loss + kl, metrics | kl_metrics


def policy_divisor(config: PPOConfig, *, num_tokens: int, num_responses: int) -> int:
    """What `ppo.loss_aggregation` divides the policy loss by: counts of the whole optimizer step over all ranks."""
    return num_tokens if config.ppo.loss_aggregation == "token_mean" else num_responses


def critic_share(critic: nn.Module, inputs: LossInputs, config: PPOConfig, num_tokens: int) -> Share:
    """This microbatch's share of the value loss, and sums over its tokens (see `losses.value_loss`)."""
    values = state_values(critic, inputs.token_ids, inputs.attention_mask, inputs.response_mask)
    return value_loss(
        values,
        inputs.old_values,
        inputs.returns,
        inputs.response_mask,
        clip_range=config.ppo.value_clip_range,
        num_tokens=num_tokens,
    )
