"""A rank's rows of every optimizer step, in as many microbatches as on the other ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from r3hf_ray.algorithms.batching import microbatches
from r3hf_ray.models.sharding import all_reduce_max, all_reduce_sum
from r3hf_ray.training.experience import Experience


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """One optimizer step as this rank sees it.

    Example, on a rank with rows 0 and 3 of it where another rank needs two forwards:
    ``Minibatch(epoch=0, number=1, rows=[0, 3], microbatches=[rows 3 and 0, a filler], num_tokens=180,
    num_responses=5)``.
    """

    epoch: int
    number: int
    rows: list[int]
    """This rank's rows of the batch; may be none."""
    microbatches: list[Experience]
    """As many on every rank; the last may be fillers."""
    num_tokens: int
    """Response tokens over all ranks."""
    num_responses: int
    """Responses over all ranks."""

    @property
    def padding(self) -> Int64[Tensor, "2"]:
        """Tokens that this rank's forwards compute, and how many of them are no padding."""
        masks = [share.batch.attention_mask for share in self.microbatches]
        padded = torch.tensor(sum(mask.numel() for mask in masks), device=masks[0].device)
        return torch.stack([padded, torch.stack([mask.sum() for mask in masks]).sum()])


def plan_minibatches(
    experience: Experience, minibatch_of: Sequence[Sequence[int]], *, count: int, budget_tokens: int
) -> Iterator[Minibatch]:
    """All optimizer steps of a batch. A collective at its start: ranks agree on tokens and microbatches of each.

    Args:
        experience: this rank's rows.
        minibatch_of: for each epoch, the minibatch of each row.
        count: minibatches of an epoch.
        budget_tokens: padded tokens of a microbatch.
    """
    batch = experience.batch
    lengths = batch.lengths
    rows = [
        [row for row, its in enumerate(assignment) if its == number]
        for assignment in minibatch_of
        for number in range(count)
    ]
    groups = [microbatches([lengths[row] for row in chosen], budget_tokens=budget_tokens) for chosen in rows]
    responses = batch.token_ids.new_tensor([len(chosen) for chosen in rows])
    tokens = torch.stack([batch.response_mask[chosen].sum() for chosen in rows])
    num_tokens, num_responses = all_reduce_sum(torch.stack([tokens, responses])).tolist()
    forwards = torch.tensor([len(group) for group in groups], device=batch.token_ids.device)
    for index, wanted in enumerate(all_reduce_max(forwards).tolist()):
        epoch, number = divmod(index, count)
        shares = [experience.rows([rows[index][i] for i in group]) for group in groups[index]]
        shares += [experience.filler() for _ in range(wanted - len(shares))]
        yield Minibatch(
            epoch=epoch,
            number=number,
            rows=rows[index],
            microbatches=shares,
            num_tokens=max(num_tokens[index], 1),
            num_responses=max(num_responses[index], 1),
        )
