"""PPO's two losses as shares that add up.

Every loss is a *sum* over the tokens at hand divided by ``num_tokens``, the number of response tokens of the whole
optimizer step over all microbatches and ranks. Shares and their gradients therefore sum to the global token mean: any
split gives the same step. Metrics are plain sums over tokens, to be divided by ``num_tokens`` after the all-reduce.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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

    Returns:
        This share of the loss, and detached metrics: sums ``clipfrac`` (tokens whose clip is active), ``approx_kl``
        (``q - 1 - log q``, never negative) and ``ratio``; ``ratio_max`` is a maximum (0 if the mask is empty).
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    surrogate = torch.maximum(unclipped, clipped)
    if importance is not None:
        surrogate = surrogate * importance
    with torch.no_grad():
        metrics = {
            "clipfrac": masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
            "approx_kl": masked_sum(ratio - 1.0 - log_ratio, response_mask),
            "ratio": masked_sum(ratio, response_mask),
            "ratio_max": ratio.masked_fill(~response_mask, 0.0).max(),
        }
    return masked_sum(surrogate, response_mask) / num_tokens, metrics


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
