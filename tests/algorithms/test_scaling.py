import pytest
import torch

from r3hf_ray.algorithms.redistribution import PrefixScores, r3hf, redistribute, uniform
from r3hf_ray.algorithms.scaling import missing_eos, normalize, normalize_shares


@pytest.mark.parametrize("terminal_weight", [0.0, 0.5, 1.0])
def test_normalize_has_no_term_in_the_length(ragged, terminal_weight):
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
def test_whitening_token_rewards_would_pay_for_length(ragged, shift_mean):
    scores, mask = ragged(lengths=((1, 1), (1, 10), (1, 200)))
    rewards = r3hf(scores, mask) + 0.3 * mask
    mean, std = rewards[mask].mean(), rewards[mask].std()
    whitened = ((rewards - mean) / std + (0.0 if shift_mean else mean)) * mask
    length_term = whitened.sum(1) - rewards.sum(1) / std
    per_token = -mean / std if shift_mean else mean * (1 - 1 / std)
    torch.testing.assert_close(length_term, per_token * mask.sum(1), rtol=1e-9, atol=1e-9)
    assert length_term.abs().max() > 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(ragged, scale):
    scores, mask = ragged()
    with pytest.raises(ValueError, match="must be positive"):
        normalize(scores.prefix, mask, mean=0.0, scale=scale, terminal_weight=0.0)


def test_missing_eos_rules(ragged):
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


@pytest.mark.parametrize("beta_c", [0.0, 0.8, 1.0])
def test_shares_of_the_score_become_shares_of_the_centred_score(ragged, beta_c):
    scores, mask = ragged(lengths=((1, 1), (1, 10), (1, 200)))
    options = {"mode": "uniform", "beta_c": beta_c, "subtract_prompt_score": True}
    rewards = redistribute(scores, mask, **options)
    normal = normalize_shares(rewards, scores.pooled, mask, mean=3.0, scale=4.0)
    centred = PrefixScores(prefix=scores.prefix, prompt=scores.prompt, pooled=(scores.pooled - 3.0) / 4.0)
    torch.testing.assert_close(normal, redistribute(centred, mask, **options), rtol=0, atol=1e-14)
    torch.testing.assert_close(normal.sum(1), centred.pooled, rtol=0, atol=1e-13)


def test_the_reward_models_offset_and_scale_are_gone_from_shares(ragged):
    scores, mask = ragged()
    moved = PrefixScores(prefix=scores.prefix, prompt=scores.prompt, pooled=5.0 * scores.pooled + 40.0)
    one = normalize_shares(uniform(scores, mask), scores.pooled, mask, mean=0.2, scale=1.5)
    other = normalize_shares(uniform(moved, mask), moved.pooled, mask, mean=5.0 * 0.2 + 40.0, scale=7.5)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_shares_of_a_score_that_is_0_are_unknown_and_the_last_token_gets_the_mean(ragged):
    _, mask = ragged(lengths=((1, 3),))
    normal = normalize_shares(torch.zeros(mask.shape), torch.zeros(1), mask, mean=2.0, scale=4.0)
    assert normal.tolist() == [[0.0, 0.0, 0.0, -0.5, 0.0, 0.0]]


def test_unknown_rule_is_refused_with_the_choices(ragged):
    scores, mask = ragged()
    with pytest.raises(ValueError, match="choose keep, penalty or zero_credit"):
        missing_eos(scores.prefix, mask, torch.ones(4, dtype=torch.bool), rule="drop", penalty=1.0)
