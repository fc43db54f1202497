"""Bradley-Terry training of a reward model on ranked groups: each response is forwarded once, each pair counted.

A K-way ranking has up to K(K-1)/2 pairs. As plain pairs every response would be forwarded K-1 times; here a group is
one piece of a batch. Works in one process and in several ranks of torch.distributed (replicated model): each rank takes
its share of a step's groups, losses are divided by the global number of pairs, and gradients are summed.

A causal model has said the score of a cut response in the forward of the whole one, so the loss on pairs that are cut
at a random place costs no forward of its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from r3hf_ray.algorithms.batching import joins, pad_sequences
from r3hf_ray.draws import seed_of, stream_row
from r3hf_ray.models.attention import hidden_states
from r3hf_ray.models.sharding import all_reduce_sum
from r3hf_ray.scoring.prefix_scores import scores_of_parts
from r3hf_ray.types import RankedGroup

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm, as TRL's trainers are told to."""


_Placed = tuple[int, RankedGroup]
"""A group and its position in the stream of groups, which decides where its pairs are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Objective:
    """The arguments of `train_ranked` that a step's loss depends on."""

    pad_id: int
    seed: int
    center_coef: float
    prefix_weight: float
    microbatch_size: int
    dtype: torch.dtype


class _Margins(NamedTuple):
    """Of every pair of a batch."""

    whole: Float[Tensor, "pairs"]
    """R(winner) - R(loser)."""
    cut: Float[Tensor, "cut_pairs"]
    """The same of the first part of both responses; empty where none was asked for."""
    totals: Float[Tensor, "pairs"]
    """R(winner) + R(loser)."""


def scores_of_prefixes(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prefixes: Sequence[tuple[int, int]],
    *,
    pad_id: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "M"]:
    """Scores of parts of the sequences from one forward, in float32; the model must be causal.

    Each is read at the last token of its part, which is never searched for by pad.

    Args:
        model: a reward model, its head in float32.
        sequences: token ids of prompt + response.
        prefixes: (which sequence, how many of its tokens), both the whole and the cut.
        pad_id: fills the right of shorter rows; masked.
        dtype: float32, or bfloat16 to run the trunk's matrix products in it; the head stays in float32.
    """
    device = next(model.parameters()).device
    rows = [np.asarray(ids, np.int64) for ids in sequences]
    padded = pad_sequences(rows, [0] * len(rows), pad_id=pad_id)
    token_ids, attention_mask, _ = (array.to(device) for array in padded)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = hidden_states(model, token_ids, attention_mask)
    return scores_of_parts(model, hidden, attention_mask, *torch.tensor(prefixes, device=device).unbind(1))


def cut_length(prompt_tokens: int, tokens: int, fraction: float) -> int:
    """Tokens of prompt and response once the response is cut: from its first token up to all but its last.

    A response of one token stays whole.

    Example: ``[cut_length(3, 8, f) for f in (0.0, 0.5, 0.99)]`` is ``[4, 6, 7]``

    Args:
        prompt_tokens: of the prompt.
        tokens: of prompt and response, which is not empty.
        fraction: in [0, 1); every cut of one response is equally likely if it is uniform.
    """
    return prompt_tokens + 1 + int(fraction * (tokens - prompt_tokens - 1))


def cut_fraction(seed: int, *draw: int) -> float:
    """Uniform in [0, 1), one for each ``draw``, so that no rank, batch or worker decides where a pair is cut."""
    return seed_of(seed, "cut", *draw) / 2**31


