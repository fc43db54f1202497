"""From token rewards and values to advantages and returns.

Index ``t`` is the action that emits token ``t``; ``values[t] = V(s_t)`` is the state before it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kl_penalized_rewards(
    token_rewards: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """``r_t - kl_coef * (log pi(y_t) - log pi_ref(y_t))``, 0 outside the response (paper, Eq. 8).

    The penalty is k1, the signed log ratio of the sampled token: unbiased, and inside the reward, not the loss.

    Args:
        token_rewards: scaled rewards.
        logprobs: of the policy at the start of the step (*old*). [nats]
        ref_logprobs: of the frozen reference, at the same temperature. [nats]
        response_mask: response tokens.
        kl_coef: scaled reward per nat.
    """
    return (token_rewards - kl_coef * (logprobs - ref_logprobs)).masked_fill(~response_mask, 0.0)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation (Schulman et al., 2016) over the response tokens of each row.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma * lam * A_{t+1}

    where ``t + 1`` is the next *response* token of the row (holes in the mask are stepped over, as if they were not
    there) and both ``V`` and ``A`` are 0 after the last one: every response is terminal, also one cut at the limit.
    Nothing outside the mask is read.

    Args:
        rewards: reward of each token.
        values: V(s_t), without gradient.
        response_mask: response tokens.
        gamma: discount; redistribution keeps the optimum only at 1.
        lam: 0 is the one-step error, 1 the whole return minus V.

    Returns:
        Advantages and returns ``A + V`` (the critic's targets), 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(rewards.shape[1])):
        acts = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(acts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(acts, values[:, t], next_value)
        advantages[:, t] = torch.where(acts, next_advantage, 0.0)
    return advantages, (advantages + values).masked_fill(~response_mask, 0.0)


def next_kl_coef(kl_coef: float, *, kl: float, target: float, horizon: float, responses: int) -> float:
    """Proportional controller of the KL coefficient (Ziegler et al., 2019, arXiv 1909.08593, section 2.2).

    ``kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon)``

    Args:
        kl_coef: the present coefficient.
        kl: measured KL to the reference. [nats a response]
        target: the KL to hold, > 0. [nats a response]
        horizon: responses over which the coefficient may change by about a factor of e^0.2.
        responses: responses since the last change.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * responses / horizon)
