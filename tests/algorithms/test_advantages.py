import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.advantages import (
    STD_FLOOR,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_penalized_rewards,
    next_kl_coef,
    returns_to_go,
    rloo_advantages,
    whole_returns,
)
from r3hf_ray.algorithms.redistribution import PrefixScores, redistribute
from r3hf_ray.algorithms.scaling import normalize

LENGTHS = ((2, 5), (1, 1), (4, 3), (3, 12))


def padded_mask(lengths=LENGTHS):
    position = torch.arange(max(map(sum, lengths)) + 2)
    return torch.stack([(position >= p) & (position < p + n) for p, n in lengths])


def noise(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64).masked_fill(~mask, 0.0)


def prefix_scores(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = mask.shape[0]
    return PrefixScores(
        prefix=noise(mask, seed + 1),
        prompt=torch.randn(rows, generator=generator, dtype=torch.float64),
        pooled=2 * torch.randn(rows, generator=generator, dtype=torch.float64),
    )


def potential(scores, mask, *, subtract_prompt_score):
    """Phi(s_t) = R(x, y_<t): the prefix score before each token, found by walking along each row."""
    phi = torch.zeros_like(scores.prefix)
    for b in range(len(mask)):
        before = scores.prompt[b] if subtract_prompt_score else torch.tensor(0.0)
        for t in mask[b].nonzero().flatten().tolist():
            phi[b, t] = before
            before = scores.prefix[b, t]
    return phi


def brute_force_gae(rewards, values, mask, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, summed anew for every t."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        tokens = np.flatnonzero(mask[b].numpy())
        r, v = rewards[b, tokens].numpy(), np.append(values[b, tokens].numpy(), 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(tokens):
            advantages[b, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(tokens) - i))
    return advantages


def largest_gap(mask, *, gamma, lam, beta_c, subtract, seed):
    scores, values = prefix_scores(mask, seed), noise(mask, seed + 7)
    options = {"beta_c": beta_c, "subtract_prompt_score": subtract}
    shaped = redistribute(scores, mask, mode="r3hf", **options)
    sparse = redistribute(scores, mask, mode="terminal", **options)
    phi = potential(scores, mask, subtract_prompt_score=subtract)
    with_shaping, _ = gae(shaped, values - beta_c * phi, mask, gamma=gamma, lam=lam)
    without, _ = gae(sparse, values, mask, gamma=gamma, lam=lam)
    return (with_shaping - without).abs().max().item()


GRID = list(itertools.product([0.0, 0.5, 0.95, 1.0], [0.0, 0.5, 1.0], [True, False]))


@pytest.mark.parametrize(("lam", "beta_c", "subtract"), GRID)
def test_golden_redistribution_is_a_change_of_critic(lam, beta_c, subtract):
    for seed in range(5):
        assert largest_gap(padded_mask(), gamma=1.0, lam=lam, beta_c=beta_c, subtract=subtract, seed=seed) < 1e-12


@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=4),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_golden_for_any_lengths_lambda_and_mixture(seed, lengths, lam, beta_c):
    mask = padded_mask(lengths)
    assert largest_gap(mask, gamma=1.0, lam=lam, beta_c=beta_c, subtract=True, seed=seed) < 1e-12


@pytest.mark.parametrize(("lam", "beta_c", "subtract"), [case for case in GRID if case[1] > 0])
def test_golden_is_false_when_rewards_are_discounted(lam, beta_c, subtract):
    assert largest_gap(padded_mask(), gamma=0.99, lam=lam, beta_c=beta_c, subtract=subtract, seed=0) > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_sparse_with_the_reward_model_as_critic_starts_as_r3hf_with_a_zero_critic(lam):
    mask = padded_mask()
    scores = prefix_scores(mask, 3)
    mean, scale = 0.7, 2.5
    options = {"beta_c": 1.0, "subtract_prompt_score": True}
    dense = normalize(
        redistribute(scores, mask, mode="r3hf", **options), mask, mean=mean, scale=scale, terminal_weight=0.0
    )
    sparse = normalize(
        redistribute(scores, mask, mode="terminal", **options), mask, mean=mean, scale=scale, terminal_weight=1.0
    )
    critic = ((potential(scores, mask, subtract_prompt_score=True) - mean) / scale).masked_fill(~mask, 0.0)
    from_dense, _ = gae(dense, torch.zeros_like(dense), mask, gamma=1.0, lam=lam)
    from_sparse, _ = gae(sparse, critic, mask, gamma=1.0, lam=lam)
    torch.testing.assert_close(from_dense, from_sparse, rtol=0, atol=1e-12)


def test_with_lambda_1_and_one_critic_r3hf_only_subtracts_a_baseline_of_the_state():
    mask = padded_mask()
    scores, values = prefix_scores(mask, 4), noise(mask, 5)
    options = {"beta_c": 1.0, "subtract_prompt_score": True}
    dense, _ = gae(redistribute(scores, mask, mode="r3hf", **options), values, mask, gamma=1.0, lam=1.0)
    sparse, _ = gae(redistribute(scores, mask, mode="terminal", **options), values, mask, gamma=1.0, lam=1.0)
    phi = potential(scores, mask, subtract_prompt_score=True)
    torch.testing.assert_close(dense, sparse - phi, rtol=0, atol=1e-12)


HOLES = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("mask", [padded_mask(), HOLES], ids=["ragged", "holes"])
@pytest.mark.parametrize(("gamma", "lam"), itertools.product([1.0, 0.9], [0.0, 0.5, 0.95, 1.0]))
def test_gae_is_the_brute_force_sum(mask, gamma, lam):
    rewards, values = noise(mask, 1), noise(mask, 2)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, brute_force_gae(rewards, values, mask, gamma, lam), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, advantages + values)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("mask", [padded_mask(), HOLES], ids=["ragged", "holes"])
