"""Credit of each method against what people marked: do wrong characters earn less, and is a correction worth more?

A perfect preference model need not agree with the marks: people also prefer by what is missing. Read the corrected
answers and the single kinds of error beside the overall area, and every method beside the controls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float64

from r3hf_ray.algorithms.credit import auc
from r3hf_ray.instruments.credit.marked import MarkedAnswer, Text, changed_characters, marked_characters, on_characters
from r3hf_ray.instruments.pages.intervals import Estimate, mean_interval
from r3hf_ray.instruments.scored_answers import Credit
from r3hf_ray.methods import facts_of

RANDOM, EARLIER, LATER = "random", "earlier is better", "later is better"
LOGPROB, UNTRAINED = "reference log-probability", "untrained reward model"
CONTROLS = (RANDOM, EARLIER, LATER, LOGPROB, UNTRAINED)
ENOUGH_ANSWERS = 30
"""Judged answers, each to another question. With fewer a bootstrap is too narrow, and with one it is a point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedMeasures:
    """How well one method's credit agrees with people's marks; areas of 0.5 are chance."""

    method: str
    control: bool
    areas: tuple[float, ...]
    """Of minus credit, marked against unmarked characters, within an answer: one for each question, in the order of the
    file; NaN without both sorts of text. Where a question has several answers, their mean."""
    auroc: Estimate
    """Of `areas`; everything below is over questions too."""
    by_kind: dict[str, Estimate]
    """The same for one kind of mark against unmarked characters."""
    marked_minus_unmarked: Estimate
    """Mean credit of marked less that of unmarked stretches of text, in standard deviations within the answer; negative
    where marked text earns less."""
    removed: Estimate
    """Area of minus credit in the original: text that the correction took out against what it kept."""
    added: Estimate
    """Area of credit in the corrected answer: text that the correction brought in against what it kept."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether any method beats chance and every control, in two or three words, and in one sentence."""

    good: bool
    status: str
    sentence: str
    lead: Estimate | None = None
    """What the best method's area has more than the best control's, question by question; None if not compared."""


@dataclass(frozen=True, slots=True)
class CorrectionAccuracy:
    """How often a way to score whole answers puts the corrected one above the original."""

    name: str
    accuracy: Estimate
    """Over questions; a tie counts one half."""


def with_marked_controls(
    paid: Mapping[str, Credit], texts: Sequence[Text], *, seed: int, more: Mapping[str, Credit]
) -> dict[str, Credit]:
    """The methods' credit, then noise, the place in the answer, and what else is at hand (see `CONTROLS`).

    `segment` pays a sentence at its last token; to compare it with marks, the payment is shared over the sentence.
    """
    rng = np.random.default_rng(seed)
    lengths = [len(text.offsets) for text in texts]
    return {
        **{
            name: [shared(c) for c in credit] if "span_ends" in facts_of(name).needs else credit
            for name, credit in paid.items()
        },
        RANDOM: [rng.standard_normal(length) for length in lengths],
        EARLIER: [np.arange(length, 0, -1) / length for length in lengths],
        LATER: [np.arange(1, length + 1) / length for length in lengths],
        **more,
    }


def shared(credit: Float64[np.ndarray, "T"]) -> Float64[np.ndarray, "T"]:
    """Each payment in equal parts on its token and the unpaid tokens before it.

    Example: ``[0, 0, 3, 0, 1]`` -> ``[1, 1, 1, 0.5, 0.5]``
    """
    span = np.concatenate([[0], np.cumsum(credit != 0.0)[:-1]])
    return (np.bincount(span, weights=credit) / np.bincount(span))[span]


def measure_marked(
    original: Mapping[str, Credit],
    corrected: Mapping[str, Credit],
    answers: Sequence[MarkedAnswer],
) -> list[MarkedMeasures]:
    """One row a method.

    Args:
        original: credit of each marked answer's tokens, by method.
        corrected: credit of the corrected answers' tokens, for the answers that have one, by method.
        answers: the marked answers.
    """
    kinds = sorted({span.kind for answer in answers for span in answer.spans})
    pairs = [(answer, answer.corrected) for answer in answers if answer.corrected is not None]
    amended = [answer for answer, _ in pairs]
    changes = [changed_characters(answer.original.text, fixed.text) for answer, fixed in pairs]
    rows = []
    for method, credit in original.items():
        spread = [on_characters(c, a.original) for c, a in zip(credit, answers, strict=True)]
        fixed = [on_characters(c, text) for c, (_, text) in zip(corrected[method], pairs, strict=True)]
        before = [s for s, a in zip(spread, answers, strict=True) if a.corrected is not None]
        areas = per_question([_blame(s, a, None) for s, a in zip(spread, answers, strict=True)], answers)
        kind_areas = {kind: [_blame(s, a, kind) for s, a in zip(spread, answers, strict=True)] for kind in kinds}
        differences = [_difference(s, a) for s, a in zip(spread, answers, strict=True)]
        removed = [_auc(-s, out) for s, (out, _) in zip(before, changes, strict=True)]
        added = [_auc(s, new) for s, (_, new) in zip(fixed, changes, strict=True)]
        rows.append(
            MarkedMeasures(
                method=method,
                control=method in CONTROLS,
                areas=tuple(areas),
                auroc=mean_interval(areas),
                by_kind={kind: mean_interval(per_question(found, answers)) for kind, found in kind_areas.items()},
                marked_minus_unmarked=mean_interval(per_question(differences, answers)),
                removed=mean_interval(per_question(removed, amended)),
                added=mean_interval(per_question(added, amended)),
            )
        )
    return rows


