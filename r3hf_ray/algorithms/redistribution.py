"""Paying a sequence-level reward token by token (R3HF, arXiv 2411.08302).

Notation, for one response ``y_1..y_T`` to a prompt ``x`` (the functions take a batch of them):

    P_t = R(x, y_<=t)     the reward model's head after token t
    P_0 = R(x, empty)     the head at the last token of the rendered prompt
    R   = R(x, y)         the head at the reward model's own pooling position, which may lie behind token T

Index ``t`` is the action that emits token ``t``. Every ``[B, T]`` result is exactly 0 outside ``response_mask``.
A method is a function ``(scores, response_mask) -> rewards [B, T]``; `FUNCTIONS` names them, and `methods.METHODS` says
what each is like. Those that read more (`abc`, `segment`) take it by keyword and are bound to it before `redistribute`
calls them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from r3hf_ray.algorithms.masking import last_token, previous_token
from r3hf_ray.methods import METHODS, facts_of


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

    def carried_by(self, other: "PrefixScores", response_mask: Bool[Tensor, "B T"]) -> "PrefixScores":
        """Prompt score and reward of these, on the way between them the steps of ``other``: ``P_t := P_0 + Q_t - Q_0``.

        A potential of the state like any other, so all that holds of `r3hf` still holds; the last token earns what is
        left, ``R - P_{T-1}``, the one difference with R in it: to `drop` that jump would leave ``Q_{T-1} - Q_0``. Both
        must be in one unit, such as logits of the same preferences.
        """
        steps = self.prompt[:, None] + other.prefix - other.prompt[:, None]
        return replace(self, prefix=steps.masked_fill(~response_mask, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RedistributionInputs:
    """What a user's own method reads: ``def method(inputs: RedistributionInputs) -> Float[Tensor, "B T"]``.

    It returns what each token earns in the reward model's units, any finite floats; what it puts outside the response
    is set to 0. Nothing is promised of its sum, which is logged (``r3hf/sum/mean``), nor of the optimum.

    Example, R3HF at every other token: ``return segment(inputs.scores, inputs.response_mask, span_ends=ngram_ends(
    inputs.response_mask, length=2))``.
    """

    scores: PrefixScores
    """With P_0 = 0 under ``subtract_prompt_score = false``, and as `settle_eos_jump` leaves them."""
    response_mask: Bool[Tensor, "B T"]
    token_ids: Int64[Tensor, "B T"]
    """Prompt and response, right-padded."""
    finished: Bool[Tensor, "B"]
    """Ended with EOS, not at the length limit."""
    behavior_logprobs: Float[Tensor, "B T"]
    """Of the sampler. [nats]"""
    ref_logprobs: Float[Tensor, "B T"]
    """Of the frozen reference. [nats]"""
    by_model: Mapping[str, PrefixScores]
    """Of every reward model of the run, by name; ``"reward"`` is `model.reward_model`. So one's prefixes can carry the
    reward of another; a model of weight 0 is read and pays nothing. Under ``reward.prefixes_from`` the prefixes of
    ``"reward"`` are the borrowed ones already (`PrefixScores.carried_by`), its prompt score and reward its own."""


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


def segment(
    scores: PrefixScores, response_mask: Bool[Tensor, "B T"], *, span_ends: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """`r3hf` summed over spans, paid at each span's last token: ``P_end - P_(end of the span before)``.

    Sums to ``R - P_0``. Potential-based like `r3hf`, with the score at the last span end as ``Phi``, so it keeps the
    optimum at gamma = 1; it leaves out what the reward model thinks in the middle of a span. A span for each token is
    `r3hf`; one span is `terminal` minus P_0. Cost: none by sentences and n-grams, one softmax more by entropy.

    Args:
        scores: of the batch.
        response_mask: response tokens.
        span_ends: from `spans`; the last response token ends a span whatever it says there.
    """
    return r3hf(scores, (span_ends & response_mask) | last_token(response_mask))


def uniform(scores: PrefixScores, response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The same for every token, ``R / T``. Sums to R. Cost: none.

    Not potential-based: what token t is paid depends on what comes after it. Each response still earns R, so the best
    policy is the same, but the reward still to come after t lacks the share that was paid before t for what t did:
    with it, as with `abc`, the policy gradient undervalues late tokens.
    """
    length = response_mask.sum(1).clamp(min=1)
    return (scores.pooled / length)[:, None].expand(response_mask.shape).masked_fill(~response_mask, 0.0)


