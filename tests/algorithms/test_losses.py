import itertools

import numpy as np
import pytest
import torch

from r3hf_ray.algorithms.advantages import kl_estimate
from r3hf_ray.algorithms.losses import importance_weights, kl_loss, policy_loss, value_loss

B, T, D = 6, 9, 4
MASK = torch.arange(T) < torch.tensor([9, 3, 5, 1, 7, 4])[:, None]
MASK[:, 0] = False
MASK[3, 1] = True
N = int(MASK.sum())


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FEATURES, OLD, BEHAVIOR, ADVANTAGES = (
    randn(B, T, D, seed=0),
    randn(B, T, seed=1),
    randn(B, T, seed=2),
    randn(B, T, seed=3),
)
WEIGHT = 0.3 * randn(D, seed=4)


def policy_share(weight, rows, *, importance=None):
    logprobs = OLD[rows] + FEATURES[rows] @ weight
    capped = importance[rows] if importance is not None else None
    return policy_loss(
        logprobs, OLD[rows], ADVANTAGES[rows], MASK[rows], clip_range=0.2, num_tokens=N, importance=capped
    )


def value_share(weight, rows):
    return value_loss(FEATURES[rows] @ weight, OLD[rows], ADVANTAGES[rows], MASK[rows], clip_range=0.2, num_tokens=N)


def summed(share, split):
    """Loss, gradient and metrics added up over microbatches (and ranks: a sum of sums is the same sum)."""
    weight = WEIGHT.clone().requires_grad_()
    loss, totals = torch.tensor(0.0, dtype=torch.float64), {}
    for rows in split:
        part, metrics = share(weight, rows)
        part.backward()
        loss = loss + part.detach()
        for name, value in metrics.items():
            joined = torch.maximum if name.endswith("_max") else torch.add
            totals[name] = joined(totals[name], value) if name in totals else value
    return loss, weight.grad, totals


SPLITS = [
    [[0, 1, 2], [3, 4, 5]],
    [[0], [1], [2], [3], [4], [5]],
    [[5, 0], [2, 4, 1], [3]],  # two ranks of unequal token counts and microbatches
]


def test_the_splits_are_unequal_in_tokens():
    assert len({int(MASK[rows].sum()) for rows in SPLITS[0]}) == 2


@pytest.mark.parametrize("split", SPLITS, ids=["ranks", "rows", "uneven"])
@pytest.mark.parametrize("share", [policy_share, value_share])
def test_loss_gradient_and_metrics_are_the_same_for_any_split(share, split):
    loss, gradient, totals = summed(share, [list(range(B))])
    split_loss, split_gradient, split_totals = summed(share, split)
    torch.testing.assert_close(split_loss, loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(split_gradient, gradient, rtol=0, atol=1e-14)
    torch.testing.assert_close(split_totals, totals, rtol=0, atol=1e-12)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("share", [policy_share, value_share])
def test_the_sum_of_the_shares_is_the_mean_over_all_tokens_not_a_mean_of_means(share):
    per_row = [share(WEIGHT, [b])[0] * N / MASK[b].sum() for b in range(B)]
    torch.testing.assert_close(
        share(WEIGHT, list(range(B)))[0], sum(x * MASK[b].sum() for b, x in enumerate(per_row)) / N
    )
    assert not torch.isclose(share(WEIGHT, list(range(B)))[0], torch.stack(per_row).mean())


def test_policy_loss_is_the_clipped_surrogate_token_by_token():
    ratio = np.exp((FEATURES @ WEIGHT).numpy())
    total, active = 0.0, 0
    for b, t in itertools.product(range(B), range(T)):
        if MASK[b, t]:
            a, q = ADVANTAGES[b, t].item(), ratio[b, t]
            total -= min(a * q, a * np.clip(q, 0.8, 1.2))
            active += (a > 0 and q > 1.2) or (a < 0 and q < 0.8)
    loss, metrics = policy_share(WEIGHT, list(range(B)))
    assert loss.item() == pytest.approx(total / N, abs=1e-13)
    assert 0 < active < N
    assert metrics["clipfrac"] == active
    inside = ratio[MASK.numpy()]
    assert metrics["ratio"].item() == pytest.approx(inside.sum())
    assert metrics["ratio_max"].item() == pytest.approx(inside.max())
    assert metrics["approx_kl"].item() == pytest.approx((inside - 1 - np.log(inside)).sum())
    assert not any(value.requires_grad for value in metrics.values())


def test_on_the_first_step_the_ratio_is_1_and_the_gradient_is_the_policy_gradient():
    logits = randn(B, T, 5, seed=8).requires_grad_()
    tokens = torch.randint(5, (B, T), generator=torch.Generator().manual_seed(0))
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), ADVANTAGES, MASK, clip_range=0.2, num_tokens=N)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    vanilla = -(ADVANTAGES * logprobs)[MASK].sum() / N
    (expected,) = torch.autograd.grad(vanilla, logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    assert metrics["clipfrac"] == 0
    assert metrics["approx_kl"] == 0
    assert metrics["ratio"] == N
    assert metrics["ratio_max"] == 1


def test_where_the_clip_is_active_the_gradient_is_zero():
    mask = torch.ones(1, 4, dtype=torch.bool)
    logprobs = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, metrics = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, clip_range=0.2, num_tokens=4)
    loss.backward()
    assert (logprobs.grad != 0).tolist() == [[False, True, True, False]]
    assert metrics["clipfrac"] == 2