def per_question(values: Sequence[float], answers: Sequence[MarkedAnswer]) -> list[float]:
    """Mean of the known values of each question's answers, in the order of the file; NaN where none is known.

    Answers to one question are not independent of each other; questions are.
    """
    found: dict[tuple[int, ...], list[float]] = {}
    for value, answer in zip(values, answers, strict=True):
        known = found.setdefault(tuple(answer.original.answer.prompt_ids), [])
        known += [] if math.isnan(value) else [value]
    return [float(np.mean(known)) if known else math.nan for known in found.values()]


def corrections_won(
    margins: Mapping[str, Sequence[float]], answers: Sequence[MarkedAnswer]
) -> list[CorrectionAccuracy]:
    """Accuracy on corrected against original answers.

    Args:
        margins: by name, what each corrected answer scores more than its original.
        answers: those that have a corrected one.
    """
    won = {name: [(float(np.sign(m)) + 1.0) / 2.0 for m in margin] for name, margin in margins.items()}
    return [CorrectionAccuracy(name, mean_interval(per_question(wins, answers))) for name, wins in won.items()]


def finding(rows: Sequence[MarkedMeasures]) -> Finding:
    """Which method finds marked text best, whether better than chance, and better than the best control.

    The two are compared on the same questions: their difference must stay above 0 when questions are drawn again.
    """
    methods = [row for row in rows if not row.control and row.auroc.count]
    controls = [row for row in rows if row.control and row.auroc.count]
    if not methods:
        return Finding(False, "not judged", "No answer has both marked and unmarked text: credit cannot be judged.")
    best, rival = (max(side, key=lambda row: row.auroc.value) for side in (methods, controls))
    if best.auroc.count < ENOUGH_ANSWERS:
        sentence = (
            f"Too few answers to say: {best.auroc.count} can be judged, with both marked and unmarked text and each to "
            f"another question; {ENOUGH_ANSWERS} are needed."
        )
        return Finding(False, "too few answers to say", sentence)
    found = (
        f"{best.method}, picked as the best of {len(methods)} methods, puts marked below unmarked text with AUROC "
        f"{best.auroc} over {best.auroc.count} questions"
    )
    if best.auroc.low <= 0.5:
        sentence = f"No method's credit finds what people marked: {found}, which chance explains."
        return Finding(False, "no better than chance", sentence)
    lead = mean_interval(np.subtract(best.areas, rival.areas).tolist())
    against = (
        f"{found}; question by question that is {lead.value:+.2f} [{lead.low:+.2f}, {lead.high:+.2f}] on the best "
        f"control, '{rival.method}' ({rival.auroc}). The intervals do not count the picking."
    )
    if lead.low <= 0.0:
        sentence = f"Better than chance, no better than a control: {against}"
        return Finding(False, "no better than a control", sentence, lead)
    return Finding(True, "finds marks", f"Token credit finds some of what people marked: {against}", lead)


def blame(credit: Float64[np.ndarray, "T"], answer: MarkedAnswer) -> float:
    """Area of minus credit, marked against unmarked characters of one answer; NaN if it has only one sort."""
    return _blame(on_characters(credit, answer.original), answer, None)


def _blame(spread: Float64[np.ndarray, "C"], answer: MarkedAnswer, kind: str | None) -> float:
    """Area of minus credit for one kind of marked characters against all unmarked ones."""
    text = answer.original.text
    chosen, any_mark = marked_characters(text, answer.spans, kind), marked_characters(text, answer.spans)
    judged = chosen | ~any_mark
    return _auc(-spread[judged], chosen[judged])


def _auc(credit: Float64[np.ndarray, "C"], labels: Bool[np.ndarray, "C"]) -> float:
    known = ~np.isnan(credit)
    return auc(credit[known], labels[known])


def _difference(spread: Float64[np.ndarray, "C"], answer: MarkedAnswer) -> float:
    """Mean over marked stretches less mean over unmarked ones, in standard deviations; NaN without both, 0 if flat."""
    known = ~np.isnan(spread)
    text = answer.original.text
    marked = marked_characters(text, answer.spans)
    edges = sorted({0, len(text), *(e for span in answer.spans for e in (span.start, span.end))})
    stretches = [(a, b) for a, b in pairwise(edges) if text[a:b].strip() and known[a:b].any()]
    means = {
        side: [float(spread[a:b][known[a:b]].mean()) for a, b in stretches if bool(marked[a]) is side]
        for side in (True, False)
    }
    if not (means[True] and means[False]):
        return float("nan")
    std = float(spread[known].std())
    return (float(np.mean(means[True])) - float(np.mean(means[False]))) / std if std > 1e-12 else 0.0
