"""Paying a sequence-level reward token by token (R3HF, arXiv 2411.08302).

Notation, for one response ``y_1..y_T`` to a prompt ``x`` (the functions take a batch of them):

    P_t = R(x, y_<=t)     the reward model's head after token t
    P_0 = R(x, empty)     the head at the last token of the rendered prompt
    R   = R(x, y)         the head at the reward model's own pooling position, which may lie behind token T

Index ``t`` is the action that emits token ``t``. Every ``[B, T]`` result is exactly 0 outside ``response_mask``.
A method is a function ``(scores, response_mask) -> rewards [B, T]``; `METHODS` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from r3hf_ray.algorithms.masking import last_token, previous_token


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixScores:
    """What one forward pass of the reward model says about every prefix of a batch, in its own units.

    Example, prompt of 2 and response of 2 tokens, one template token behind EOS:
    ``prefix=[[0, 0, 0.9, 1.7]], prompt=[0.5], pooled=[2.0]`` -> `r3hf` pays ``[[0, 0, 0.4, 1.1]]``.
    """

    prefix: Float[Tensor, "B T"]
    """P_t on the response, 0 elsewhere."""
    prompt: Float[Tensor, "B"]
    """P_0."""
    pooled: Float[Tensor, "B"]
    """R, the score the reward model was trained to give."""

    def based(self, *, subtract_prompt_score: bool) -> "PrefixScores":
        """The same scores; with P_0 = 0 unless ``subtract_prompt_score``."""
        return self if subtract_prompt_score else replace(self, prompt=torch.zeros_like(self.prompt))


Method = Callable[[PrefixScores, Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


def terminal(scores: PrefixScores, response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The whole reward at the last token: ``r_T = R``, else 0 (paper, Eq. 3). Sums to R."""
    return torch.where(last_token(response_mask), scores.pooled[:, None], 0.0)


def r3hf(
    scores: PrefixScores, response_mask: Bool[Tensor, "B T"], *, subtract_prompt_score: bool = True
) -> Float[Tensor, "B T"]:
    """Each token earns what it adds to the score: ``r_t = P_t - P_{t-1}`` (paper, Eq. 6), with ``P_T := R``.

    Sums to ``R - P_0``, or to ``R`` without ``subtract_prompt_score`` (then ``r_1 = P_1``). Because the last prefix
    score is replaced by the pooled one, a template token behind EOS is credited to token T and the sum stays exact.

    With gamma = 1 this is potential-based shaping of `terminal` by ``Phi(s_t) = P_{t-1}``, 0 at the end, so it keeps
    the optimum (Ng et al., 1999). Cost: nothing beyond the forward pass that gives R.
    """
    scores = scores.based(subtract_prompt_score=subtract_prompt_score)
    after = torch.where(last_token(response_mask), scores.pooled[:, None], scores.prefix)
    previous = previous_token(response_mask)
    before = torch.where(previous >= 0, after.gather(1, previous.clamp(min=0)), scores.prompt[:, None])
    return (after - before).masked_fill(~response_mask, 0.0)


METHODS: dict[str, Method] = {"terminal": terminal, "r3hf": r3hf}
"""Name in the configuration -> function."""

TOTALS: dict[str, Callable[[PrefixScores], Float[Tensor, "B"]]] = {
    "terminal": lambda scores: scores.pooled,
    "r3hf": lambda scores: scores.pooled - scores.prompt,
}
"""What each method sums to over a response."""


def redistribute(
    scores: PrefixScores,
    response_mask: Bool[Tensor, "B T"],
    *,
    mode: str,
    beta_c: float,
    subtract_prompt_score: bool,
) -> Float[Tensor, "B T"]:
    """``beta_c * method + (1 - beta_c) * terminal`` (paper, Eq. 7), in the reward model's own units.

    The terminal part is R itself, whatever ``subtract_prompt_score`` says. Sums to `expected_sum`.

    Raises:
        ValueError: ``mode`` is not a name in `METHODS`.
    """
    _require_method(mode)
    sparse = terminal(scores, response_mask)
    if mode == "terminal":
        return sparse
    dense = METHODS[mode](scores.based(subtract_prompt_score=subtract_prompt_score), response_mask)
    return beta_c * dense + (1.0 - beta_c) * sparse


def expected_sum(scores: PrefixScores, *, mode: str, beta_c: float, subtract_prompt_score: bool) -> Float[Tensor, "B"]:
    """What `redistribute` must sum to over each response: for `r3hf`, ``beta_c * (R - P_0) + (1 - beta_c) * R``.

    Raises:
        ValueError: ``mode`` is not a name in `METHODS`.
    """
    _require_method(mode)
    if mode == "terminal":
        return scores.pooled
    dense = TOTALS[mode](scores.based(subtract_prompt_score=subtract_prompt_score))
    return beta_c * dense + (1.0 - beta_c) * scores.pooled


def telescoping_error(
    rewards: Float[Tensor, "B T"],
    scores: PrefixScores,
    response_mask: Bool[Tensor, "B T"],
    *,
    mode: str,
    beta_c: float,
    subtract_prompt_score: bool,
) -> Float[Tensor, "B"]:
    """``|sum_t r_t - expected| / max(1, |expected|, max_t |P_t|)`` of each response, summed in float64.

    About 1e-7 for sound float32 rewards; orders of magnitude more for a token lost at either end, a wrong base,
    differences rounded to bfloat16, or rewards that were clipped, shifted or whitened. Credit moved within a response
    sums to the same and is not seen. The denominator holds the prefix scores since their rounding is what remains.
    """
    expected = expected_sum(scores, mode=mode, beta_c=beta_c, subtract_prompt_score=subtract_prompt_score).double()
    paid = rewards.masked_fill(~response_mask, 0.0).double().sum(1)
    largest = scores.prefix.masked_fill(~response_mask, 0.0).abs().amax(1).double()
    return (paid - expected).abs() / torch.maximum(expected.abs(), largest).clamp(min=1.0)


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

    Args:
        rewards: from `redistribute`, in the reward model's units.
        response_mask: response tokens.
        mean: mean of the sequence reward under the initial policy.
        scale: its standard deviation, > 0.
        terminal_weight: share of the reward paid as `terminal`: 1 - beta_c, and 1 for mode `terminal`.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if not scale > 0.0:
        raise ValueError(f"the reward scale must be positive, got {scale}; does the reward model tell responses apart?")
    centred = torch.where(last_token(response_mask), rewards - terminal_weight * mean, rewards)
    return (centred / scale).masked_fill(~response_mask, 0.0)


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

    Apply it after `normalize`: ``penalty`` is in the units of ``rewards``, standard deviations of the sequence reward.

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


def _require_method(mode: str) -> None:
    if mode not in METHODS:
        raise ValueError(f"no redistribution method {mode!r}; choose one of {', '.join(METHODS)}")
