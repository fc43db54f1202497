"""One honest sentence about a reward model, and the settings to start with: thresholds on the numbers of an audit.

Where the thresholds come from: half of the final margin half-way is what credit that grows evenly would show. A
reward model trained on the last token alone had a noise of 2.3 and still useful credit; twice that is called noisy.
Above one half, the ending pays more than the answer, and redistribution is nearly the sparse reward.
"""

from dataclasses import dataclass
from typing import Literal

from r3hf_ray.instruments.audit.measures import Audit, Place

Signal = Literal["likely", "weak", "unlikely", "none", "unknown"]
HALF = 5
ENOUGH_PAIRS = 200
"""With fewer, an accuracy that may be 0.5 says nothing about the model."""
EVEN = 0.5
"""Share of the final margin over 0.5 that must be there half-way."""
NOISY = 4.5
ENDING = 0.5
OFFSET = 0.5
LENGTH_BIAS = 0.10
"""How much oftener the model may prefer the longer answer than people do."""
SHORT = 50.0
"""Answers up to this length keep lambda 0.95. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to expect, and what to start with."""

    signal: Signal
    sentence: str
    mode: str
    """`reward.mode`"""
    critic_init: str
    """`critic.init`"""
    gae_lambda: float
    """`ppo.gae_lambda`"""
    reason: str
    """Why these settings."""
    notes: tuple[str, ...]
    """What else to know before training."""


def advise(audit: Audit) -> Advice:
    """Judge an audit. Pairs can make signal likely, never certain: they do not say which words were good."""
    signal, finding = _signal(audit)
    short = audit.mean_tokens <= SHORT
    if signal == "likely":
        mode, critic, lam = "r3hf", "reward_trunk", 0.95 if short else 1.0
        reason = (
            "Prefix scores are worth paying by the token; the critic takes the reward model's trunk with a zero head, "
            "since with the head it would subtract the prefix scores a second time."
        )
    elif signal == "weak":
        mode, critic, lam = "terminal", "reward_model", 0.95 if short else 1.0
        reason = (
            "A critic that starts at the prefix scores uses the same signal as r3hf would, and training can correct "
            "it; r3hf with reward_trunk is the arm to compare with."
        )
    else:
        mode, critic, lam = "terminal", "reward_trunk", 1.0
        reason = (
            "Nothing here rests on prefix scores: the reward is paid at the end, the critic starts from zero, and "
            "lambda 1 does not lean on it."
        )
    start = f"start with reward.mode = {mode}, critic.init = {critic} and ppo.gae_lambda = {lam:g}"
    return Advice(
        signal=signal,
        sentence=f"{finding}{'' if signal in ('none', 'unknown') else ';'} {start}.",
        mode=mode,
        critic_init=critic,
        gae_lambda=lam,
        reason=reason,
        notes=tuple(_notes(audit)),
    )


def _signal(audit: Audit) -> tuple[Signal, str]:
    final, half = audit.accuracy, _half(audit)
    if final.low <= 0.5:
        if audit.pairs < ENOUGH_PAIRS:
            few = f"{audit.pairs} pairs are too few to tell whether this model ranks at all ({final})"
            return "unknown", f"{few}: use more, and until then"
        fails = f"This model does not rank these pairs ({final}), so there is no signal to redistribute"
        return "none", f"{fails}: train a better one first, or"
    ranks = f"it ranks {final.value:.0%} of the pairs right"
    if half.agrees.low <= 0.5:
        return "unlikely", (
            f"Token rewards from this model are unlikely to carry signal: {ranks}, but half-way through the answers "
            f"it cannot tell them apart ({half.agrees})"
        )
    known = f"{ranks} and {half.agrees.value:.0%} already half-way"
    doubts = _doubts(audit)
    if doubts:
        return "weak", (
            f"Token rewards from this model carry some signal, but weakly: {known}, yet {' and '.join(doubts)}"
        )
    return "likely", f"Token rewards from this model are likely to carry signal: {known}"


def _doubts(audit: Audit) -> list[str]:
    gained = (_half(audit).agrees.value - 0.5) / (audit.accuracy.value - 0.5)
    doubts = [
        (gained < EVEN, f"that is only {gained:.0%} of its final lead over chance"),
        (audit.noise > NOISY, f"scores go up and down {audit.noise:.1f} times as much as the outcome needs"),
        (audit.ending.share > ENDING, f"{audit.ending.share:.0%} of all credit falls on the end token"),
    ]
    return [text for holds, text in doubts if holds]


def _half(audit: Audit) -> Place:
    return audit.places[HALF]


def _notes(audit: Audit) -> list[str]:
    length = audit.length
    excess = length.longer_preferred.value - length.longer_chosen.value
    drift = audit.places[-2].drift
    notes = [
        (
            audit.prompt_offset > OFFSET,
            f"The prompt alone moves the score by {audit.prompt_offset:.1f} standard deviations: keep "
            "reward.subtract_prompt_score = true, or the first token is paid for the question.",
        ),
        (
            audit.ending.finished > 0 and abs(audit.ending.mean) > 0.5,
            f"The end token alone changes the score by {audit.ending.mean:+.1f} standard deviations on average: watch "
            "the share of responses that end by themselves.",
        ),
        (
            excess > LENGTH_BIAS,
            f"It prefers the longer answer in {length.longer_preferred.value:.0%} of the pairs, people in "
            f"{length.longer_chosen.value:.0%}: watch response length.",
        ),
        (
            abs(drift) > 1.0,
            f"Prefix scores drift by {drift:+.1f} standard deviations before the end: on average every token is "
            f"{'paid' if drift > 0 else 'charged'} for being there.",
        ),
    ]
    return [text for holds, text in notes if holds]