def test_value_loss_is_the_larger_of_the_clipped_and_plain_squared_errors():
    values = (FEATURES @ WEIGHT).numpy()
    near = OLD.numpy() + np.clip(values - OLD.numpy(), -0.2, 0.2)
    plain, clipped = (values - ADVANTAGES.numpy()) ** 2, (near - ADVANTAGES.numpy()) ** 2
    inside = MASK.numpy()
    loss, metrics = value_share(WEIGHT, list(range(B)))
    assert loss.item() == pytest.approx(0.5 * np.maximum(plain, clipped)[inside].sum() / N, abs=1e-13)
    assert 0 < metrics["clipfrac"].item() == (clipped > plain)[inside].sum() < N


def test_clip_range_0_is_the_plain_squared_error():
    values = FEATURES @ WEIGHT
    loss, metrics = value_loss(values, OLD, ADVANTAGES, MASK, clip_range=0.0, num_tokens=N)
    torch.testing.assert_close(loss, 0.5 * (values - ADVANTAGES)[MASK].square().sum() / N)
    assert metrics["clipfrac"] == 0


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient(clip_range):
    junk = torch.full((B, T), float("nan"), dtype=torch.float64)
    old, targets = torch.where(MASK, OLD, junk), torch.where(MASK, ADVANTAGES, junk)
    for function, limits in [(policy_loss, {"clip_range": 0.2}), (value_loss, {"clip_range": clip_range})]:
        clean_input, dirty_input = ((FEATURES @ WEIGHT).requires_grad_() for _ in range(2))
        clean, clean_metrics = function(clean_input, OLD, ADVANTAGES, MASK, num_tokens=N, **limits)
        dirty, dirty_metrics = function(dirty_input, old, targets, MASK, num_tokens=N, **limits)
        (clean + dirty).backward()
        assert torch.equal(clean, dirty)
        assert torch.equal(clean_input.grad, dirty_input.grad)
        assert clean_metrics == dirty_metrics


@pytest.mark.parametrize("function", [policy_loss, value_loss])
def test_a_fully_masked_filler_adds_exactly_nothing_but_stays_in_the_graph(function):
    weight = WEIGHT.clone().requires_grad_()
    nothing = torch.zeros(1, T, dtype=torch.bool)
    loss, metrics = function(FEATURES[:1] @ weight, OLD[:1], ADVANTAGES[:1], nothing, clip_range=0.2, num_tokens=N)
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros(D, dtype=torch.float64))
    assert all(value == 0 for value in metrics.values())


def test_importance_weights_are_capped_above_and_zero_outside():
    weights = importance_weights(OLD, BEHAVIOR, MASK, cap=2.0)
    expected = np.minimum(np.exp((OLD - BEHAVIOR).numpy()), 2.0) * MASK.numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-13)
    assert (weights == 2.0).any()
    junk = torch.where(MASK, BEHAVIOR, torch.full_like(BEHAVIOR, -1e9))
    assert torch.equal(importance_weights(OLD, junk, MASK, cap=2.0), weights)
    assert torch.equal(importance_weights(OLD, OLD, MASK, cap=2.0), MASK.double())


