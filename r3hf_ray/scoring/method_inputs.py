"""What redistribution methods read besides the scores, bound to them: spans, attention, a user's own inputs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r3hf_ray.algorithms.redistribution import FUNCTIONS, Method, RedistributionInputs
from r3hf_ray.algorithms.spans import ends_sentence, entropy_ends, ngram_ends, sentence_ends
from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.user_functions import user_function

Bind = Callable[[RedistributionInputs, Float[Tensor, "B T"] | None, Float[Tensor, "B T"] | None], Method]
"""From a microbatch, its attention and its reference's entropy, each where it was measured, to the bound method."""


def bind_method(reward: RewardSection, tokenizer: str) -> Bind:
    """How to get the function that `reward.mode` names, once a microbatch has been read.

    Args:
        reward: the method and its spans.
        tokenizer: folder or hub name of the one whose text ends sentences.

    Raises:
        ConfigError: a user's function cannot be found.
        ModelError: no token of the tokenizer ends a sentence.
    """
    if reward.mode not in FUNCTIONS:
        own = user_function(reward.mode, field="reward.mode")
        return lambda inputs, attention, entropy: lambda scores, mask: own(replace(inputs, scores=scores))
    needs, span_ends = reward.facts.needs, _span_ends(reward, tokenizer)

    def bind(
        inputs: RedistributionInputs, attention: Float[Tensor, "B T"] | None, entropy: Float[Tensor, "B T"] | None
    ) -> Method:
        given: dict[str, Tensor] = {}
        if "attention" in needs:
            given["attention"] = _measured(attention, reward.mode)
        if "span_ends" in needs:
            given["span_ends"] = span_ends(inputs, entropy)
        return partial(FUNCTIONS[reward.mode], **given)

    return bind


def needs_entropy(reward: RewardSection) -> bool:
    """Whether the entropy of the reference is to be measured."""
    return "span_ends" in reward.facts.needs and reward.segment_by == "entropy"


def sentence_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens whose text, alone, ends with a full stop, `!`, `?` or a line break; EOS and its like are none.

    Raises:
        ModelError: there is none.
    """
    special = set(tokenizer.all_special_ids)
    ids = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    texts = tokenizer.batch_decode([[index] for index in ids])
    ends = [index for index, text in zip(ids, texts, strict=True) if ends_sentence(text)]
    if not ends:
        raise ModelError(
            f"{tokenizer.name_or_path}: no token ends a sentence; set reward.segment_by to ngram or entropy"
        )
    return ends


def _measured(attention: Tensor | None, mode: str) -> Tensor:
    if attention is None:
        raise ModelError(
            f"reward.mode = {mode}: the attention of the reward model was not measured; one that reads other tokens "
            "than the policy's has none to give"
        )
    return attention


def _span_ends(reward: RewardSection, tokenizer: str) -> Callable[[RedistributionInputs, Tensor | None], Tensor]:
    """The rule of `reward.segment_by`; the tokenizer is read where sentences end spans."""
    by_sentence = "span_ends" in reward.facts.needs and reward.segment_by == "sentence"
    end_ids = torch.tensor(sentence_end_ids(load_tokenizer(tokenizer)) if by_sentence else [], dtype=torch.long)

    def find(inputs: RedistributionInputs, entropy: Tensor | None) -> Tensor:
        mask = inputs.response_mask
        if entropy is not None:
            return entropy_ends(entropy, mask, threshold=reward.segment_entropy)
        if reward.segment_by == "ngram":
            return ngram_ends(mask, length=reward.segment_ngram)
        return sentence_ends(inputs.token_ids, mask, end_ids=end_ids.to(mask.device))

    return find
