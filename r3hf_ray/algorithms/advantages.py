"""From token rewards and values to advantages and returns.

Index ``t`` is the action that emits token ``t``; ``values[t] = V(s_t)`` is the state before it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

STD_FLOOR = 0.5
"""Smallest spread that `grpo_advantages` divides by, in units of the summed reward. Large, since with token rewards the
numerator keeps the size of the prefix scores when a prompt's samples have become equal: with 0.1 a toy run jumped to 15
nats and to half its length. One model of weight 1 has spread 1 under the initial policy; other weights and sums of
several models have another, and the floor does not follow them."""


def kl_estimate(log_ratio: Float[Tensor, "B T"], estimator: str) -> Float[Tensor, "B T"]:
    """An estimate of KL(pi || ref) from the log ratio ``log pi - log ref`` of tokens sampled from pi (Schulman, 2020).

    - ``k1``: the log ratio. Unbiased, of either sign. As a reward its policy gradient is the KL's; as a loss it has
      none (its expectation is 0).
    - ``k2``: half its square. Biased, never negative. As a loss its gradient is the KL's.
    - ``k3``: ``exp(-log ratio) - 1 + log ratio``. Unbiased, never negative. As a loss its gradient is that of
      KL(ref || pi); as a reward, that of KL(pi || ref) - KL(ref || pi).

    Raises:
        ValueError: any other ``estimator``.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return (-log_ratio).exp() - 1.0 + log_ratio
    raise ValueError(f"no KL estimator {estimator!r}; choose k1, k2 or k3")


def kl_penalized_rewards(
    token_rewards: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
    estimator: str = "k1",
) -> Float[Tensor, "B T"]:
    """``r_t - kl_coef * (log pi(y_t) - log pi_ref(y_t))``, 0 outside the response (paper, Eq. 8).

    The penalty is k1, the signed log ratio of the sampled token: inside the reward it is the one with the right
    gradient (see `kl_estimate`).

    Args:
        token_rewards: scaled rewards.
        logprobs: of the policy at the start of the step (*old*). [nats]
        ref_logprobs: of the frozen reference, at the same temperature. [nats]
        response_mask: response tokens.
        kl_coef: scaled reward per nat.
        estimator: k1, k2 or k3.
    """
    penalty = kl_estimate(logprobs - ref_logprobs, estimator)
    return (token_rewards - kl_coef * penalty).masked_fill(~response_mask, 0.0)


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


def returns_to_go(
    rewards: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], *, gamma: float
) -> Float[Tensor, "B T"]:
    """``G_t = sum_{s >= t} gamma^(s - t) r_s`` over the response tokens of each row, 0 elsewhere.

    With `r3hf` rewards and gamma = 1 it is ``R - P_{t-1}``: the reward model is its own baseline.
    """
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma=gamma, lam=1.0)[0]


def whole_returns(to_go: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """``G_1``, the return-to-go at each row's first response token; 0 for a row without any."""
    first = response_mask & (response_mask.cumsum(1) == 1)
    return torch.where(first, to_go, 0.0).sum(1)


def rloo_advantages(
    to_go: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    prompt_ids: Int64[Tensor, "B"],
    everyone: tuple[Int64[Tensor, "N"], Float[Tensor, "N"]],
) -> Float[Tensor, "B T"]:
    """REINFORCE leave-one-out (Kool et al., 2019; Ahmadian et al., 2024), per token: ``G_t - mean of the others' G_1``.

    The baseline is a *sequence's* reward and so is G_t: a reward still to come. To take it off each token's own reward
    ``r_t``, a hundredth of its size, makes every token's sign that of the baseline, and has been seen to blow up the
    length. The baseline does not depend on the response, so the gradient stays unbiased; with `terminal` rewards this
    is RLOO itself.

    Args:
        to_go: from `returns_to_go`.
        response_mask: response tokens.
        prompt_ids: of each row.
        everyone: prompt ids and `whole_returns` of all responses of the step, on all ranks, this rank's among them.
            A response without companions is compared with all others.
    """
    group = _group(prompt_ids, everyone)
    own = whole_returns(to_go, response_mask).double()
    others = (group.total - own) / (group.count - 1.0).clamp(min=1.0)
    return (to_go - others[:, None].to(to_go.dtype)).masked_fill(~response_mask, 0.0)


def grpo_advantages(
    to_go: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    prompt_ids: Int64[Tensor, "B"],
    everyone: tuple[Int64[Tensor, "N"], Float[Tensor, "N"]],
) -> Float[Tensor, "B T"]:
    """Group-relative advantages (Shao et al., 2024), per token: ``(G_t - mean) / max(std, STD_FLOOR)`` of the
    group's G_1.

    Population standard deviation. The floor is ours: with token rewards G_t differs from the mean where all G_1 are
    equal, so a tiny std would blow it up; in GRPO itself the numerator vanishes with it. Arguments as in
    `rloo_advantages`.
    """
    group = _group(prompt_ids, everyone)
    mean = group.total / group.count
    std = (group.squares / group.count - mean.square()).clamp(min=0.0).sqrt().clamp(min=STD_FLOOR)
    centred = to_go - mean[:, None].to(to_go.dtype)
    return (centred / std[:, None].to(to_go.dtype)).masked_fill(~response_mask, 0.0)


@dataclass(frozen=True, slots=True)
class _Group:
    """Of the responses to each row's prompt, its own included. ``[B]``, float64."""

    count: Tensor
    total: Tensor
    squares: Tensor


def _group(prompt_ids: Tensor, everyone: tuple[Tensor, Tensor]) -> _Group:
    all_ids, rewards = everyone
    members = prompt_ids[:, None] == all_ids
    members = members | (members.sum(1, keepdim=True) == 1)
    chosen = torch.where(members, rewards.double(), 0.0)
    return _Group(members.sum(1).double(), chosen.sum(1), chosen.square().sum(1))


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
