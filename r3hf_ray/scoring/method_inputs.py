"""What redistribution methods read besides the scores, bound to them: spans, attention, a user's own inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from r3hf_ray.algorithms.redistribution import FUNCTIONS, Method, PrefixScores, RedistributionInputs, abc, segment
from r3hf_ray.algorithms.spans import ends_sentence, entropy_ends, ngram_ends, sentence_ends
from r3hf_ray.errors import ModelError
from r3hf_ray.models.load import load_tokenizer
from r3hf_ray.user_functions import user_function


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one microbatch's forwards have shown besides the scores. ``[B, T]`` and ``[B]``."""

    token_ids: Int64[Tensor, "B T"]
    response_mask: Bool[Tensor, "B T"]
    finished: Bool[Tensor, "B"]
    behavior_logprobs: Float[Tensor, "B T"]
    ref_logprobs: Float[Tensor, "B T"]
    ref_entropy: Float[Tensor, "B T"] | None
    """Measured for `segment` by entropy only. [nats]"""
    by_model: Mapping[str, PrefixScores]
    """Of every reward model, by name."""
    attention: Float[Tensor, "B T"] | None = None
    """Measured for `abc` only, by each reward model."""


MethodOf = Callable[[Evidence], Method]
"""Binds a method to one microbatch's evidence."""


def method_of(mode: str, *, segment_by: str, segment_ngram: int, segment_entropy: float, tokenizer: str) -> MethodOf:
    """How to get the function that `reward.mode` names, once a microbatch's evidence is there.

    Args:
        mode: a name in `FUNCTIONS`, or a user's own function.
        segment_by: sentence, ngram or entropy; read by `segment` only, like the next two.
        segment_ngram: in tokens.
        segment_entropy: in nats.
        tokenizer: folder or hub name of the one whose text ends sentences.

    Raises:
        ConfigError: a user's function cannot be found.
        ModelError: no token of the tokenizer ends a sentence.
    """
    if mode == "abc":
        return _abc
    if mode == "segment":
        return _segment(segment_by, segment_ngram, segment_entropy, tokenizer)
    if mode in FUNCTIONS:
        return lambda evidence: FUNCTIONS[mode]
    function = user_function(mode, field="reward.mode")

    def bind(evidence: Evidence) -> Method:
        def method(scores: PrefixScores, response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
            inputs = RedistributionInputs(
                scores=scores,
                response_mask=response_mask,
                token_ids=evidence.token_ids,
                finished=evidence.finished,
                behavior_logprobs=evidence.behavior_logprobs,
                ref_logprobs=evidence.ref_logprobs,
                by_model=evidence.by_model,
            )
            return function(inputs)

        return method

    return bind


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


def _abc(evidence: Evidence) -> Method:
    if evidence.attention is None:
        raise ModelError(
            "reward.mode = abc: the attention of the reward model was not measured; one that reads other tokens than "
            "the policy's has none to give"
        )
    return partial(abc, attention=evidence.attention)


def _segment(by: str, ngram: int, entropy: float, tokenizer: str) -> MethodOf:
    end_ids = torch.tensor(sentence_end_ids(load_tokenizer(tokenizer)) if by == "sentence" else [], dtype=torch.long)

    def bind(evidence: Evidence) -> Method:
        mask = evidence.response_mask
        if evidence.ref_entropy is not None:
            ends = entropy_ends(evidence.ref_entropy, mask, threshold=entropy)
        elif by == "ngram":
            ends = ngram_ends(mask, length=ngram)
        else:
            ends = sentence_ends(evidence.token_ids, mask, end_ids=end_ids.to(mask.device))
        return partial(segment, span_ends=ends)

    return bind
