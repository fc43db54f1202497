"""PPO's two losses as shares that add up.

Every loss is a *sum* over the tokens at hand divided by ``num_tokens``, the number of response tokens of the whole
optimizer step over all microbatches and ranks. Shares and their gradients therefore sum to the global token mean: any
split gives the same step. Metrics are plain sums over tokens, to be divided by ``num_tokens`` after the all-reduce.

Give the policy's losses the number of *responses* of the step instead and they sum to the mean over responses of each
one's sum over tokens (``ppo.loss_aggregation = sequence_sum``), which is the policy gradient of the expected reward.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from r3hf_ray.algorithms.advantages import kl_estimate
from r3hf_ray.algorithms.masking import masked_sum


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    clip_range: float,
    num_tokens: int,
    importance: Float[Tensor, "B T"] | None = None,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Clipped surrogate (Schulman et al., 2017): ``sum_t w_t * max(-A_t q_t, -A_t clip(q_t)) / num_tokens``.

    ``q_t = exp(logprobs - old_logprobs)``. Where ``logprobs == old_logprobs`` the gradient is the policy gradient
    ``-A_t * grad logprob_t``.

    Args:
        logprobs: of the policy being trained, with gradient. [nats]
        old_logprobs: of the same policy at the start of the PPO step. [nats]
        advantages: without gradient.
        response_mask: response tokens.
        clip_range: the ratio is clipped to ``1 +- clip_range``.
        num_tokens: response tokens of the whole optimizer step.
        importance: weights ``w_t`` of off-policy samples, from `importance_weights`; 1 when left out.
        clip_range_high: the upper clip is ``1 + clip_range_high`` when given (Yu et al., 2025, DAPO): rare tokens may
            gain more than common ones lose.
        dual_clip: where ``A_t < 0`` the loss is at most ``-dual_clip * A_t`` when given (Ye et al., 2020, arXiv
            1912.09729): a bad token that became likely pulls with a bounded, and then no, force. Above 1.

    Returns:
        This share of the loss, and detached metrics: sums ``clipfrac`` (tokens whose clip is active), ``approx_kl``
        (``q - 1 - log q``, never negative) and ``ratio``; ``ratio_max`` is a maximum (0 if the mask is empty);
        ``dual_clipfrac`` (tokens at the second clip) where ``dual_clip`` is given.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + high)
    surrogate = torch.maximum(unclipped, clipped)
    capped = torch.zeros_like(response_mask)
    if dual_clip is not None:
        capped = (advantages < 0.0) & (surrogate > -dual_clip * advantages)
        surrogate = torch.where(capped, -dual_clip * advantages, surrogate)
    if importance is not None:
        surrogate = surrogate * importance
    with torch.no_grad():
        metrics = {
            "clipfrac": masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
            "approx_kl": masked_sum(ratio - 1.0 - log_ratio, response_mask),
            "ratio": masked_sum(ratio, response_mask),
            "ratio_max": ratio.masked_fill(~response_mask, 0.0).max(),
        }
        if dual_clip is not None:
            metrics["dual_clipfrac"] = masked_sum(capped.to(ratio.dtype), response_mask)
    return masked_sum(surrogate, response_mask) / num_tokens, metrics


def kl_loss(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    coef: Float[Tensor, "B T"],
    estimator: str,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """``sum_t coef_t * KL_t / num_tokens``: the KL to the reference as a loss of its own.

    The value is that of ``estimator``; the gradient is always k2's, ``coef * log_ratio * grad logprob``, whose
    expectation over the policy's own samples is the gradient of KL(pi || ref). That of k1 as a loss is 0 in
    expectation, and that of k3 belongs to KL(ref || pi) (see `advantages.kl_estimate`). On the later optimizer steps
    of a batch the samples are the old policy's, as they are for the surrogate, and carry no weight for it.

    Args:
        logprobs: of the policy being trained, with gradient. [nats]
        ref_logprobs: of the frozen reference. [nats]
        response_mask: response tokens.
        coef: price of a nat.
        estimator: k1, k2 or k3, of the value.
        num_tokens: response tokens of the whole optimizer step.

    Returns:
        This share of the loss, and the detached sum ``kl_loss`` (the estimate itself, in nats).
    """
    log_ratio = (logprobs - ref_logprobs).masked_fill(~response_mask, 0.0)
    with_gradient = kl_estimate(log_ratio, "k2")
    estimate = kl_estimate(log_ratio, estimator).detach()
    value = with_gradient + (estimate - with_gradient.detach())
    return masked_sum(coef * value, response_mask) / num_tokens, {"kl_loss": estimate.sum()}


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    clip_range: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Half the squared error, pessimistic about large changes: ``sum_t max(e_t^2, e'_t^2) / 2 / num_tokens``.

    ``e = values - returns``; ``e'`` is the same with ``values`` clipped to ``old_values +- clip_range``.

    Args:
        values: of the critic being trained, with gradient.
        old_values: of the critic at the start of the PPO step.
        returns: targets, from `advantages.gae`.
        response_mask: response tokens.
        clip_range: in the units of the values; 0 turns the clip off.
        num_tokens: response tokens of the whole optimizer step.

    Returns:
        This share of the loss, and the detached sum ``clipfrac`` (tokens whose clip is active).
    """
    error = (values - returns).masked_fill(~response_mask, 0.0).square()
    if clip_range > 0.0:
        near = values.clamp(old_values - clip_range, old_values + clip_range)  # exactly `values` inside the clip
        clipped = (near - returns).masked_fill(~response_mask, 0.0).square()
    else:
        clipped = error
    clipfrac = (clipped > error).sum().to(values.dtype)
    return 0.5 * torch.maximum(error, clipped).sum() / num_tokens, {"clipfrac": clipfrac}


def importance_weights(
    old_logprobs: Float[Tensor, "B T"],
    behavior_logprobs: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    cap: float,
) -> Float[Tensor, "B T"]:
    """Truncated importance weights ``min(exp(old - behavior), cap)``, 0 outside the response.

    They carry samples of older weights, or of a sampler with other numerics, over to the learner's policy.
    """
    log_weight = (old_logprobs - behavior_logprobs).detach().masked_fill(~response_mask, 0.0)
    return log_weight.exp().clamp(max=cap).masked_fill(~response_mask, 0.0)
