"""Coloured texts of answers that a reward model has scored; the cards themselves are the report's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.audit.answers import Scored, token_texts
from r3hf_ray.instruments.report.cards import answer_text


def text_of(
    scored: Scored,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mean: float,
    std: float,
    marks: Sequence[int] = (),
    words: Sequence[str] = (),
    tags: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> dict[str, Any]:
    """The tokens of an answer and its curve of prefix scores, in units of ``std`` about ``mean``.

    The other arguments are those of `answer_text`.
    """
    ids, after = scored.answer.response_ids, np.append(scored.prefix[:-1], scored.score)
    return answer_text(
        token_texts(tokenizer, ids),
        ids,
        ((after - mean) / std).tolist(),
        start=(scored.prompt_score - mean) / std,
        marks=marks,
        words=words,
        tags=tags,
        title=title,
        note=note,
    )


def spread_out(values: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Indices of up to ``count`` answers from the best to the worst: both ends and evenly between them."""
    order = np.argsort(-np.asarray(values), kind="stable")
    picked = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [int(order[place]) for place in picked]
