"""`r3hf audit`: what preference pairs say about a reward model's prefix scores, before anything is trained with them.

Bradley-Terry training looks at the end of an answer only; nothing promises that the score of half an answer means
anything. Pairs cannot show where in a text credit belongs (`r3hf credit` can, on text with known mistakes). They do
show whether prefixes know anything at all, and how much of what a token would be paid is noise, ending or drift.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r3hf_ray.algorithms.credit import pearson
from r3hf_ray.instruments.pages.intervals import Estimate, share_above_zero
from r3hf_ray.instruments.scored_answers import Scored, ScoreUnit, largest_telescoping_error, r3hf_credit, unit_of

PARTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """All answers read up to one tenth of their own length; scores in standard deviations of the final score."""

    read: float
    """Share of the answer that has been read, 0 to 1."""
    agrees: Estimate
    """Pairs whose chosen answer scores higher here; ties count one half."""
    drift: float
    """Mean change of the score since the prompt."""
    low: float
    """10% quantile of that change over answers."""
    high: float
    """90% quantile."""
    spread: float
    """Standard deviation of the prefix score over answers."""
    foretells: float
    """Correlation, over answers, of the change so far with the whole change; NaN where nothing varies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The jump of the score at the token that ends an answer, template text behind it included."""

    mean: float
    """In standard deviations of the score, over answers that end by themselves; NaN without any."""
    share: float
    """Of all absolute token credit."""
    template_share: float
    """Of it, the part of template text behind the end token, which a policy never emits."""
    finished: float
    """Share of the answers that end by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """What the score has to do with length."""

    correlation: float
    """Of score and length, over answers."""
    difference_correlation: float
    """Of the two differences, over pairs: free of what the prompt does to both."""
    longer_chosen: Estimate
    """Accuracy of "the longer answer wins", over pairs of different length."""
    longer_preferred: Estimate
    """How often the model prefers the longer one, over the same pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """All numbers of an audit."""

    pairs: int
    mean_tokens: float
    """Of an answer. [tokens]"""
    score_mean: float
    score_std: float
    """In the reward model's own units; the unit of everything below."""
    accuracy: Estimate
    """Pairs whose chosen answer scores higher; ties count one half."""
    places: tuple[Place, ...]
    """After 0, 1, .. 10 tenths of each answer."""
    credit_by_part: tuple[float, ...]
    """Share of absolute token credit in each tenth of an answer, the end token left out."""
    first_share: float
    """Share of absolute token credit on the first token."""
    ending: Ending
    prompt_offset: float
    """Standard deviation of R(x, empty) over prompts: what Bradley-Terry never sees."""
    abs_credit: float
    """Mean over answers of ``sum_t |r_t|``."""
    noise: float
    """`abs_credit` over that of a walk whose independent steps alone make up the score: 1 if nothing is taken back."""
    length: Length
    telescoping_error: float

    @property
    def unit(self) -> ScoreUnit:
        """Zero and unit of everything."""
        return ScoreUnit(self.score_mean, self.score_std)


def audit_numbers(pairs: Sequence[tuple[Scored, Scored]]) -> Audit:
    """The numbers of at least one pair (chosen, rejected).

    Raises:
        ModelError: the model gives every answer the same score.
    """
    answers = [answer for pair in pairs for answer in pair]
    unit = unit_of(answers)
    credit = r3hf_credit(answers, unit)
    tokens = float(np.mean([len(c) for c in credit]))
    total = float(np.mean([np.abs(c).sum() for c in credit]))
    return Audit(
        pairs=len(pairs),
        mean_tokens=tokens,
        score_mean=unit.mean,
        score_std=unit.std,
        accuracy=share_above_zero(np.array([chosen.score - rejected.score for chosen, rejected in pairs])),
        places=tuple(_place(answers, part, unit.std) for part in range(PARTS + 1)),
        credit_by_part=_by_part(answers, credit),
        first_share=_ratio(math.fsum(abs(c[0]) for c in credit), total * len(credit)),
        ending=_ending(answers, credit, unit.std),
        prompt_offset=float(np.std([chosen.prompt_score for chosen, _ in pairs])) / unit.std,
        abs_credit=total,
        noise=total / math.sqrt(2 / math.pi * tokens),
        length=_length(pairs),
        telescoping_error=largest_telescoping_error(answers, unit),
    )


def score_after(scored: Scored, part: int) -> float:
    """The score after ``part`` tenths of the response: R(x, empty) after none, R(x, y) after all."""
    if part == 0:
        return scored.prompt_score
    return scored.score if part == PARTS else float(scored.prefix[math.ceil(part * len(scored.prefix) / PARTS) - 1])


def _place(answers: Sequence[Scored], part: int, std: float) -> Place:
    """``answers`` are chosen and rejected in turn."""
    here = np.array([score_after(answer, part) for answer in answers]) / std
    change = here - np.array([answer.prompt_score for answer in answers]) / std
    whole = np.array([answer.score - answer.prompt_score for answer in answers]) / std
    leads = here[::2] - here[1::2]
    low, high = np.quantile(change, [0.1, 0.9])
    return Place(
        read=part / PARTS,
        agrees=share_above_zero(
            leads if part else np.zeros_like(leads)
        ),  # the prompt is shared: what differs there is rounding
        drift=float(change.mean()),
        low=float(low),
        high=float(high),
        spread=float(here.std()),
        foretells=pearson(change, whole),
    )


def _by_part(answers: Sequence[Scored], credit: Sequence[np.ndarray]) -> tuple[float, ...]:
    shares, total = np.zeros(PARTS), 0.0
    for answer, paid in zip(answers, credit, strict=True):
        part = np.arange(len(paid)) * PARTS // len(paid)
        size = np.abs(paid)
        total += size.sum()
        shares += np.bincount(part, weights=np.where(_is_end(answer), 0.0, size), minlength=PARTS)
    return tuple(_ratio(share, total) for share in shares)


def _is_end(answer: Scored) -> np.ndarray:
    """One-hot of the token that ends the answer; all False for one that was cut."""
    return (np.arange(len(answer.prefix)) == len(answer.prefix) - 1) & answer.finished


def _ending(answers: Sequence[Scored], credit: Sequence[np.ndarray], std: float) -> Ending:
    ended = [(a, c) for a, c in zip(answers, credit, strict=True) if a.finished]
    total = float(sum(np.abs(c).sum() for c in credit))
    return Ending(
        mean=float(np.mean([c[-1] for _, c in ended])) if ended else float("nan"),
        share=_ratio(math.fsum(abs(c[-1]) for _, c in ended), total),
        template_share=_ratio(math.fsum(abs(a.score - a.prefix[-1]) / std for a, _ in ended), total),
        finished=len(ended) / len(answers),
    )


def _length(pairs: Sequence[tuple[Scored, Scored]]) -> Length:
    longer = np.array([len(chosen.prefix) - len(rejected.prefix) for chosen, rejected in pairs], dtype=np.float64)
    better = np.array([chosen.score - rejected.score for chosen, rejected in pairs])
    answers = [answer for pair in pairs for answer in pair]
    lengths = np.array([len(a.prefix) for a in answers], dtype=np.float64)
    unequal = longer != 0
    return Length(
        correlation=pearson(np.array([a.score for a in answers]), lengths),
        difference_correlation=pearson(better, longer),
        longer_chosen=share_above_zero(longer[unequal]),
        longer_preferred=share_above_zero((better * np.sign(longer))[unequal]),
    )


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole > 0 else 0.0
