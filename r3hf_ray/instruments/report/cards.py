"""Coloured answers: from what is made here `templates/drawing.js` draws an answer in rows, one a method."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from r3hf_ray.methods import METHODS

HEAD, TAIL = 200, 60
"""Tokens shown of a longer answer: its end too, since most methods pay most there. [tokens]"""
NOTES = {name: facts.note for name, facts in METHODS.items()}
"""What each method does, for a reader who has not seen the code."""
OWN_NOTE = "another method of this installation"
KNOWN, KNOWN_NOTE = "known credit", "what each word is truly worth, on a scale of its own"
MARKS = {"plus-mark": "truly helped", "minus-mark": "truly hurt"}
"""CSS class of an underline -> what it means, where the true credit is known."""

ROUNDING = 1e-9
T = TypeVar("T")
Card = dict[str, Any]


def card(
    *,
    label: str,
    facts: Sequence[tuple[str, str]],
    prompt: str,
    texts: Sequence[Mapping[str, Any]],
    panels: Sequence[Mapping[str, Any]],
) -> Card:
    """One answer, or two side by side, in every panel's colours."""
    return {"label": label, "facts": [list(fact) for fact in facts], "prompt": prompt, "texts": texts, "panels": panels}


def answer_text(
    tokens: Sequence[str],
    ids: Sequence[int],
    curve: Sequence[float],
    *,
    start: float,
    marks: Sequence[int] = (),
    words: Sequence[str] = (),
    tags: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> dict[str, Any]:
    """The tokens of an answer and its curve of prefix scores; of a long one both ends.

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
    return {
        "title": title,
        "note": note,
        "text": shown(tokens),
        "id": shown(ids),
        "gap": HEAD,
        "more": max(0, len(tokens) - HEAD - TAIL),
        "curve": [number(score) for score in shown(curve)],
        "start": number(start),
        "marks": shown(marks or [0] * len(tokens)),
        "words": shown(words or [""] * len(tokens)),
        "tags": shown(tags or [""] * len(tokens)),
    }


def panel(
    title: str,
    note: str,
    values: Sequence[float] | np.ndarray | None,
    *,
    scale: float,
    of: int = 0,
    tagged: bool = False,
    own: bool = False,
    summed: bool = True,
) -> dict[str, Any]:
    """One row of colours for an answer.

    Args:
        title: of the row.
        note: what it shows, for a reader who has not seen the code.
        values: one a token of the whole answer; None: only the answer's marks are shown.
        scale: of full colour.
        of: which of the card's texts.
        tagged: whether the text's tags stand over it.
        own: whether the run was paid by it.
        summed: whether the sum of the values means something.
    """
    total = None if values is None or not summed else math.fsum(values)
    return {
        "title": title,
        "note": note,
        "values": None if values is None else [number(value) for value in shown(values)],
        "total": number(total),
        "scale": scale,
        "of": of,
        "tagged": tagged,
        "own": own,
    }


def mark_of(credit: float) -> int:
    """The mark of a token of known credit: 1 where it helped, -1 where it hurt, 0 where it is 0 but for rounding."""
    return (credit > ROUNDING) - (credit < -ROUNDING)


def notes_of(cards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each row of the cards shows, by its title, each once."""
    return {row["title"]: row["note"] for one in cards for row in one["panels"]}


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of `NOTES`, then any other."""
    named = list(methods)
    return [*(name for name in NOTES if name in named), *(name for name in named if name not in NOTES)]


def scale_of(credit: Iterable[np.ndarray]) -> float:
    """Credit of full colour: the 95% quantile of its size where it is not zero."""
    sizes = np.abs(np.concatenate([np.zeros(0), *credit]))
    return float(np.quantile(sizes[sizes > 0], 0.95)) if (sizes > 0).any() else 1.0


def shown(values: Sequence[T] | np.ndarray) -> list[T]:
    """The first `HEAD` and the last `TAIL` of a sequence."""
    return [*values[:HEAD], *values[max(HEAD, len(values) - TAIL) :]]


def number(value: float | None) -> float | None:
    """Four significant digits; null for what is missing or not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
