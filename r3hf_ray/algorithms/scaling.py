"""From rewards in the reward model's units to what the learner trains on: scale, centre, and the rule for missing EOS.

Nothing here has a term in a response's length.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from r3hf_ray.algorithms.masking import last_token


def normalize(
    rewards: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    mean: float,
    scale: float,
    terminal_weight: float,
) -> Float[Tensor, "B T"]:
    """Divide by ``scale``; take ``terminal_weight * mean / scale`` off the last token, and off no other.

    A response's sum becomes ``(sum - terminal_weight * mean) / scale`` whatever its length. A shift of every token, as
    whitening has it in both its forms, would add a multiple of the length, that is pay or charge for long answers.
    Differences of scores need no centring: a constant cancels in them. (For methods that pay shares of R see
    `normalize_shares`. The mean is not taken off a user's own method.)

    Args:
        rewards: from `redistribution.redistribute`, in the reward model's units.
        response_mask: response tokens.
        mean: mean of the sequence reward under the initial policy.
        scale: its standard deviation, > 0.
        terminal_weight: share of the reward paid as `terminal`: 1 - beta_c, and 1 for mode `terminal`.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    _require_scale(scale)
    centred = torch.where(last_token(response_mask), rewards - terminal_weight * mean, rewards)
    return (centred / scale).masked_fill(~response_mask, 0.0)


def normalize_shares(
    rewards: Float[Tensor, "B T"],
    scores: Float[Tensor, "B"],
    response_mask: Bool[Tensor, "B T"],
    *,
    mean: float,
    scale: float,
) -> Float[Tensor, "B T"]:
    """Each token keeps its share of the score: ``(r_t / R) (R - mean) / scale``, for `uniform` and `abc`.

    Their rewards are R times shares that sum to 1, also after mixing with `terminal`. To take the whole mean off the
    last token instead would leave the reward model's offset on all others, and a fine on EOS. A response's sum is
    ``(R - mean) / scale`` whatever its length. Where R is exactly 0 the shares are unknown and the last token gets it.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    _require_scale(scale)
    known = scores != 0.0
    shares = rewards / torch.where(known, scores, 1.0)[:, None]
    shares = torch.where(known[:, None], shares, last_token(response_mask).to(shares.dtype))
    return (shares * ((scores - mean) / scale)[:, None]).masked_fill(~response_mask, 0.0)


def missing_eos(
    rewards: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    truncated: Bool[Tensor, "B"],
    *,
    rule: str,
    penalty: float,
) -> Float[Tensor, "B T"]:
    """What responses cut at the length limit earn; finished ones keep their rewards.

    - ``keep``: their rewards. Invariant, but nothing asks the policy to finish.
    - ``penalty``: their rewards minus ``penalty`` at the last token. A different objective, on purpose.
    - ``zero_credit``: only ``-penalty`` at the last token, so that nothing is earned by filling the window.

    Apply it after `normalize`, and with several models once, to their weighted sum: ``penalty`` is in the units of
    ``rewards``, standard deviations of the sequence reward where one model with weight 1 gives it.

    Raises:
        ValueError: any other ``rule``.
    """
    if rule not in ("keep", "penalty", "zero_credit"):
        raise ValueError(f"no missing-EOS rule {rule!r}; choose keep, penalty or zero_credit")
    if rule == "keep":
        return rewards
    cut = truncated[:, None]
    kept = rewards.masked_fill(cut, 0.0) if rule == "zero_credit" else rewards
    return torch.where(cut & last_token(response_mask), kept - penalty, kept)


def _require_scale(scale: float) -> None:
    if not scale > 0.0:
        raise ValueError(f"the reward scale must be positive, got {scale}; does the reward model tell responses apart?")
