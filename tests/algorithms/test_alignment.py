"""Boundaries between two tokenizations, on cases counted by hand and on random cuts of a text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.alignment import align, boundaries, unmapped
from r3hf_ray.algorithms.redistribution import PrefixScores, r3hf

CUTS = st.lists(st.integers(0, 4), max_size=12).map(lambda lengths: np.cumsum(lengths, dtype=np.int64))
"""Where the tokens of a text end; some hold no whole character."""


@pytest.mark.parametrize(
    ("policy", "reader", "expected"),
    [
        ([2, 7, 9], [1, 5, 9], [0, 1, 2]),
        ([2, 4, 6], [2, 4, 6], [0, 1, 2]),
        ([1, 2, 3], [3], [-1, -1, 0]),
        ([3], [1, 2, 3], [2]),
        ([0, 0, 1], [1, 1, 1], [-1, -1, 2]),
        ([4, 8], [5, 3, 8], [-1, 2]),
        ([4, 8], [], [-1, -1]),
        ([], [1], []),
    ],
    ids=["crossing", "equal", "coarser", "finer", "bytes of one character", "out of order", "nothing read", "no token"],
)
def test_boundaries(policy, reader, expected):
    found = boundaries(np.array(policy, np.int64), np.array(reader, np.int64))
    assert found.tolist() == expected


@given(CUTS, CUTS)
def test_a_boundary_is_the_last_token_that_has_read_nothing_to_come(policy, reader):
    found = boundaries(policy, reader)
    assert (np.diff(found) >= 0).all()
    for end, last in zip(policy, found, strict=True):
        assert (reader[: last + 1] <= end).all()
        assert last + 1 == len(reader) or reader[last + 1] > end


@given(CUTS)
def test_the_same_cuts_meet_everywhere(ends):
    """Tokens without a character of their own share the boundary of the last of them."""
    expected = [int(np.flatnonzero(ends == end)[-1]) for end in ends]
    assert boundaries(ends, ends).tolist() == expected


def test_unmapped():
    assert unmapped(np.array([-1, 0, 0, 2, 2])).tolist() == [True, False, True, False, True]
    assert unmapped(np.array([0])).tolist() == [False]
    assert unmapped(np.array([], np.int64)).tolist() == []


def scores(prefix, prompt, pooled):
    return PrefixScores(prefix=torch.tensor(prefix), prompt=torch.tensor(prompt), pooled=torch.tensor(pooled))


def test_scores_are_taken_at_the_boundaries():
    """Prompt of one token for the policy and of two for the reader; the last token takes the pooled score."""
    theirs = scores([[0.0, 0.0, 1.0, 3.0, 6.0]], [0.5], [10.0])
    mask = torch.tensor([[False, True, True, True, True, False]])
    columns = torch.tensor([[-1, -1, 2, 2, 4, -1]])
    ours = align(theirs, columns, mask)
    assert ours.prefix.tolist() == [[0.0, 0.5, 1.0, 1.0, 10.0, 0.0]]
    assert (ours.prompt.tolist(), ours.pooled.tolist()) == ([0.5], [10.0])
    assert r3hf(ours, mask).tolist() == [[0.0, 0.0, 0.5, 0.0, 9.0, 0.0]]


@given(st.data())
def test_differences_add_up_however_the_text_is_cut(data):
    policy, reader = data.draw(CUTS.filter(len)), data.draw(CUTS)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    prefix, prompt, pooled = (torch.from_numpy(rng.normal(size=size)) for size in ((1, 1 + len(reader)), 1, 1))
    theirs = PrefixScores(prefix=prefix, prompt=prompt, pooled=pooled)
    mask = torch.tensor([[False] + [True] * len(policy)])
    found = boundaries(policy, reader)
    columns = torch.tensor([[-1, *np.where(found >= 0, found + 1, -1)]])
    rewards = r3hf(align(theirs, columns, mask), mask)[0]
    assert float(rewards.sum()) == pytest.approx(float(theirs.pooled - theirs.prompt), abs=1e-9)
    assert not rewards[1:-1][torch.from_numpy(unmapped(found)[:-1])].any(), "exactly 0 where nothing was read"
    assert rewards[0] == 0
