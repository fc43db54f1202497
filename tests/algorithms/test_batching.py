from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.batching import (
    LIKE,
    WORTH_A_FORWARD,
    collate,
    masked_filler,
    microbatches,
    pad_rows,
    tensors_of,
)
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

PER_TOKEN = ["behavior_logprobs", "ref_logprobs", "by_model.reward.token_rewards", "by_model.reward.prefix_scores"]


def scored(prompt_len, response_len, seed=0, finish=Finish.EOS):
    rng = np.random.default_rng((seed, prompt_len, response_len))

    def per_token():
        return np.concatenate([np.zeros(prompt_len), rng.normal(size=response_len)]).astype(np.float32)

    trajectory = Trajectory(
        prompt_id=100 + seed,
        sample=seed % 3,
        attempt=0,
        policy_version=seed,
        prompt_len=prompt_len,
        finish=finish,
        token_ids=rng.integers(1, 50, prompt_len + response_len).astype(np.int32),
        behavior_logprobs=per_token(),
    )
    for array in (trajectory.token_ids, trajectory.behavior_logprobs):
        array.setflags(write=False)  # as Ray's object store hands them out
    main = ModelScores(
        token_rewards=per_token(),
        prefix_scores=per_token(),
        score=float(rng.normal()),
        prompt_score=float(rng.normal()),
    )
    return ScoredTrajectory(trajectory=trajectory, ref_logprobs=per_token(), by_model={MAIN: main})


SHAPES = [(2, 5), (4, 1), (1, 9), (3, 3)]


def example():
    return [scored(p, n, seed=i, finish=Finish.LENGTH if i == 2 else Finish.EOS) for i, (p, n) in enumerate(SHAPES)]


def test_collate_round_trip():
    items = example()
    batch = collate(items, pad_id=51)
    assert batch.token_ids.shape == (4, 10)
    assert batch.token_ids.dtype == torch.int64
    assert batch.lengths == [7, 5, 10, 6]
    for b, item in enumerate(items):
        trajectory, length = item.trajectory, len(item.trajectory.token_ids)
        np.testing.assert_array_equal(batch.token_ids[b, :length], trajectory.token_ids)
        assert (batch.token_ids[b, length:] == 51).all()
        positions = np.arange(10)
        np.testing.assert_array_equal(batch.attention_mask[b], positions < length)
        np.testing.assert_array_equal(
            batch.response_mask[b], (positions >= trajectory.prompt_len) & (positions < length)
        )
        sources = [trajectory.behavior_logprobs, item.ref_logprobs, item.main.token_rewards, item.main.prefix_scores]
        for name, source in zip(PER_TOKEN, sources, strict=True):
            np.testing.assert_array_equal(tensors_of(batch)[name][b, :length], source)
    np.testing.assert_array_equal(batch.main.score, np.float32([i.main.score for i in items]))
    np.testing.assert_array_equal(batch.main.prompt_score, np.float32([i.main.prompt_score for i in items]))
    assert batch.truncated.tolist() == [False, False, True, False]
    assert batch.prompt_ids.tolist() == [100, 101, 102, 103]
    assert batch.samples.tolist() == [0, 1, 2, 0]
    assert batch.policy_versions.tolist() == [0, 1, 2, 3]


def test_everything_per_token_is_exactly_zero_outside_the_response():
    batch = collate(example(), pad_id=0)
    for name in PER_TOKEN:
        outside = tensors_of(batch)[name][~batch.response_mask]
        assert torch.equal(outside, torch.zeros_like(outside))


@pytest.mark.parametrize("index", [[1, 3], torch.tensor([1, 3])], ids=["list", "tensor"])
def test_rows_are_the_collation_of_the_chosen_trajectories(index):
    items = example()
    chosen, direct = collate(items, pad_id=0).rows(index), collate([items[1], items[3]], pad_id=0)
    assert chosen.token_ids.shape == (2, 6)
    for name, x in tensors_of(chosen).items():
        assert torch.equal(x, tensors_of(direct)[name]), name


def test_rows_keep_the_order_asked_for_and_to_moves_every_tensor():
    batch = collate(example(), pad_id=0)
    assert batch.rows([3, 0, 2]).prompt_ids.tolist() == [103, 100, 102]
    assert all(x.is_meta for x in tensors_of(batch.to("meta")).values())


