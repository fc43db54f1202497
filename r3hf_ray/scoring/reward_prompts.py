"""The run's prompts as a reward model with another tokenizer or chat template reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.loading import PromptRow
from r3hf_ray.errors import DataError
from r3hf_ray.models.chat import Chat
from r3hf_ray.models.chat_format import chat_format, trained_format
from r3hf_ray.models.folder import knows_ids
from r3hf_ray.scoring.translation import Translation, Translator, prompt_key

SAMPLE_ROWS = 64
SAMPLE_CHARACTERS = 2000
"""How much of the data's text `measure_fit` looks at."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a reward model's tokens fit the policy's, on text of the data.

    Example: ``Fit(loss=0.03, growth=1.1)``
    """

    loss: float
    """Share of the policy's tokens within which none of the reward model's ends (`Retold.loss`)."""
    growth: float
    """Tokens of the reward model for one of the policy's."""


def translation_of(
    rows: Sequence[PromptRow],
    policy_tokenizer: PreTrainedTokenizerBase,
    reward_model: str,
    reward_tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
) -> Translation | None:
    """What lets a reward model read the run in its own tokens and template; None where those are the policy's.

    A reward model with the policy's vocabulary, without a template and without a format of its own (not trained here)
    reads the policy's ids as they are.

    Args:
        rows: every prompt of the run.
        policy_tokenizer: with the policy's template.
        reward_model: its folder or hub name.
        reward_tokenizer: its own.
        window: longest prompt + response + end it can read. [tokens]

    Raises:
        DataError: a prompt that its template refuses or renders to nothing.
    """
    ours, theirs = chat_format(policy_tokenizer), trained_format(reward_model, reward_tokenizer)
    same_ids = knows_ids(reward_tokenizer, policy_tokenizer)
    if same_ids and (theirs is None or replace(theirs, suffix="") == replace(ours, suffix="")):
        return None
    chat = Chat(reward_tokenizer, theirs)
    theirs = chat.form
    rendered = [_render(row, reward_model, chat) for row in rows]
    same_frame = (theirs.before, theirs.end) == (ours.before, ours.end)
    if same_ids and same_frame and rendered == [row.token_ids for row in rows]:
        return None
    return Translation(
        prompts={
            prompt_key(np.asarray(row.token_ids)): np.asarray(ids, np.int32)
            for row, ids in zip(rows, rendered, strict=True)
        },
        policy_before=ours.before,
        before=theirs.before,
        end_ids=tuple(chat.end_ids),
        max_tokens=window - len(chat.end_ids),
    )


def measure_fit(
    translation: Translation,
    rows: Sequence[PromptRow],
    policy_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
) -> Fit:
    """Retell the last turns of some prompts, evenly spread over the data, as if the policy had sampled them.

    Raises:
        ModelError: the reward model's tokenizer gives no character offsets.
    """
    translator = Translator(translation, policy_tokenizer, reward_tokenizer)
    chosen = rows[:: -(-len(rows) // SAMPLE_ROWS)]
    texts = [translation.policy_before + row.messages[-1]["content"][:SAMPLE_CHARACTERS].strip() for row in chosen]
    spoken = [ids for text in texts if (ids := policy_tokenizer.encode(text, add_special_tokens=False))]
    retold = [translator.response(ids, finished=False) for ids in spoken]
    count = max(1, sum(map(len, spoken)))
    return Fit(
        loss=sum(one.loss * len(ids) for one, ids in zip(retold, spoken, strict=True)) / count,
        growth=sum(len(one.token_ids) for one in retold) / count,
    )


def _render(row: PromptRow, reward_model: str, chat: Chat) -> list[int]:
    try:
        ids = chat.prompt(row.messages).token_ids
    except Exception as error:  # its template's refusal, or whatever the library of its tokenizer raises
        raise DataError(
            f"row {row.row}: {reward_model} cannot read this prompt ({error}); leave the row out or use another reward "
            "model"
        ) from error
    if not ids:
        raise DataError(f"row {row.row}: {reward_model} renders this prompt to nothing; correct its chat template")
    return ids
