"""Scored trajectories to padded batches, and batches to microbatches that fit a budget of padded tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from r3hf_ray.algorithms.redistribution import PrefixScores
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory

T = TypeVar("T")

LIKE = 0.7
"""A row shorter than this share of a microbatch's longest starts the next one. [share]"""
WORTH_A_FORWARD = 512
"""Padded tokens of a microbatch before it is parted so: below, padding costs less than another forward. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScores:
    """What one reward model says of a batch, in its own units.

    Example, a batch of one, response of two tokens: ``token_rewards=[[0, 0, 0.4, 1.1]]``,
    ``prefix_scores=[[0, 0, 0.9, 2.0]]``, ``score=[2.0]``, ``prompt_score=[0.5]``.
    """

    token_rewards: Float[Tensor, "B T"]
    prefix_scores: Float[Tensor, "B T"]
    score: Float[Tensor, "B"]
    prompt_score: Float[Tensor, "B"]

    @property
    def scores(self) -> PrefixScores:
        """Its scores as `algorithms.redistribution` reads them."""
        return PrefixScores(prefix=self.prefix_scores, prompt=self.prompt_score, pooled=self.score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scored trajectories, right-padded: ``[B, T]`` over prompt + response, rewards still in the reward model's units.

    Example, one trajectory of prompt ``[5, 6]`` and response ``[7, 2]`` beside a longer one (pad 0):
    ``token_ids=[[5, 6, 7, 2, 0], ...], response_mask=[[0, 0, 1, 1, 0], ...]``, all of ``[B, 5]``.
    """

    token_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    """True on prompt and response."""
    response_mask: Bool[Tensor, "B T"]
    """True on the tokens the policy sampled; everything per token below is 0 outside it."""
    behavior_logprobs: Float[Tensor, "B T"]
    """Of the sampler. [nats]"""
    ref_logprobs: Float[Tensor, "B T"]
    """Of the frozen reference. [nats]"""
    by_model: dict[str, BatchScores]
    """By name, the main model first."""
    truncated: Bool[Tensor, "B"]
    """Cut at the length limit: no EOS."""
    prompt_ids: Int64[Tensor, "B"]
    samples: Int64[Tensor, "B"]
    policy_versions: Int64[Tensor, "B"]
    """The weights version that sampled each row."""
    alignment_loss: Float[Tensor, "B"]
    """Share of response tokens that a reward model with another tokenizer could not be aligned with; the largest over
    models."""

    @property
    def lengths(self) -> list[int]:
        """Prompt + response of each row, without padding. [tokens]"""
        return self.attention_mask.sum(1).tolist()

    @property
    def main(self) -> BatchScores:
        """What `model.reward_model` says."""
        return self.by_model[MAIN]

    def rows(self, index: Sequence[int] | Int64[Tensor, "N"]) -> "Batch":
        """The rows ``index`` (at least one), in that order, trimmed to the longest of them."""
        return chosen_rows(self, index, self.attention_mask)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return mapped(self, lambda x: x.to(device))


def mapped(form: T, function: Callable[[Tensor], Tensor]) -> T:
    """The same form of what ``function`` makes of each of its tensors, those of nested forms and dicts too."""
    changed: Any
    if isinstance(form, Tensor):
        changed = function(form)
    elif isinstance(form, dict):
        changed = {name: mapped(part, function) for name, part in form.items()}
    else:
        changed = type(form)(**{name: mapped(part, function) for name, part in _parts(form).items()})
    return cast(T, changed)


def tensors_of(form: Any, place: str = "") -> dict[str, Tensor]:
    """Every tensor of a form by its place: ``token_ids``, ``by_model.cost.score``."""
    if isinstance(form, Tensor):
        return {place.removesuffix("."): form}
    return {at: x for name, part in _parts(form).items() for at, x in tensors_of(part, f"{place}{name}.").items()}


def chosen_rows(form: T, index: Sequence[int] | Int64[Tensor, "N"], attention_mask: Bool[Tensor, "B T"]) -> T:
    """The rows ``index`` of each tensor, in that order, trimmed to the longest of them."""
    chosen = torch.as_tensor(index, dtype=torch.long, device=attention_mask.device)
    width = int(attention_mask[chosen].sum(1).max())
    return mapped(form, lambda x: x[chosen, :width] if x.ndim == 2 else x[chosen])


def _parts(form: Any) -> dict[str, Any]:
    return form if isinstance(form, dict) else {field.name: getattr(form, field.name) for field in fields(form)}


