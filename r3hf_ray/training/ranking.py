"""Bradley-Terry training of a reward model on ranked groups: each response is forwarded once, each pair counted.

A K-way ranking has up to K(K-1)/2 pairs. As plain pairs every response would be forwarded K-1 times; here a group is
one piece of a batch. Works in one process and in several ranks of torch.distributed (replicated model): each rank takes
its share of a step's groups, losses are divided by the global number of pairs, and gradients are summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from r3hf_ray.models.sharding import all_reduce_sum
from r3hf_ray.plan import stream_row


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGroup:
    """Responses to one prompt and which of them beat which.

    Example: ``RankedGroup(sequences=[[5, 6, 7, 2], [5, 6, 2]], pairs=[(1, 0)])``: the second response won.
    """

    sequences: Sequence[Sequence[int]]
    """Token ids of prompt + response, up to the token the reward model pools at."""
    pairs: Sequence[tuple[int, int]]
    """(winner, loser), indices into `sequences`."""


def last_token_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_id: int) -> Float[Tensor, "N"]:
    """Score of each sequence: the model's head, in float32, at the last of its tokens (never searched for by pad)."""
    width, device = max(map(len, sequences)), next(model.parameters()).device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    token_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences], device=device)
    attention_mask = torch.arange(width, device=device) < lengths[:, None]
    states = model.base_model(input_ids=token_ids, attention_mask=attention_mask.long()).last_hidden_state
    last = states[torch.arange(len(sequences), device=device), lengths - 1]
    scores: Tensor = model.score(last.float()).squeeze(-1)
    return scores


def train_ranked(
    model: PreTrainedModel,
    groups: Sequence[RankedGroup],
    *,
    pad_id: int,
    learning_rate: float,
    steps: int,
    groups_per_step: int,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    warmup_steps: int = 0,
    center_coef: float = 0.0,
    microbatch_size: int = 64,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """Train `model` in place with AdamW on ``-log sigmoid(R(winner) - R(loser))``, averaged over a step's pairs.

    Every rank calls it with the same arguments; rank 0's parameters are the ones that start.

    Args:
        model: a decoder-only sequence classifier with one label, its ``score`` head in float32.
        groups: passed over in a seeded order, as often as the steps need.
        pad_id: fills the right of shorter rows; masked.
        learning_rate: peak; linear warm-up over `warmup_steps`, then linear decay to 0, as TRL's trainers do it.
        groups_per_step: groups of one optimizer step over all ranks.
        on_step: called on every rank with the step (from 1) and that step's global metrics.
        center_coef: weight of the squared sum of a pair's scores, which holds the mean score near 0.
        microbatch_size: responses of one forward on one rank; a larger group is forwarded alone.
        max_grad_norm: of gradient clipping.

    Returns:
        ``loss`` [nats a pair], ``accuracy`` and ``grad_norm``, means over the last tenth of the steps.

    Raises:
        ValueError: there are no groups, or one has no pair.
        FloatingPointError: the loss or a gradient is not finite; the step is not taken.
    """
    _check(groups)
    _broadcast(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    model.train()
    history: list[dict[str, float]] = []
    for step in range(steps):
        positions = range(step * groups_per_step, (step + 1) * groups_per_step)
        batch = [groups[stream_row(seed, position, len(groups))] for position in positions]
        sums = _backward(model, batch, pad_id=pad_id, center_coef=center_coef, microbatch_size=microbatch_size)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not torch.isfinite(norm + sums[0]):
            raise FloatingPointError(f"reward model: loss or gradient is not finite at step {step + 1}")
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate * _schedule(step, steps, warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": sums[0].item(), "accuracy": sums[1].item(), "grad_norm": norm.item()})
        if on_step is not None:
            on_step(step + 1, history[-1])
    model.eval()
    recent = history[-max(1, steps // 10) :]
    return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]}


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
    counts = torch.zeros(2, dtype=torch.float64)
    for batch in _microbatches(_own_share(groups), microbatch_size):
        margins = _margins(model, batch, pad_id)[0].double()
        wins = (margins > 0).sum() + 0.5 * (margins == 0).sum()
        counts += torch.stack([wins.cpu(), torch.tensor(len(margins), dtype=torch.float64)])
    all_reduce_sum(counts)
    return (counts[0] / counts[1]).item()


def _schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step (from 0)."""
    return min((step + 1) / (warmup_steps + 1), (steps - step) / max(1, steps - warmup_steps))


def _check(groups: Sequence[RankedGroup]) -> None:
    if not groups or not all(group.pairs for group in groups):
        raise ValueError("ranked data: there must be at least one group, and each group needs at least one pair")


def _backward(
    model: PreTrainedModel, batch: list[RankedGroup], *, pad_id: int, center_coef: float, microbatch_size: int
) -> Float[Tensor, "2"]:
    """Leave the global gradient in ``.grad`` on every rank; returns the global (loss, accuracy)."""
    num_pairs = sum(len(group.pairs) for group in batch)
    sums = torch.zeros(2, device=next(model.parameters()).device)
    for microbatch in _microbatches(_own_share(batch), microbatch_size):
        margins, totals = _margins(model, microbatch, pad_id)
        loss = (-logsigmoid(margins) + center_coef * totals**2).sum() / num_pairs
        loss.backward()
        sums += torch.stack([loss.detach(), (margins.detach() > 0).sum() / num_pairs])
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce_sum(parameter.grad)
    all_reduce_sum(sums)
    return sums


def _margins(
    model: PreTrainedModel, batch: list[RankedGroup], pad_id: int
) -> tuple[Float[Tensor, "pairs"], Float[Tensor, "pairs"]]:
    """R(winner) - R(loser) and R(winner) + R(loser) of every pair of the batch, from one forward."""
    scores = last_token_scores(model, [ids for group in batch for ids in group.sequences], pad_id=pad_id)
    winners, losers, first = [], [], 0
    for group in batch:
        winners += [first + winner for winner, _ in group.pairs]
        losers += [first + loser for _, loser in group.pairs]
        first += len(group.sequences)
    return scores[winners] - scores[losers], scores[winners] + scores[losers]


def _microbatches(groups: Sequence[RankedGroup], size: int) -> list[list[RankedGroup]]:
    batches: list[list[RankedGroup]] = []
    filled = size
    for group in groups:
        if filled + len(group.sequences) > size:
            batches.append([])
            filled = 0
        batches[-1].append(group)
        filled += len(group.sequences)
    return batches


def _own_share(groups: Sequence[RankedGroup]) -> Sequence[RankedGroup]:
    return groups[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else groups


def _broadcast(model: PreTrainedModel) -> None:
    if dist.is_initialized():
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