def with_cost(items):
    """Each trajectory with a cost model's scores: its own, negative, and half of the prompt's."""
    return [
        replace(
            item,
            alignment_loss=0.25 * i,
            by_model=item.by_model
            | {
                "cost": ModelScores(
                    token_rewards=-item.main.token_rewards,
                    prefix_scores=-item.main.prefix_scores,
                    score=-item.main.score,
                    prompt_score=item.main.prompt_score / 2,
                )
            },
        )
        for i, item in enumerate(items)
    ]


def test_further_models_go_wherever_the_main_one_goes():
    items = with_cost(example())
    batch = collate(items, pad_id=0)
    assert list(batch.by_model) == ["reward", "cost"]
    main, cost = batch.by_model.values()
    assert main is batch.main
    assert torch.equal(cost.token_rewards, -main.token_rewards) and torch.equal(cost.scores.pooled, -main.score)
    assert torch.equal(cost.scores.prefix, -main.prefix_scores)
    assert torch.equal(cost.scores.prompt, main.prompt_score / 2)
    assert batch.alignment_loss.tolist() == [0.0, 0.25, 0.5, 0.75]
    chosen, direct = tensors_of(batch.rows([3, 1])), tensors_of(collate([items[3], items[1]], pad_id=0))
    assert chosen.keys() == direct.keys() >= {"by_model.cost.score", "by_model.reward.score"}
    assert all(torch.equal(x, direct[name]) for name, x in chosen.items())
    assert all(x.is_meta for x in tensors_of(batch.to("meta")).values())
    filler = masked_filler(batch).by_model["cost"]
    assert not filler.token_rewards.any() and not filler.prefix_scores.any()


def test_a_batch_scored_by_different_models_is_refused():
    items = example()
    with pytest.raises(ValueError, match="different reward models"):
        collate([items[0], *with_cost(items[1:])], pad_id=0)


def test_padding_copies_so_that_shared_memory_is_never_written():
    row = np.arange(3, dtype=np.float32)
    pad_rows([row], fill=0.0)[0, 0] = 9.0
    assert row[0] == 0.0


def test_a_filler_is_one_short_row_with_nothing_to_learn_from():
    batch = collate(example(), pad_id=0)
    filler = masked_filler(batch)
    assert filler.token_ids.tolist() == batch.token_ids[1:2, :5].tolist()
    assert filler.attention_mask.all()
    assert not filler.response_mask.any()
    assert not any(tensors_of(filler)[name].any() for name in PER_TOKEN)


def test_rows_of_unlike_lengths_part_where_a_forward_is_worth_it():
    long = WORTH_A_FORWARD
    assert microbatches([long, long, long * 7 // 10 + 1, long // 2, long // 2, 8], budget_tokens=8 * long) == [
        [0, 1, 2],
        [3, 4],
        [5],
    ]
    assert microbatches([64, 8, 8, 8], budget_tokens=8 * long) == [[0, 1, 2, 3]]  # little, so one forward


def test_padding_of_a_spread_of_lengths_is_a_fifth_at_most():
    """Prompts and answers of HH-RLHF, about: most short, a few very long."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.8, 0.8, 256).astype(int) + 8, 1024).tolist()
    for row in range(4):
        mine = lengths[row::4]
        groups = microbatches(mine, budget_tokens=32_768)
        padded = sum(len(group) * max(mine[i] for i in group) for group in groups)
        assert 1.0 <= padded / sum(mine) < 1.2
        assert len(mine) * max(mine) / sum(mine) > 2.0


def test_the_example_of_microbatches():
    assert microbatches([3, 9, 4, 8], budget_tokens=16) == [[1], [3, 2], [0]]


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 1000))
def test_microbatches_hold_every_row_once_within_the_budget(lengths, budget):
    groups = microbatches(lengths, budget_tokens=budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= budget or len(group) == 1
        assert group


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(200, 1000))
def test_microbatches_are_greedy_sorted_and_a_pure_function_of_the_lengths(lengths, budget):
    groups = microbatches(lengths, budget_tokens=budget)
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(lengths, reverse=True)
    assert groups == microbatches(list(lengths), budget_tokens=budget)
    for group, following in pairwise(groups):
        longest, shorter = lengths[group[0]], lengths[following[0]]
        full = (len(group) + 1) * longest > budget
        unlike = shorter < LIKE * longest and len(group) * longest >= WORTH_A_FORWARD
        assert full or unlike, f"{following[0]} would have fitted"
