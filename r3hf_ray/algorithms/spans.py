"""Where the spans of a response end, by what `redistribution.segment` pays. Every response's last token ends one.

Each rule looks at the prefix only, so the score at the last span end is a function of the state.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from r3hf_ray.algorithms.masking import last_token, previous_token

SENTENCE_ENDS = (".", "!", "?", "\n")


def ends_sentence(text: str) -> bool:
    """Whether a token's text ends with a full stop, `!`, `?` or a line break; spaces behind that do not count."""
    return text.rstrip(" ").endswith(SENTENCE_ENDS)


def sentence_ends(
    token_ids: Int64[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], *, end_ids: Int64[Tensor, "N"]
) -> Bool[Tensor, "B T"]:
    """Tokens whose id is in ``end_ids``: those whose text ends a sentence."""
    return (torch.isin(token_ids, end_ids) & response_mask) | last_token(response_mask)


def ngram_ends(response_mask: Bool[Tensor, "B T"], *, length: int) -> Bool[Tensor, "B T"]:
    """Every ``length``-th response token; the last span may be shorter."""
    return ((response_mask.cumsum(1) % length == 0) & response_mask) | last_token(response_mask)


def entropy_ends(
    entropy: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], *, threshold: float
) -> Bool[Tensor, "B T"]:
    """Tokens after which the next one was hard to foresee: its distribution's entropy is above ``threshold``.

    The rule of DenseRewardRLHF-PPO (Yin et al., 2025): at 0 every token is a span, at infinity the response is one.

    Args:
        entropy: of the distribution each token was drawn from, under the reference. [nats]
        response_mask: response tokens.
        threshold: in nats.
    """
    previous = previous_token(response_mask)
    starts = response_mask & (entropy > threshold) & (previous >= 0)
    hits = torch.zeros_like(previous).scatter_add(1, previous.clamp(min=0), starts.long())
    return (hits > 0) | last_token(response_mask)