def train_ranked(
    model: PreTrainedModel,
    groups: Sequence[RankedGroup],
    *,
    pad_id: int,
    learning_rate: float,
    steps: int,
    groups_per_step: int,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    warmup_steps: int = 0,
    center_coef: float = 0.0,
    prefix_weight: float = 0.0,
    microbatch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Train `model` in place with AdamW on ``-log sigmoid(R(winner) - R(loser))``, averaged over a step's pairs.

    Every rank calls it with the same arguments; rank 0's parameters are the ones that start.

    Args:
        model: a decoder-only sequence classifier with one label, or a running-sum one, its ``score`` head in float32.
        groups: passed over in a seeded order, as often as the steps need.
        pad_id: fills the right of shorter rows; masked.
        learning_rate: peak; linear warm-up over `warmup_steps`, then linear decay to 0, as TRL's trainers do it.
        groups_per_step: groups of one optimizer step over all ranks.
        on_step: called on every rank with the step (from 1) and that step's global metrics.
        center_coef: weight of the squared sum of a pair's scores, which holds the mean score near 0.
        prefix_weight: weight of the same loss of pairs cut at one fraction of both lengths, drawn each time; 0: none.
        microbatch_size: responses of one forward on one rank; a larger group is forwarded alone.
        dtype: of the trunk in a forward, as in `scores_of_prefixes`; the weights and their step keep their own.

    Returns:
        ``loss`` [nats a pair], ``accuracy`` and ``grad_norm``, means over the last tenth of the steps; of cut pairs
        ``prefix_loss`` (before it is weighted and added to ``loss``) and ``prefix_accuracy``.

    Raises:
        ValueError: there are no groups, or one has no pair or an empty response.
        FloatingPointError: the loss or a gradient is not finite; the step is not taken.
    """
    _check(groups)
    _broadcast(model)
    objective = _Objective(
        pad_id=pad_id, seed=seed, center_coef=center_coef, prefix_weight=prefix_weight,
        microbatch_size=microbatch_size, dtype=dtype,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    model.train()
    history: list[dict[str, float]] = []
    for step in range(steps):
        positions = range(step * groups_per_step, (step + 1) * groups_per_step)
        batch = [(position, groups[stream_row(seed, position, len(groups))]) for position in positions]
        optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, steps, warmup_steps)
        history.append(_update(model, optimizer, batch, objective, step + 1))
        on_step(step + 1, history[-1])
    model.eval()
    return _means(history[-max(1, steps // 10) :])


@torch.no_grad()
def pair_accuracy(
    model: PreTrainedModel, groups: Sequence[RankedGroup], *, pad_id: int, microbatch_size: int = 256
) -> float:
    """Share of all pairs whose winner scores higher; a tie counts one half. Ranks share the work and get one answer.

    Raises:
        ValueError: there are no groups, or one has no pair.
    """
    _check(groups)
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)  # nccl adds on GPUs only
    for batch in _microbatches(_own_share(list(enumerate(groups))), microbatch_size):
        margins = _margins(model, batch, pad_id=pad_id).whole
        wins = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        counts += torch.stack([wins, torch.full_like(wins, len(margins))])
    all_reduce_sum(counts)
    return (counts[0] / counts[1]).item()


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step (from 0)."""
    return min((step + 1) / (warmup_steps + 1), (steps - step) / max(1, steps - warmup_steps))


def _check(groups: Sequence[RankedGroup]) -> None:
    if not groups or not all(group.pairs for group in groups):
        raise ValueError("ranked data: there must be at least one group, and each group needs at least one pair")
    if any(len(ids) <= group.prompt_tokens for group in groups for ids in group.sequences):
        raise ValueError("ranked data: a response is empty; each sequence must be longer than its prompt")


def _update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: list[_Placed], objective: _Objective, step: int
) -> dict[str, float]:
    """One optimizer step, unless its loss or gradient is not finite; returns the step's global metrics."""
    metrics = _backward(model, batch, objective)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item()
    if not math.isfinite(sum(metrics.values())):
        raise FloatingPointError(f"reward model: loss or gradient is not finite at step {step}")
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def _backward(model: PreTrainedModel, batch: list[_Placed], objective: _Objective) -> dict[str, float]:
    """Leave the global gradient in ``.grad`` on every rank; returns the step's global metrics."""
    num_pairs = sum(len(group.pairs) for _, group in batch)
    seed = objective.seed if objective.prefix_weight else None
    sums = torch.zeros(4, device=next(model.parameters()).device)
    for microbatch in _microbatches(_own_share(batch), objective.microbatch_size):
        margins = _margins(model, microbatch, pad_id=objective.pad_id, cut_seed=seed, dtype=objective.dtype)
        loss = (-logsigmoid(margins.whole) + objective.center_coef * margins.totals**2).sum() / num_pairs
        prefix_loss = -logsigmoid(margins.cut).sum() / num_pairs
        if objective.prefix_weight:
            loss = loss + objective.prefix_weight * prefix_loss
        loss.backward()
        right = [(part.detach() > 0).sum() / num_pairs for part in (margins.whole, margins.cut)]
        sums += torch.stack([loss.detach(), right[0], prefix_loss.detach(), right[1]])
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum(parameter.grad)
    all_reduce_sum(sums)
    names = ("loss", "accuracy", "prefix_loss", "prefix_accuracy")[: 4 if objective.prefix_weight else 2]
    return dict(zip(names, sums.tolist(), strict=False))


def _margins(
    model: PreTrainedModel,
    batch: list[_Placed],
    *,
    pad_id: int,
    cut_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> _Margins:
    """From one forward; with ``cut_seed`` of the cut pairs too."""
    sequences = [ids for _, group in batch for ids in group.sequences]
    winners: list[int] = []
    losers: list[int] = []
    cuts: list[tuple[int, int]] = []  # each cut winner, its loser after it
    first = 0
    for position, group in batch:
        for index, (winner, loser) in enumerate(group.pairs):
            winners.append(first + winner)
            losers.append(first + loser)
            if cut_seed is not None:
                fraction = cut_fraction(cut_seed, position, index)
                both = (first + winner, first + loser)
                cuts += [(row, cut_length(group.prompt_tokens, len(sequences[row]), fraction)) for row in both]
        first += len(group.sequences)
    whole = [(row, len(ids)) for row, ids in enumerate(sequences)]
    scores = scores_of_prefixes(model, sequences, whole + cuts, pad_id=pad_id, dtype=dtype)
    cut = scores[len(whole) :]
    return _Margins(scores[winners] - scores[losers], cut[::2] - cut[1::2], scores[winners] + scores[losers])


def _microbatches(batch: Sequence[_Placed], size: int) -> list[list[_Placed]]:
    """Groups of like length together, the longest first, at most ``size`` responses unless one group has more."""
    longest = [max(map(len, group.sequences)) for _, group in batch]
    batches: list[list[_Placed]] = []
    rows = width = 0
    for index in sorted(range(len(batch)), key=lambda i: -longest[i]):
        more = len(batch[index][1].sequences)
        if not rows or rows + more > size or not joins(longest[index], rows, width):
            batches.append([])
            rows, width = 0, longest[index]
        batches[-1].append(batch[index])
        rows += more
    return batches


def _own_share(batch: Sequence[_Placed]) -> Sequence[_Placed]:
    return batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch


def _broadcast(model: PreTrainedModel) -> None:
    if dist.is_initialized():
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