def abc(
    scores: PrefixScores, response_mask: Bool[Tensor, "B T"], *, attention: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Attention-based credit (Chan et al., 2024, arXiv 2402.00782): ``r_t = R a_t``, of which ``beta`` goes to tokens.

    With ``beta_c = beta`` in `redistribute` this is their ``beta R a_t + (1 - beta) R [t = T]``. Sums to R. Every token
    gets the sign of R. Not potential-based, for the reason of `uniform`: the weights know the finished text.

    Cost: the reward model runs with eager attention and keeps its maps, ``layers x heads x T^2`` numbers a row.

    Args:
        scores: of the batch.
        response_mask: response tokens.
        attention: what the last response token pays to each token, not negative; renormalised over the response.
    """
    inside = attention.masked_fill(~response_mask, 0.0)
    total = inside.sum(1, keepdim=True)
    known = total > 0.0
    shares = torch.where(known, inside / torch.where(known, total, 1.0), last_token(response_mask))
    return scores.pooled[:, None] * shares


FUNCTIONS: dict[str, Callable[..., Float[Tensor, "B T"]]] = {
    "terminal": terminal,
    "r3hf": r3hf,
    "uniform": uniform,
    "abc": abc,
    "segment": segment,
}
"""By the names of `methods.METHODS`, where the facts of each stand."""


def every_method(
    scores: PrefixScores, response_mask: Bool[Tensor, "B T"], **at_hand: Tensor
) -> dict[str, Float[Tensor, "B T"]]:
    """What each method pays by itself, by name; one whose `MethodFacts.needs` are not at hand is left out."""
    return {
        mode: FUNCTIONS[mode](scores, response_mask, **{name: at_hand[name] for name in facts.needs})
        for mode, facts in METHODS.items()
        if at_hand.keys() >= set(facts.needs)
    }


def settle_eos_jump(
    scores: PrefixScores, response_mask: Bool[Tensor, "B T"], finished: Bool[Tensor, "B"], *, rule: str
) -> PrefixScores:
    """Scores whose differences pay the last jump ``J = R - P_{T-1}`` of finished responses by another rule.

    J holds what the reward model thinks of EOS and of the template behind it; for most it is the largest difference.

    - ``keep``: the scores themselves; EOS earns J.
    - ``spread``: ``P_t + J t / T``, so every token earns J / T on top. The sum stays; not potential-based, as an early
      token is paid for how the response ends.
    - ``drop``: ``R := P_{T-1}``, so EOS earns 0. The sum becomes ``P_{T-1} - P_0``: another objective, the score of the
      response before its EOS, under which nothing rewards ending; watch ``rollout/eos_frac``.

    A response cut at the length limit has no EOS and keeps its scores.

    Raises:
        ValueError: any other ``rule``.
    """
    if rule not in ("keep", "spread", "drop"):
        raise ValueError(f"no EOS-jump rule {rule!r}; choose keep, spread or drop")
    if rule == "keep":
        return scores
    jump = torch.where(finished, eos_jump(scores, response_mask), 0.0)
    if rule == "drop":
        return replace(scores, pooled=scores.pooled - jump)
    count = response_mask.cumsum(1)
    part = jump[:, None] * count / count[:, -1:].clamp(min=1)
    return replace(scores, prefix=(scores.prefix + part).masked_fill(~response_mask, 0.0))


def eos_jump(scores: PrefixScores, response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """``R - P_{T-1}``, what `r3hf` pays the last token of each response."""
    return r3hf(scores, response_mask).masked_fill(~last_token(response_mask), 0.0).sum(1)


def redistribute(
    scores: PrefixScores,
    response_mask: Bool[Tensor, "B T"],
    *,
    mode: str,
    beta_c: float,
    subtract_prompt_score: bool,
    method: Method | None = None,
) -> Float[Tensor, "B T"]:
    """``beta_c * method + (1 - beta_c) * terminal`` (paper, Eq. 7), in the reward model's own units.

    The terminal part is R itself, whatever ``subtract_prompt_score`` says. Sums to `expected_sum`.

    Args:
        scores: of the batch, from `settle_eos_jump` where that is not to be kept.
        response_mask: response tokens.
        mode: a name in `FUNCTIONS`, or a user's ``package.module:function``.
        beta_c: share of the reward that the method redistributes.
        subtract_prompt_score: False sets P_0 to 0.
        method: what ``mode`` names, bound to whatever it reads besides the two; may be left out where that is nothing.

    Raises:
        ValueError: ``mode`` is not a name in `FUNCTIONS` and there is no ``method``, or its result has the wrong shape.
    """
    if method is None:
        _require_method(mode)
        method = FUNCTIONS[mode]
    sparse = terminal(scores, response_mask)
    dense = method(scores.based(subtract_prompt_score=subtract_prompt_score), response_mask)
    if dense.shape != response_mask.shape:
        raise ValueError(f"{mode} gives rewards of shape {list(dense.shape)}, not {list(response_mask.shape)}")
    return beta_c * dense.to(sparse.dtype).masked_fill(~response_mask, 0.0) + (1.0 - beta_c) * sparse


def expected_sum(scores: PrefixScores, *, mode: str, beta_c: float, subtract_prompt_score: bool) -> Float[Tensor, "B"]:
    """What `redistribute` must sum to over each response: for `r3hf`, ``beta_c * (R - P_0) + (1 - beta_c) * R``.

    Raises:
        ValueError: ``mode`` is not a name in `FUNCTIONS`.
    """
    _require_method(mode)
    paid_before = scores.based(subtract_prompt_score=subtract_prompt_score).prompt
    dense = scores.pooled - paid_before if METHODS[mode].total == "R - P_0" else scores.pooled
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

    A user's own method (``package.module:function``) may sum to anything: 0 if its sum is finite, else NaN.
    """
    if facts_of(mode).total == "anything":
        return 0.0 * rewards.masked_fill(~response_mask, 0.0).double().sum(1)
    expected = expected_sum(scores, mode=mode, beta_c=beta_c, subtract_prompt_score=subtract_prompt_score).double()
    paid = rewards.masked_fill(~response_mask, 0.0).double().sum(1)
    largest = scores.prefix.masked_fill(~response_mask, 0.0).abs().amax(1).double()
    return (paid - expected).abs() / torch.maximum(expected.abs(), largest).clamp(min=1.0)


def _require_method(mode: str) -> None:
    if mode not in FUNCTIONS:
        raise ValueError(f"no redistribution method {mode!r}; choose one of {', '.join(METHODS)}")