def test_importance_weights_multiply_each_tokens_loss():
    rows = list(range(B))
    weights = importance_weights(OLD, BEHAVIOR, MASK, cap=2.0)
    plain, _ = policy_loss(OLD, OLD, ADVANTAGES * weights, MASK, clip_range=0.2, num_tokens=N)
    weighted, _ = policy_loss(OLD, OLD, ADVANTAGES, MASK, clip_range=0.2, num_tokens=N, importance=weights)
    torch.testing.assert_close(weighted, plain)
    ones = MASK.double()
    assert torch.equal(policy_share(WEIGHT, rows, importance=ones)[0], policy_share(WEIGHT, rows)[0])


def test_the_upper_clip_has_its_own_range():
    ratio = (FEATURES @ WEIGHT).exp().numpy()
    a, inside = ADVANTAGES.numpy(), MASK.numpy()
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.5))[inside].sum() / N
    logprobs, rows = OLD + FEATURES @ WEIGHT, list(range(B))
    loss, _ = policy_loss(logprobs, OLD, ADVANTAGES, MASK, clip_range=0.2, num_tokens=N, clip_range_high=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-13)
    assert loss != policy_share(WEIGHT, rows)[0]
    same, _ = policy_loss(logprobs, OLD, ADVANTAGES, MASK, clip_range=0.2, num_tokens=N, clip_range_high=0.2)
    assert torch.equal(same, policy_share(WEIGHT, rows)[0])


def test_dual_clip_bounds_the_loss_of_bad_tokens_that_became_likely():
    ratio = torch.tensor([[1.0, 2.9, 3.1, 8.0, 8.0]], dtype=torch.float64)
    advantages = torch.tensor([[-1.0, -1.0, -1.0, -2.0, 1.0]], dtype=torch.float64)
    mask, logprobs = torch.ones(1, 5, dtype=torch.bool), ratio.log().requires_grad_()
    old = torch.zeros_like(ratio)
    loss, metrics = policy_loss(logprobs, old, advantages, mask, clip_range=0.2, num_tokens=1, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.0 + 2.9 + 3.0 + 6.0 - 1.2)
    assert (logprobs.grad != 0).tolist() == [[True, True, False, False, False]]
    assert metrics["dual_clipfrac"] == 2
    without, plain = policy_loss(logprobs, old, advantages, mask, clip_range=0.2, num_tokens=1)
    assert without.item() == pytest.approx(1.0 + 2.9 + 3.1 + 16.0 - 1.2)
    assert "dual_clipfrac" not in plain


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_as_a_loss_has_the_gradient_of_the_kl_whatever_it_reports(estimator):
    """In expectation over the policy's own samples, summed exactly over a vocabulary of three."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    every = torch.ones(1, 3, dtype=torch.bool)
    probability = policy.detach().exp()[None]  # as weights: each token of the vocabulary, as often as it is sampled
    loss, metrics = kl_loss(policy[None], reference[None], every, coef=probability, estimator=estimator, num_tokens=1)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-14)
    if estimator != "k2":
        torch.testing.assert_close(loss.detach(), kl.detach())
    torch.testing.assert_close(metrics["kl_loss"], kl_estimate((policy - reference).detach()[None], estimator).sum())


def test_kl_loss_reads_no_padding_and_a_filler_adds_nothing():
    junk = torch.where(MASK, BEHAVIOR, torch.full_like(BEHAVIOR, float("nan")))
    coef = 0.1 * MASK.double()
    logprobs = OLD.clone().requires_grad_()
    loss, _ = kl_loss(logprobs, junk, MASK, coef=coef, estimator="k3", num_tokens=N)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, 0.1 * (OLD - BEHAVIOR) * MASK / N)
    nothing = torch.zeros_like(MASK)
    empty, metrics = kl_loss(logprobs, junk, nothing, coef=coef, estimator="k3", num_tokens=N)
    assert empty == 0 and metrics["kl_loss"] == 0