def collate(scored: Sequence[ScoredTrajectory], *, pad_id: int) -> Batch:
    """Pad scored trajectories (at least one) to the longest and stack them, in the order given.

    Args:
        scored: trajectories with their rewards.
        pad_id: token id on the padding; masked everywhere, so any id the embedding knows will do.

    Raises:
        ValueError: they were not all scored by the same models.
    """
    names = scored[0].by_model.keys()
    if any(s.by_model.keys() != names for s in scored):
        raise ValueError("the trajectories of a batch were scored by different reward models")
    trajectories = [s.trajectory for s in scored]
    token_ids, attention_mask, response_mask = pad_sequences(
        [t.token_ids for t in trajectories], [t.prompt_len for t in trajectories], pad_id=pad_id
    )
    return Batch(
        token_ids=token_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        behavior_logprobs=pad_rows([t.behavior_logprobs for t in trajectories], fill=0.0),
        ref_logprobs=pad_rows([s.ref_logprobs for s in scored], fill=0.0),
        by_model={name: _stacked([s.by_model[name] for s in scored]) for name in names},
        truncated=torch.tensor([t.finish is Finish.LENGTH for t in trajectories]),
        prompt_ids=torch.tensor([t.prompt_id for t in trajectories]),
        samples=torch.tensor([t.sample for t in trajectories]),
        policy_versions=torch.tensor([t.policy_version for t in trajectories]),
        alignment_loss=torch.tensor([s.alignment_loss for s in scored], dtype=torch.float32),
    )


def _stacked(scores: Sequence[ModelScores]) -> BatchScores:
    return BatchScores(
        token_rewards=pad_rows([s.token_rewards for s in scores], fill=0.0),
        prefix_scores=pad_rows([s.prefix_scores for s in scores], fill=0.0),
        score=torch.tensor([s.score for s in scores], dtype=torch.float32),
        prompt_score=torch.tensor([s.prompt_score for s in scores], dtype=torch.float32),
    )


def pad_sequences(
    rows: Sequence[np.ndarray], prompt_lens: Sequence[int], *, pad_id: int
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Prompts with their responses, right-padded: token ids, attention mask and response mask.

    Example: rows ``[5, 6, 7, 2]`` and ``[8, 2]`` with prompts of 2 and 1, pad 0 -> ``[[5, 6, 7, 2], [8, 2, 0, 0]]``,
    ``[[1, 1, 1, 1], [1, 1, 0, 0]]``, ``[[0, 0, 1, 1], [0, 1, 0, 0]]``.
    """
    token_ids = pad_rows(rows, fill=pad_id).long()
    position = torch.arange(token_ids.shape[1])
    attention_mask = position < torch.tensor([len(row) for row in rows])[:, None]
    return token_ids, attention_mask, attention_mask & (position >= torch.tensor(prompt_lens)[:, None])


def pad_rows(rows: Sequence[np.ndarray], *, fill: int | float) -> Tensor:
    """Arrays of different lengths as one right-padded tensor ``[B, T]`` of their data type; a copy, never a view."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def microbatches(lengths: Sequence[int], *, budget_tokens: int) -> list[list[int]]:
    """Split rows into groups of like length whose padded size (rows x longest) is at most ``budget_tokens``.

    Every index appears exactly once. A row longer than the budget stands alone. Rows are grouped by length, longest
    first, so that little is padding and memory is short on the first microbatch or never; a row shorter than `LIKE`
    times the longest starts a new group, where the one before is `WORTH_A_FORWARD`.

    Example: lengths ``[3, 9, 4, 8]`` and a budget of 16 tokens -> ``[[1], [3, 2], [0]]``.

    Args:
        lengths: of each row. [tokens]
        budget_tokens: padded tokens of one forward. [tokens]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest, rows = (lengths[groups[-1][0]], len(groups[-1])) if groups else (0, 0)
        if rows and joins(lengths[index], rows, longest) and (rows + 1) * longest <= budget_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def joins(length: int, rows: int, longest: int) -> bool:
    """Whether a row of ``length`` is worth its padding in a microbatch of ``rows`` rows, as long as ``longest``."""
    return length >= LIKE * longest or rows * longest < WORTH_A_FORWARD


def masked_filler(batch: Batch) -> Batch:
    """One row without a single response token: it costs a forward, and adds exactly 0 to every loss and gradient.

    A rank that has run out of microbatches joins the others' collectives with it. It is the batch's shortest row, so
    the model sees sound ids.
    """
    lengths = batch.lengths
    row = batch.rows([lengths.index(min(lengths))])
    nothing = torch.zeros_like(row.ref_logprobs)
    return replace(
        row,
        response_mask=torch.zeros_like(row.response_mask),
        behavior_logprobs=nothing,
        ref_logprobs=nothing,
        by_model={
            name: replace(part, token_rewards=nothing, prefix_scores=nothing) for name, part in row.by_model.items()
        },
    )