def test_gae_ignores_junk_in_padding_prompt_and_holes(mask, junk):
    rewards, values = noise(mask, 1), noise(mask, 2)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    dirty = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, junk), mask, gamma=0.9, lam=0.7)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b[~mask], torch.zeros_like(b[~mask]))


def test_gae_does_not_depend_on_how_far_a_row_is_padded_or_on_its_neighbours():
    mask = padded_mask()
    rewards, values = noise(mask, 1), noise(mask, 2)
    together, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    alone, _ = gae(rewards[:1, :7], values[:1, :7], mask[:1, :7], gamma=1.0, lam=0.95)
    assert torch.equal(together[:1, :7], alone)


def test_the_state_after_the_last_token_is_worth_nothing():
    one = torch.ones(1, 1, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), one, gamma=1.0, lam=0.3)
    assert advantages.item() == 1.5
    assert returns.item() == 2.0


def test_the_kl_penalty_is_the_signed_log_ratio_of_each_token():
    mask = torch.tensor([[False, True, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 2.0, 9.0]])
    logprobs, reference = torch.tensor([[9.0, -1.0, -2.0, 9.0]]), torch.tensor([[0.0, -1.5, -1.0, float("nan")]])
    result = kl_penalized_rewards(rewards, logprobs, reference, mask, kl_coef=0.1)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.95, 2.1, 0.0]]))


def test_the_kl_controller_moves_towards_its_target_and_no_faster_than_a_fifth():
    step = {"target": 6.0, "horizon": 100.0, "responses": 50}
    assert next_kl_coef(0.05, kl=6.0, **step) == 0.05
    assert next_kl_coef(0.05, kl=6.6, **step) == pytest.approx(0.05 * 1.05)
    assert next_kl_coef(0.05, kl=600.0, **step) == pytest.approx(0.05 * 1.1)
    assert next_kl_coef(0.05, kl=-5.0, **step) == pytest.approx(0.05 * 0.9)


