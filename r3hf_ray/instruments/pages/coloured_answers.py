"""An answer in rows of the same tokens, one row a method; `templates/coloured_answers.js` draws them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from r3hf_ray.methods import METHODS

HEAD, TAIL = 200, 60
"""Tokens shown of a longer answer: its end too, since most methods pay most there. [tokens]"""
TRUE_UNDERLINES = {"plus-mark": "truly helped", "minus-mark": "truly hurt"}
"""CSS class of an underline -> what it means, where the true credit is known."""
ROUNDING = 1e-9
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerText:
    """The tokens of an answer and its curve of prefix scores; of a long one both ends (see `answer_text`)."""

    text: Sequence[str]
    id: Sequence[int]
    gap: int
    """Place of the first token after those left out."""
    more: int
    """How many are left out."""
    curve: Sequence[float]
    start: float
    marks: Sequence[int]
    words: Sequence[str]
    tags: Sequence[str]
    title: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourRow:
    """One row of colours for an answer (see `colour_row`)."""

    title: str
    note: str
    values: Sequence[float] | None
    total: float | None
    scale: float
    of: int
    tagged: bool
    own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ColouredAnswer:
    """One answer, or two side by side, in every row's colours."""

    label: str
    facts: Sequence[tuple[str, str]]
    prompt: str
    texts: Sequence[AnswerText]
    rows: Sequence[ColourRow]


def answer_text(
    tokens: Sequence[str],
    ids: Sequence[int],
    curve: Sequence[float] | np.ndarray,
    *,
    start: float,
    marks: Sequence[int] = (),
    words: Sequence[str] = (),
    tags: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> AnswerText:
    """The shown part of an answer.

    Args:
        tokens: text of each.
        ids: of the tokens.
        curve: score of everything up to each token.
        start: score of the prompt alone.
        marks: for each token, 1 where it is known to help, -1 where it is known to hurt, else 0.
        words: for each token, what is known of it; shown when it is pointed at.
        tags: for each token, words to put over it.
        title: what to call the answer where there are two.
        note: beside the title.
    """
    return AnswerText(
        title=title,
        note=note,
        text=shown(tokens),
        id=shown(ids),
        gap=HEAD,
        more=max(0, len(tokens) - HEAD - TAIL),
        curve=[float(score) for score in shown(curve)],
        start=start,
        marks=shown(marks or [0] * len(tokens)),
        words=shown(words or [""] * len(tokens)),
        tags=shown(tags or [""] * len(tokens)),
    )


def colour_row(
    title: str,
    note: str,
    values: Sequence[float] | np.ndarray | None,
    *,
    scale: float,
    of: int = 0,
    tagged: bool = False,
    own: bool = False,
    summed: bool = True,
) -> ColourRow:
    """The shown part of a row.

    Args:
        title: of the row.
        note: what it shows, for a reader who has not seen the code.
        values: one a token of the whole answer; None: only the answer's marks are shown.
        scale: of full colour.
        of: which of the answer's texts.
        tagged: whether the text's tags stand over it.
        own: whether the run was paid by it.
        summed: whether the sum of the values means something.
    """
    kept = None if values is None else [float(value) for value in shown(values)]
    total = None if values is None or not summed else math.fsum(values)
    return ColourRow(title=title, note=note, values=kept, total=total, scale=scale, of=of, tagged=tagged, own=own)


def known_credit_row(credit: Sequence[float] | np.ndarray) -> ColourRow:
    """The row of credit that is known, with a scale of its own."""
    scale = float(np.abs(credit).max()) or 1.0
    return colour_row("known credit", "what each word is truly worth, on a scale of its own", credit, scale=scale)


def mark_of(credit: float) -> int:
    """The mark of a token of known credit: 1 where it helped, -1 where it hurt, 0 where it is 0 but for rounding."""
    return int(credit > ROUNDING) - int(credit < -ROUNDING)


def ending_of(finished: bool) -> tuple[str, str]:
    """The fact of how an answer ended."""
    return ("", "ended by itself" if finished else "cut at the limit")


def notes_of(answers: Iterable[ColouredAnswer]) -> dict[str, str]:
    """What each row of the answers shows, by its title, each once."""
    return {row.title: row.note for answer in answers for row in answer.rows}


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of `METHODS`, then any other."""
    named = list(methods)
    return [*(name for name in METHODS if name in named), *(name for name in named if name not in METHODS)]


def scale_of(credit: Iterable[np.ndarray]) -> float:
    """Credit of full colour: the 95% quantile of its size where it is not zero."""
    sizes = np.abs(np.concatenate([np.zeros(0), *credit]))
    return float(np.quantile(sizes[sizes > 0], 0.95)) if (sizes > 0).any() else 1.0


def spread_out(values: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Indices of up to ``count`` answers from the best to the worst: both ends and evenly between them."""
    order = np.argsort(-np.asarray(values), kind="stable")
    picked = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [int(order[place]) for place in picked]


def shown(values: Sequence[T] | np.ndarray) -> list[T]:
    """The first `HEAD` and the last `TAIL` of a sequence."""
    return [*values[:HEAD], *values[max(HEAD, len(values) - TAIL) :]]
