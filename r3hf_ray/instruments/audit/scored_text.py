"""The text of an answer that a reward model has scored, for the coloured answers of a page."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.audit.answers import Scored, token_texts
from r3hf_ray.instruments.pages.coloured_answers import AnswerText, answer_text


def scored_text(
    scored: Scored, tokenizer: PreTrainedTokenizerBase, *, mean: float, std: float, **more: Any
) -> AnswerText:
    """The tokens of an answer and its curve of prefix scores, in units of ``std`` about ``mean``.

    ``more`` goes to `answer_text`.
    """
    ids, after = scored.answer.response_ids, np.append(scored.prefix[:-1], scored.score)
    start = (scored.prompt_score - mean) / std
    return answer_text(token_texts(tokenizer, ids), ids, (after - mean) / std, start=start, **more)