def test_the_three_estimates_of_a_tokens_kl():
    log_ratio = torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float64)
    e = np.exp(0.5)
    torch.testing.assert_close(kl_estimate(log_ratio, "k1"), log_ratio)
    torch.testing.assert_close(kl_estimate(log_ratio, "k2"), torch.tensor([[0.125, 0.125, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[1 / e - 0.5, e - 1.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(log_ratio, "k3"), expected)
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        kl_estimate(log_ratio, "k4")


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log()[None], torch.tensor([0.3, 0.3, 0.4]).log()[None]
    exact = (policy.exp() * (policy - reference)).sum()
    means = {name: (policy.exp() * kl_estimate(policy - reference, name)).sum() for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert abs(means["k2"] - exact) > 0.005


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_penalty_takes_the_estimator(estimator):
    mask = torch.tensor([[False, True, True]])
    logprobs, reference = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[float("nan"), -1.5, -1.0]])
    result = kl_penalized_rewards(torch.ones(1, 3), logprobs, reference, mask, kl_coef=0.1, estimator=estimator)
    expected = 1.0 - 0.1 * kl_estimate(torch.tensor([[0.0, 0.5, -1.0]]), estimator)
    torch.testing.assert_close(result, expected * mask)


def test_return_to_go_of_r3hf_is_the_score_minus_the_prefix_score():
    mask = padded_mask()
    scores = prefix_scores(mask, 3)
    rewards = redistribute(scores, mask, mode="r3hf", beta_c=1.0, subtract_prompt_score=True)
    to_go = returns_to_go(rewards, mask, gamma=1.0)
    phi = potential(scores, mask, subtract_prompt_score=True)
    torch.testing.assert_close(to_go, (scores.pooled[:, None] - phi) * mask, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole_returns(to_go, mask), scores.pooled - scores.prompt, rtol=0, atol=1e-13)
    assert whole_returns(to_go, torch.zeros_like(mask)).tolist() == [0.0] * len(mask)


GROUPS = torch.tensor([7, 7, 7, 3])
"""Prompt ids of the rows of `padded_mask`: three samples of one prompt, one of another."""


def in_group(to_go, mask):
    return GROUPS, whole_returns(to_go, mask)


def test_rloo_of_terminal_rewards_is_rloo():
    mask, score = padded_mask(), torch.tensor([1.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    scores = PrefixScores(prefix=noise(mask, 1), prompt=torch.zeros_like(score), pooled=score)
    to_go = returns_to_go(
        redistribute(scores, mask, mode="terminal", beta_c=1.0, subtract_prompt_score=True), mask, gamma=1.0
    )
    advantages = rloo_advantages(to_go, mask, GROUPS, in_group(to_go, mask))
    # the last prompt has one sample, which is compared with all others
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 5 - 3.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected[:, None] * mask)


def test_grpo_of_terminal_rewards_is_grpo():
    mask, score = padded_mask(), torch.tensor([1.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    to_go = score[:, None] * mask
    advantages = grpo_advantages(to_go, mask, GROUPS, in_group(to_go, mask))
    group, everyone = np.array([1, 2, 6.0]), score.numpy()
    expected = [*((group - group.mean()) / group.std()), (5 - everyone.mean()) / everyone.std()]
    torch.testing.assert_close(advantages, torch.tensor(expected)[:, None] * mask)


def test_a_group_of_equal_rewards_is_not_blown_up():
    mask = padded_mask()
    to_go = noise(mask, 2)
    equal = (GROUPS, torch.ones(4, dtype=torch.float64))
    advantages = grpo_advantages(to_go, mask, GROUPS, equal)
    torch.testing.assert_close(advantages, (to_go - 1.0) * mask / STD_FLOOR)
    assert "max(std, STD_FLOOR)" in str(grpo_advantages.__doc__), "the constant by its name, not by a number of its own"


@pytest.mark.parametrize("relative", [rloo_advantages, grpo_advantages])
def test_token_credit_enters_as_a_baseline_of_the_state_and_the_first_token_is_the_sequences(relative):
    """With r3hf the advantage is terminal's minus (P_{t-1} - P_0) and nothing else: the same expected gradient."""
    mask = padded_mask()
    scores = replace(prefix_scores(mask, 3), prompt=torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64))
    options = {"beta_c": 1.0, "subtract_prompt_score": True}
    dense, sparse = (
        returns_to_go(redistribute(scores, mask, mode=mode, **options), mask, gamma=1.0)
        for mode in ("r3hf", "terminal")
    )
    dense_advantages = relative(dense, mask, GROUPS, in_group(dense, mask))
    sparse_advantages = relative(sparse, mask, GROUPS, in_group(sparse, mask))
    paid = (potential(scores, mask, subtract_prompt_score=True) - 0.5) * mask
    gap = sparse_advantages - dense_advantages
    if relative is rloo_advantages:
        torch.testing.assert_close(gap, paid, rtol=0, atol=1e-13)
    first = mask & (mask.cumsum(1) == 1)
    torch.testing.assert_close(gap[first], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("relative", [rloo_advantages, grpo_advantages])
def test_padding_is_not_read_by_group_advantages(relative):
    mask = padded_mask()
    to_go = noise(mask, 2)
    everyone = in_group(to_go, mask)
    junk = to_go.masked_fill(~mask, float("nan"))
    assert torch.equal(relative(junk, mask, GROUPS, everyone), relative(to_go, mask, GROUPS, everyone))
