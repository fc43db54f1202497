"""Sums, means and whitening over the response tokens of a padded batch.

Nothing outside a mask is ever read: padding may hold anything, NaN included.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def masked_sum(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum of ``x`` where ``mask``; 0 when the mask is empty. Differentiable."""
    return x.masked_fill(~mask, 0.0).sum()


def moments(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "3"]:
    """``(count, sum x, sum x^2)`` where ``mask``, in float64.

    The moments of shares add up to the moments of the whole, so one all-reduce gives every rank the global ones.
    """
    inside = x.detach().masked_fill(~mask, 0.0).double()
    return torch.stack([mask.sum().double(), inside.sum(), inside.square().sum()])


def whiten(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], moments: Float[Tensor, "3"], *, eps: float = 1e-8
) -> Float[Tensor, "B T"]:
    """``(x - mean) / sqrt(variance + eps)`` where ``mask``, 0 elsewhere; population variance.

    Meant for advantages. Never whiten token rewards: any shift pays for length (see `scaling.normalize`).

    Args:
        x: what to whiten.
        mask: which entries count.
        moments: (count, sum, sum of squares) of everything ``x`` is a share of, from `moments`.
        eps: added to the variance, so that a constant becomes 0 and not NaN.
    """
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1.0)
    variance = (squares / count.clamp(min=1.0) - mean.square()).clamp(min=0.0)
    return ((x - mean) * (variance + eps).rsqrt()).to(x.dtype).masked_fill(~mask, 0.0)


def last_token(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """One-hot of the last True of each row; a row that is all False stays all False."""
    true_from_here = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (true_from_here == 1)


def previous_token(mask: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """For each ``t`` the index of the last True strictly before ``t``, -1 where there is none.

    Example: ``[0, 1, 1, 0, 1]`` -> ``[-1, -1, 1, 2, 2]``: holes are stepped over.
    """
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    seen = index.masked_fill(~mask, -1).cummax(1).values
    return torch.cat([seen.new_full((mask.shape[0], 1), -1), seen[:, :-1]], dim=1)
