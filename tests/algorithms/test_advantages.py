import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.advantages import gae, kl_penalized_rewards, next_kl_coef
from r3hf_ray.algorithms.redistribution import PrefixScores, normalize, redistribute

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
