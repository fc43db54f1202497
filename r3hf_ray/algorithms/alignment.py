"""Scores of a reward model with tokens of its own, taken at the ends of the policy's tokens.

Both token sequences spell the same text. Policy token ``t`` ends behind character ``p_t``, the reward model's token
``j`` behind ``q_j``. ``P_t`` is the score at the last ``j`` with ``q_j <= p_t``: the latest one that has read nothing
the policy had not yet sampled. What `redistribution` makes of such scores sums to what it sums to with the reward
model's own, since ``P_0`` and ``R`` are the same numbers; a policy token within which no ``q_j`` lies has the ``P`` of
the token before it, so its difference is exactly 0.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from r3hf_ray.algorithms.masking import last_token
from r3hf_ray.algorithms.redistribution import PrefixScores


def boundaries(policy_ends: Int64[np.ndarray, "T"], reader_ends: Int64[np.ndarray, "S"]) -> Int64[np.ndarray, "T"]:
    """For each policy token the last reader token that ends, with all before it, at or before its own end; -1: none.

    Example, ``"unhappily"`` as ``un|happi|ly`` and as ``u|nhap|pily``: ``[2, 7, 9]``, ``[1, 5, 9]`` -> ``[0, 1, 2]``.

    Args:
        policy_ends: where each policy token ends, not decreasing. [characters]
        reader_ends: where each of the reader's tokens ends; one that ends before a token to its left counts as ending
            with that. [characters]
    """
    return np.searchsorted(np.maximum.accumulate(reader_ends), policy_ends, side="right") - 1


def unmapped(boundary: Int64[np.ndarray, "T"]) -> Bool[np.ndarray, "T"]:
    """Policy tokens within which no reader token ends, from `boundaries`."""
    return np.diff(boundary, prepend=-1) == 0


def align(scores: PrefixScores, columns: Int64[Tensor, "B T"], response_mask: Bool[Tensor, "B T"]) -> PrefixScores:
    """The reader's scores in the policy's index: ``P_t`` as above, ``P_T := R`` at each response's last token.

    Args:
        scores: of the reader's tokens, ``prefix`` of ``[B, S]``.
        columns: of ``scores.prefix``, for each policy token; -1 before the first boundary, where ``P_t = P_0``.
        response_mask: response tokens of the policy.
    """
    prefix = torch.where(columns >= 0, scores.prefix.gather(1, columns.clamp(min=0)), scores.prompt[:, None])
    prefix = torch.where(last_token(response_mask), scores.pooled[:, None], prefix)
    return replace(scores, prefix=prefix.masked_fill(~response_mask, 0.0))
