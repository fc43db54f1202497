import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.redistribution import (
    METHODS,
    TOTALS,
    PrefixScores,
    expected_sum,
    missing_eos,
    normalize,
    r3hf,
    redistribute,
    telescoping_error,
    terminal,
)

OPTIONS = [
    {"mode": mode, "beta_c": beta_c, "subtract_prompt_score": subtract}
    for mode, beta_c, subtract in itertools.product(["terminal", "r3hf"], [0.0, 0.5, 1.0], [True, False])
]


def ragged(seed=0, dtype=torch.float64, lengths=((2, 5), (1, 1), (4, 3), (3, 9))):
    """Prompts and responses of different lengths, right-padded; the pooled score differs from the last prefix score."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + response for prompt, response in lengths) + 2
    position = torch.arange(width)
    mask = torch.stack([(position >= p) & (position < p + n) for p, n in lengths])
    prefix = torch.randn(mask.shape, generator=generator, dtype=dtype).masked_fill(~mask, 0.0)
    prompt = torch.randn(len(lengths), generator=generator, dtype=dtype)
    pooled = 3 * torch.randn(len(lengths), generator=generator, dtype=dtype)
    return PrefixScores(prefix=prefix, prompt=prompt, pooled=pooled), mask


def brute_force(scores, mask, *, mode, beta_c, subtract_prompt_score):
    """The definition, one token after the other."""
    prefix, prompt, pooled = scores.prefix.numpy(), scores.prompt.numpy(), scores.pooled.numpy()
    rewards = np.zeros(mask.shape)
    for b in range(len(mask)):
        tokens = np.flatnonzero(mask[b].numpy())
        before = prompt[b] if subtract_prompt_score else 0.0
        for t in tokens:
            is_last = t == tokens[-1]
            after = pooled[b] if is_last else prefix[b, t]
            sparse = pooled[b] if is_last else 0.0
            dense = sparse if mode == "terminal" else after - before
            rewards[b, t] = beta_c * dense + (1 - beta_c) * sparse
            before = after
    return rewards


def test_the_example_of_the_docstring():
    scores = PrefixScores(
        prefix=torch.tensor([[0, 0, 0.9, 1.7]]), prompt=torch.tensor([0.5]), pooled=torch.tensor([2.0])
    )
    mask = torch.tensor([[False, False, True, True]])
    torch.testing.assert_close(r3hf(scores, mask), torch.tensor([[0, 0, 0.4, 1.1]]))
    torch.testing.assert_close(terminal(scores, mask), torch.tensor([[0, 0, 0, 2.0]]))


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_definition_token_by_token(options):
    scores, mask = ragged()
    rewards = redistribute(scores, mask, **options)
    np.testing.assert_allclose(rewards, brute_force(scores, mask, **options), rtol=0, atol=1e-14)
    assert torch.equal(rewards[~mask], torch.zeros_like(rewards[~mask]))


@pytest.mark.parametrize("options", OPTIONS)
def test_telescopes_to_the_expected_sum(options):
    scores, mask = ragged()
    total = redistribute(scores, mask, **options).sum(1)
    torch.testing.assert_close(total, expected_sum(scores, **options), rtol=0, atol=1e-13)
    assert (telescoping_error(redistribute(scores, mask, **options), scores, mask, **options) < 1e-14).all()


@given(st.integers(0, 2**31), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=5))
def test_telescopes_in_float32_for_any_lengths(seed, lengths):
    scores, mask = ragged(seed, torch.float32, lengths)
    for options in OPTIONS:
        rewards = redistribute(scores, mask, **options)
        assert rewards.dtype == torch.float32
        assert (telescoping_error(rewards, scores, mask, **options) < 1e-5).all()


def test_expected_sums_are_the_documented_ones():
    scores, _ = ragged()
    score, prompt = scores.pooled, scores.prompt
    sums = {(o["mode"], o["beta_c"], o["subtract_prompt_score"]): expected_sum(scores, **o) for o in OPTIONS}
    for beta_c, subtract in itertools.product([0.0, 0.5, 1.0], [True, False]):
        torch.testing.assert_close(sums["terminal", beta_c, subtract], score)
        torch.testing.assert_close(sums["r3hf", beta_c, subtract], score - beta_c * subtract * prompt)


def test_the_template_jump_lands_on_the_last_token():
    scores, mask = ragged()
    jumped = replace(scores, pooled=scores.pooled + 10.0)
    difference = r3hf(jumped, mask) - r3hf(scores, mask)
    torch.testing.assert_close(difference, terminal(jumped, mask) - terminal(scores, mask))
    torch.testing.assert_close(difference.sum(1), torch.full((4,), 10.0, dtype=torch.float64))


def test_the_last_prefix_score_itself_is_not_read_but_replaced_by_the_pooled_one():
    scores, mask = ragged()
    other = scores.prefix.clone()
    other[0, 6] = 99.0  # the last token of row 0: prompt of 2, response of 5
    assert torch.equal(r3hf(replace(scores, prefix=other), mask), r3hf(scores, mask))


def test_the_prompt_score_touches_the_first_token_only():
    scores, mask = ragged()
    difference = r3hf(scores, mask, subtract_prompt_score=False) - r3hf(scores, mask)
    expected = torch.zeros_like(difference)
    for row, first in enumerate([2, 1, 4, 3]):
        expected[row, first] = scores.prompt[row]
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-14)


def test_a_constant_added_to_the_reward_model_cancels_and_its_scale_does_not():
    scores, mask = ragged()
    shifted = PrefixScores(prefix=scores.prefix + 7.0 * mask, prompt=scores.prompt + 7.0, pooled=scores.pooled + 7.0)
    torch.testing.assert_close(r3hf(shifted, mask), r3hf(scores, mask), rtol=0, atol=1e-13)
    assert not torch.allclose(terminal(shifted, mask), terminal(scores, mask))
    scaled = PrefixScores(prefix=2 * scores.prefix, prompt=2 * scores.prompt, pooled=2 * scores.pooled)
    torch.testing.assert_close(r3hf(scaled, mask), 2 * r3hf(scores, mask))


def test_a_hole_in_the_mask_pays_the_next_response_token_and_the_sum_stays_exact():
    scores, _ = ragged(lengths=((1, 4),))
    mask = torch.tensor([[False, True, True, False, True, False, False]])
    rewards = r3hf(scores, mask)
    torch.testing.assert_close(rewards[0, 4], scores.pooled[0] - scores.prefix[0, 2])
    assert rewards[0, 3] == 0
    torch.testing.assert_close(rewards.sum(), (scores.pooled - scores.prompt).sum())


def test_padding_is_never_read_and_an_empty_row_earns_nothing():
    scores, mask = ragged()
    junk = replace(scores, prefix=scores.prefix.masked_fill(~mask, float("nan")))
    for options in OPTIONS:
        rewards = redistribute(junk, mask, **options)
        assert torch.equal(rewards, redistribute(scores, mask, **options))
        assert torch.equal(
            telescoping_error(rewards, junk, mask, **options), telescoping_error(rewards, scores, mask, **options)
        )
        nothing = redistribute(junk, torch.zeros_like(mask), **options)
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o["mode"] == "r3hf" and o["beta_c"] > 0])
def test_the_telescoping_error_sees_the_mistakes_it_is_there_for(options):
    scores, mask = ragged()
    rewards = redistribute(scores, mask, **options)
    cut = rewards.clone()
    cut[:, -3] = 0.0  # the last token of the longest row
    clipped = rewards.clamp(-0.5, 0.5)
    for wrong in (cut, clipped, rewards + 0.1 * mask):
        assert telescoping_error(wrong, scores, mask, **options).max() > 1e-2


def test_unknown_names_are_refused_with_the_choices():
    scores, mask = ragged()
    for function in (
        lambda: redistribute(scores, mask, mode="sparse", beta_c=1.0, subtract_prompt_score=True),
        lambda: expected_sum(scores, mode="sparse", beta_c=1.0, subtract_prompt_score=True),
    ):
        with pytest.raises(ValueError, match="no redistribution method 'sparse'; choose one of terminal, r3hf"):
            function()
    with pytest.raises(ValueError, match="choose keep, penalty or zero_credit"):
        missing_eos(scores.prefix, mask, torch.ones(4, dtype=torch.bool), rule="drop", penalty=1.0)


def test_every_method_says_what_it_sums_to():
    scores, mask = ragged()
    assert METHODS.keys() == TOTALS.keys()
    for name, method in METHODS.items():
        torch.testing.assert_close(method(scores, mask).sum(1), TOTALS[name](scores), rtol=0, atol=1e-13)


@pytest.mark.parametrize("terminal_weight", [0.0, 0.5, 1.0])
def test_normalize_has_no_term_in_the_length(terminal_weight):
    scores, mask = ragged(lengths=((1, 1), (1, 10), (1, 200)))
    rewards = r3hf(scores, mask)
    normal = normalize(rewards, mask, mean=3.0, scale=4.0, terminal_weight=terminal_weight)
    torch.testing.assert_close(normal.sum(1), (rewards.sum(1) - terminal_weight * 3.0) / 4.0, rtol=0, atol=1e-12)
    taken_off = torch.zeros_like(rewards)
    for row, last in enumerate([1, 10, 200]):
        taken_off[row, last] = terminal_weight * 3.0 / 4.0
    torch.testing.assert_close(rewards / 4.0 - normal, taken_off, rtol=0, atol=1e-14)
    assert torch.equal(normal[~mask], torch.zeros_like(normal[~mask]))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_token_rewards_would_pay_for_length(shift_mean):
    scores, mask = ragged(lengths=((1, 1), (1, 10), (1, 200)))
    rewards = r3hf(scores, mask) + 0.3 * mask
    mean, std = rewards[mask].mean(), rewards[mask].std()
    whitened = ((rewards - mean) / std + (0.0 if shift_mean else mean)) * mask
    length_term = whitened.sum(1) - rewards.sum(1) / std
    per_token = -mean / std if shift_mean else mean * (1 - 1 / std)
    torch.testing.assert_close(length_term, per_token * mask.sum(1), rtol=1e-9, atol=1e-9)
    assert length_term.abs().max() > 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    scores, mask = ragged()
    with pytest.raises(ValueError, match="must be positive"):
        normalize(scores.prefix, mask, mean=0.0, scale=scale, terminal_weight=0.0)


def test_missing_eos_rules():
    scores, mask = ragged()
    rewards = r3hf(scores, mask)
    truncated = torch.tensor([True, False, True, False])
    kept, fined, zeroed = (
        missing_eos(rewards, mask, truncated, rule=rule, penalty=2.0) for rule in ("keep", "penalty", "zero_credit")
    )
    assert torch.equal(kept, rewards)
    for result in (fined, zeroed):
        assert torch.equal(result[~truncated], rewards[~truncated])
        assert torch.equal(result[~mask], torch.zeros_like(result[~mask]))
    torch.testing.assert_close(fined.sum(1), rewards.sum(1) - 2.0 * truncated)
    assert fined[0, 6] == rewards[0, 6] - 2.0
    assert torch.equal(fined[0, :6], rewards[0, :6])
    assert zeroed[0, 6] == -2.0
    assert torch.equal(zeroed[truncated].sum(1), torch.full((2,), -2.0, dtype=torch.float64))
    assert (zeroed[truncated] != 0).sum() == 2
