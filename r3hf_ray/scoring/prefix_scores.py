"""The score of every prefix of a response, from one forward pass of an ordinary reward model."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from r3hf_ray.algorithms.redistribution import PrefixScores
from r3hf_ray.errors import ModelError
from r3hf_ray.models.attention import hidden_states
from r3hf_ray.models.load import score_head
from r3hf_ray.models.running_sum import RunningSumForSequenceClassification, running_sum


@torch.no_grad()
def prefix_scores(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    suffix_ids: list[int],
    finished: Bool[Tensor, "B"],
    maps: bool = False,
) -> tuple[PrefixScores, Float[Tensor, "B T"] | None]:
    """``R(x, y_<=t)`` for all t, ``R(x, empty)`` and ``R(x, y)`` (arXiv 2411.08302, section 4; causal models only).

    The score of a prefix is the head at its last token, or the sum of the head over its tokens (`scores_so_far`).
    The pooling position is a row's last token (the suffix included), counted from ``attention_mask`` and never searched
    for by pad id: with ``pad == eos`` transformers would pool one token early.

    Args:
        model: reward model from `load.load_reward_model`, its head in float32.
        token_ids: prompt + response, right-padded.
        attention_mask: True on prompt and response.
        response_mask: True on sampled tokens.
        suffix_ids: template tokens that followed EOS when the reward model was trained (often one, a newline).
        finished: rows that ended with EOS; only they get the suffix.
        maps: whether attention is wanted too; the same forward then keeps the maps of all layers until it returns.

    Returns:
        The scores; and what the last response token attends to (last layer, mean over heads, 0 off the response), or
        None.

    Raises:
        ModelError: maps of a model that was not loaded with eager attention, the only one that returns them.
    """
    ids, mask = _with_suffix(token_ids, attention_mask, suffix_ids, finished)
    lengths = attention_mask.sum(1)
    ends = lengths + len(suffix_ids) * finished
    if not maps:
        return _scores(model, hidden_states(model, ids, mask), attention_mask, response_mask, ends), None
    output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
    if not output.attentions or output.attentions[-1] is None:
        raise ModelError(f"{model.name_or_path}: it returns no attention maps; reward.mode = abc cannot use it")
    attention = output.attentions[-1].float().mean(1)
    row = attention[torch.arange(len(lengths), device=attention.device), lengths - 1]
    scores = _scores(model, output.last_hidden_state, attention_mask, response_mask, ends)
    return scores, row[:, : token_ids.shape[1]].masked_fill(~response_mask, 0.0)


def scores_so_far(
    model: PreTrainedModel, token_scores: Float[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The score of a row's tokens up to each of them, from what the reward model's head says at each; differentiable.

    It is what the head says at the last one, or, in a model that was trained so, the sum of all (`running_sum`).
    """
    if isinstance(model, RunningSumForSequenceClassification):
        return running_sum(token_scores, attention_mask)
    return token_scores


def scores_of_parts(
    model: PreTrainedModel,
    hidden: Float[Tensor, "B T H"],
    attention_mask: Bool[Tensor, "B T"],
    rows: Int64[Tensor, "M"],
    counts: Int64[Tensor, "M"],
) -> Float[Tensor, "M"]:
    """The score of the first ``counts`` tokens of ``rows``, from the trunk's last hidden states; differentiable.

    The head is asked at the chosen tokens only where that is enough: rounding then tells equal rows not apart.
    """
    head = score_head(model)
    if isinstance(model, RunningSumForSequenceClassification):
        return running_sum(head(hidden.to(head.weight.dtype))[..., 0], attention_mask)[rows, counts - 1]
    scores: Tensor = head(hidden[rows, counts - 1].to(head.weight.dtype))
    return scores[..., 0]


def at_prefixes(
    scores: Float[Tensor, "B S"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    ends: Int64[Tensor, "B"],
) -> PrefixScores:
    """Of the scores up to each token of a row, those of its prompt, of its response's prefixes, and of all of it.

    Args:
        scores: up to each of the ``S >= T`` tokens of a row with its suffix.
        attention_mask: True on prompt and response.
        response_mask: True on sampled tokens.
        ends: length of each row with its suffix.
    """
    is_prompt = attention_mask & (response_mask.cumsum(1) == 0)
    return PrefixScores(
        prefix=scores[:, : response_mask.shape[1]].masked_fill(~response_mask, 0.0),
        prompt=_score_of_last(scores, is_prompt.sum(1)),
        pooled=_score_of_last(scores, ends),
    )


def _scores(
    model: PreTrainedModel,
    hidden: Float[Tensor, "B S H"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    ends: Int64[Tensor, "B"],
) -> PrefixScores:
    """``ends`` is the length of each row with its suffix."""
    is_token = torch.arange(hidden.shape[1], device=ends.device) < ends[:, None]
    head = score_head(model)
    scores = scores_so_far(model, head(hidden.to(head.weight.dtype))[..., 0], is_token)
    return at_prefixes(scores, attention_mask, response_mask, ends)


def _with_suffix(
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    suffix_ids: list[int],
    finished: Bool[Tensor, "B"],
) -> tuple[Int64[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Put the suffix behind the last token of finished rows, on what was padding."""
    if not suffix_ids or not finished.any():
        return token_ids, attention_mask
    ids, mask = F.pad(token_ids, (0, len(suffix_ids))), F.pad(attention_mask, (0, len(suffix_ids)))
    rows = finished.nonzero()
    columns = attention_mask.sum(1)[finished][:, None] + torch.arange(len(suffix_ids), device=ids.device)
    ids[rows, columns] = torch.tensor(suffix_ids, device=ids.device)
    mask[rows, columns] = True
    return ids, mask


def _score_of_last(scores: Float[Tensor, "B S"], count: Int64[Tensor, "B"]) -> Float[Tensor, "B"]:
    """The score at the last of each row's first ``count`` tokens."""
    return scores.gather(1, (count - 1)[:, None])[:, 0]
