"""Coloured texts: what the script of a page needs to draw answers with every token in the colour of its credit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.audit.answers import Credit, Scored, token_texts
from r3hf_ray.tracking.report import MAX_TOKENS

NOTES = {
    "r3hf": "each token gets the change it makes in the score",
    "segment": "the same, paid once a sentence",
    "abc": "parts of the score by the reward model's attention",
    "uniform": "an equal part of the score for every token",
    "terminal": "the whole score at the end: the ordinary sparse reward",
}
"""What each method does, for a reader who has not seen the code."""
OWN_NOTE = "another method of this installation"


def card(
    *,
    label: str,
    facts: Sequence[tuple[str, str]],
    prompt: str,
    texts: Sequence[Mapping[str, Any]],
    panels: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One answer, or two side by side, in every panel's colours."""
    return {"label": label, "facts": [list(fact) for fact in facts], "prompt": prompt, "texts": texts, "panels": panels}


def text_of(
    scored: Scored,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mean: float,
    std: float,
    marks: Sequence[int] = (),
    words: Sequence[str] = (),
    tags: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The tokens of an answer and its curve of prefix scores.

    Args:
        scored: the answer.
        tokenizer: to turn ids into text.
        mean: of the score.
        std: of the score, the curve's unit.
        marks: for each token, 1 where it is known to help, -1 where it is known to hurt, else 0.
        words: for each token, what is known of it; shown when it is pointed at.
        tags: token -> words to put before it.
    """
    ids = scored.answer.response_ids
    shown, curve = ids[:MAX_TOKENS], (np.append(scored.prefix[:-1], scored.score) - mean) / std
    return {
        "text": token_texts(tokenizer, shown),
        "id": shown,
        "more": len(ids) - len(shown),
        "curve": curve[:MAX_TOKENS].tolist(),
        "start": (scored.prompt_score - mean) / std,
        "marks": list(marks[:MAX_TOKENS]) or [0] * len(shown),
        "words": list(words[:MAX_TOKENS]) or [""] * len(shown),
        "tags": {str(token): tag for token, tag in (tags or {}).items()},
    }


def panel(
    title: str, note: str, values: Sequence[float] | np.ndarray | None, *, scale: float, of: int = 0, tags: bool = False
) -> dict[str, Any]:
    """One colouring of a text; without values only its marks are shown."""
    shown = None if values is None else [float(value) for value in values[:MAX_TOKENS]]
    return {"title": title, "note": note, "values": shown, "scale": scale, "of": of, "tags": tags}


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of `NOTES`, then any other."""
    named = list(methods)
    return [*(name for name in NOTES if name in named), *(name for name in named if name not in NOTES)]


def scale_of(credit: Credit) -> float:
    """Credit of full colour: the 98% quantile of its size where it is not zero."""
    sizes = np.abs(np.concatenate([np.zeros(0), *credit]))
    return float(np.quantile(sizes[sizes > 0], 0.98)) if (sizes > 0).any() else 1.0


def spread_out(values: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Indices of up to ``count`` answers from the best to the worst: both ends and evenly between them."""
    order = np.argsort(-np.asarray(values), kind="stable")
    picked = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [int(order[place]) for place in picked]
