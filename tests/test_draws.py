"""Seeds, prompt order and dealing: integers that must never change under anybody's feet."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.draws import (
    deal_to_ranks,
    groups_of,
    length_blocks,
    minibatch_of,
    seed_of,
    step_requests,
    stream_row,
)
from r3hf_ray.sections.actors import RolloutSection

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80)
SMALL = st.integers(1, 6)


def test_seeds_are_the_same_in_every_process_and_release() -> None:
    """Pinned: another number here means that no old run can be repeated."""
    assert seed_of(0, "sample", 0, 0) == 1814065839
    assert seed_of(17, "sample", 130, 2) == 232016204
    assert seed_of(0, "heldout", 5) == 1767830431
    assert [stream_row(3, prompt_id, 5) for prompt_id in range(10)] == [4, 2, 1, 3, 0, 1, 4, 0, 2, 3]
    assert minibatch_of([9, 3, 7, 5, 1], minibatches=2, seed=1, step=4, epoch=1) == [0, 0, 1, 1, 1]


def test_seeds_tell_draws_apart_and_fit_31_bits() -> None:
    seeds = [
        seed_of(run, kind, prompt_id, sample)
        for run in (0, 1)
        for kind in ("sample", "heldout")
        for prompt_id in range(50)
        for sample in range(4)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    assert seed_of(1, 12) != seed_of(11, 2), "parts are kept apart"


@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_visits_every_row_once(seed: int, rows: int, epoch: int) -> None:
    visited = [stream_row(seed, prompt_id, rows) for prompt_id in range(epoch * rows, (epoch + 1) * rows)]
    assert sorted(visited) == list(range(rows))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [
        tuple(stream_row(seed, prompt_id, 30) for prompt_id in range(epoch * 30, (epoch + 1) * 30))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert tuple(range(30)) not in orders


def test_steps_continue_the_stream_over_epochs() -> None:
    prompts = [np.arange(row + 1, dtype=np.int32) for row in range(5)]
    rollout = RolloutSection(prompts_per_step=4, samples_per_prompt=2)
    asked = [request for step in range(3) for request in step_requests(prompts, rollout, seed=3, step=step)]
    assert [(r.prompt_id, r.sample) for r in asked] == [(p, s) for p in range(12) for s in range(2)]
    assert [r.row for r in asked[::2]] == [stream_row(3, prompt_id, 5) for prompt_id in range(12)]
    assert all(len(request.token_ids) == request.row + 1 for request in asked)
    assert [r.seed for r in asked] == [seed_of(3, "sample", r.prompt_id, r.sample) for r in asked]
    assert {request.attempt for request in asked} == {0}


@pytest.mark.parametrize("count", [1, 7, 8, 9])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_groups_are_consecutive_and_full_but_for_the_last(count: int, size: int) -> None:
    rollout = RolloutSection(prompts_per_step=count, group_size=size)
    requests = step_requests([np.zeros(1, np.int32)], rollout, seed=3, step=2)
    groups = groups_of(requests, size)
    assert [request for group in groups for request in group] == requests
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    assert 0 < len(groups[-1]) <= size
    assert len(groups) == rollout.groups_per_step


@given(LENGTHS, SMALL, SMALL)
def test_ranks_share_every_item_once_in_order(lengths: list[int], minibatches: int, ranks: int) -> None:
    shares = deal_to_ranks(lengths, minibatches=minibatches, ranks=ranks)
    assert len(shares) == ranks
    assert sorted(item for share in shares for item in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    if len(lengths) >= minibatches * ranks:
        assert all(shares), "no rank is left without work"


@given(LENGTHS, SMALL, SMALL)
def test_ranks_get_about_as_many_tokens(lengths: list[int], minibatches: int, ranks: int) -> None:
    tokens = [
        sum(lengths[item] for item in share) for share in deal_to_ranks(lengths, minibatches=minibatches, ranks=ranks)
    ]
    assert max(tokens) - min(tokens) <= minibatches * max(lengths), "one block of the longest is the worst"


def test_a_straight_deal_would_give_the_first_rank_more() -> None:
    lengths = list(range(64, 0, -1))
    tokens = [sum(lengths[i] for i in share) for share in deal_to_ranks(lengths, minibatches=2, ranks=4)]
    assert tokens == [520, 520, 520, 520]


@given(LENGTHS, SMALL, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_minibatches_are_even_and_hold_every_length(
    lengths: list[int], minibatches: int, seed: int, step: int, epoch: int
) -> None:
    assignment = minibatch_of(lengths, minibatches=minibatches, seed=seed, step=step, epoch=epoch)
    sizes = Counter(assignment)
    assert set(sizes) <= set(range(minibatches))
    assert max(sizes.values()) - min(sizes[m] for m in range(minibatches)) <= 1
    for block in length_blocks(lengths, minibatches):
        assert len({assignment[item] for item in block}) == len(block), "a block gives one item to each minibatch"


@given(LENGTHS, SMALL, st.integers(0, 3))
def test_each_rank_has_its_part_of_each_minibatch(lengths: list[int], minibatches: int, step: int) -> None:
    """Composition does not depend on the ranks, and on each rank the minibatches are level too."""
    assignment = minibatch_of(lengths, minibatches=minibatches, seed=0, step=step, epoch=0)
    for ranks in (1, 2, 3):
        for share in deal_to_ranks(lengths, minibatches=minibatches, ranks=ranks):
            sizes = Counter(assignment[item] for item in share)
            assert max(sizes.values(), default=0) - min(sizes[m] for m in range(minibatches)) <= 1


def test_epochs_and_steps_shuffle_anew() -> None:
    lengths = [10] * 32
    drawn = {
        tuple(minibatch_of(lengths, minibatches=2, seed=seed, step=step, epoch=epoch))
        for seed in (0, 1)
        for step in (0, 1)
        for epoch in (0, 1)
    }
    assert len(drawn) == 8
