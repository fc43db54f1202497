"""An answer in rows of the same tokens, one row a method; `templates/coloured_answers.js` draws them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from r3hf_ray.methods import METHODS, facts_of

HEAD, TAIL = 200, 60
"""Tokens shown of a longer answer: its end too, since most methods pay most there. [tokens]"""
TRUE_UNDERLINES = {"plus-mark": "truly helped", "minus-mark": "truly hurt"}
"""CSS class of an underline -> what it means, where the true credit is known."""
ROUNDING = 1e-9
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerText:
    """The tokens of an answer and its curve of prefix scores; what is left out of a long one is left out by `drawn`."""

    text: Sequence[str]
    """Of each token."""
    id: Sequence[int]
    """Of each token."""
    curve: Sequence[float]
    """Score of everything up to each token."""
    start: float
    """Score of the prompt alone."""
    marks: Sequence[int] = ()
    """For each token, 1 where it is known to help, -1 where it is known to hurt, else 0; empty: nothing is known."""
    words: Sequence[str] = ()
    """For each token, what is known of it; shown when it is pointed at."""
    tags: Sequence[str] = ()
    """For each token, words to put over it."""
    title: str = ""
    """What to call the answer where there are two."""
    note: str = ""
    """Beside the title."""


@dataclass(frozen=True, slots=True)
class ColourRow:
    """One row of colours for an answer.

    Example: ``ColourRow("r3hf", "each token earns what it adds", [0.4, 1.1], scale=1.1)``
    """

    title: str
    note: str
    """What it shows, for a reader who has not seen the code."""
    values: Sequence[float] | np.ndarray | None
    """One a token of the whole answer; None: only the answer's marks are shown."""
    scale: float
    """Of full colour."""
    of: int = 0
    """Which of the answer's texts."""
    tagged: bool = False
    """Whether the text's tags stand over it."""
    own: bool = False
    """Whether the run was paid by it."""
    summed: bool = True
    """Whether the sum of the values means something."""

    @property
    def total(self) -> float | None:
        """Sum of the values, of a row that has one."""
        return math.fsum(self.values) if self.values is not None and self.summed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColouredAnswer:
    """One answer, or two side by side, in every row's colours."""

    label: str
    facts: Sequence[tuple[str, str]]
    prompt: str
    texts: Sequence[AnswerText]
    rows: Sequence[ColourRow]


def drawn(answer: ColouredAnswer) -> dict[str, Any]:
    """What the script draws of an answer: its fields, of a long one both ends."""

    def text(one: AnswerText) -> dict[str, Any]:
        zeros, nothing = [0] * len(one.text), [""] * len(one.text)
        filled = asdict(one) | {"marks": one.marks or zeros, "words": one.words or nothing, "tags": one.tags or nothing}
        ends = {name: shown(filled[name]) for name in ("text", "id", "curve", "marks", "words", "tags")}
        return filled | ends | {"gap": HEAD, "more": max(0, len(one.text) - HEAD - TAIL)}

    def row(one: ColourRow) -> dict[str, Any]:
        return asdict(one) | {"total": one.total, "values": None if one.values is None else shown(one.values)}

    return asdict(answer) | {"texts": list(map(text, answer.texts)), "rows": list(map(row, answer.rows))}


def known_credit_row(credit: Sequence[float] | np.ndarray) -> ColourRow:
    """The row of credit that is known, with a scale of its own."""
    scale = float(np.abs(credit).max()) or 1.0
    return ColourRow("known credit", "what each word is truly worth, on a scale of its own", credit, scale=scale)


def method_rows(paid: Mapping[str, np.ndarray], *, scale: float) -> list[ColourRow]:
    """A row for each method of the table, in its order."""
    return [ColourRow(name, facts_of(name).note, paid[name], scale) for name in in_order(paid)]


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
