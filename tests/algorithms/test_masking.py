import numpy as np
import torch

from r3hf_ray.algorithms.masking import last_token, masked_sum, moments, previous_token, whiten

MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def junk_outside(mask, seed=0):
    x = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(~mask, float("nan"))


def test_a_sum_ignores_junk_outside_the_mask_and_so_does_its_gradient():
    x = junk_outside(MASK).requires_grad_()
    inside = x.detach()[MASK]
    torch.testing.assert_close(masked_sum(x, MASK), inside.sum())
    masked_sum(x, MASK).backward()
    assert torch.equal(x.grad, MASK.double())


def test_an_empty_mask_gives_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), float("inf"))
    assert masked_sum(x, nothing) == 0
    assert torch.equal(moments(x, nothing), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(whiten(x, nothing, moments(x, nothing)), torch.zeros(2, 3))


def test_moments_are_float64_and_those_of_shares_add_up():
    x = junk_outside(MASK).float()
    whole = moments(x, MASK)
    assert whole.dtype == torch.float64
    assert whole[0] == 4
    torch.testing.assert_close(moments(x[:1], MASK[:1]) + moments(x[1:], MASK[1:]), whole, rtol=1e-14, atol=0)


def test_whiten_is_numpys_population_standardisation():
    x = junk_outside(MASK)
    white = whiten(x, MASK, moments(x, MASK), eps=0.0)
    inside = x[MASK].numpy()
    np.testing.assert_allclose(white[MASK], (inside - inside.mean()) / inside.std(), rtol=1e-12)
    assert torch.equal(white[~MASK], torch.zeros(11, dtype=torch.float64))


def test_whitening_shares_by_global_moments_is_whitening_the_whole():
    x = junk_outside(MASK).float()
    everything = moments(x[:1], MASK[:1]) + moments(x[1:], MASK[1:])
    shares = torch.cat([whiten(x[:1], MASK[:1], everything), whiten(x[1:], MASK[1:], everything)])
    torch.testing.assert_close(shares, whiten(x, MASK, moments(x, MASK)))
    assert shares.dtype == torch.float32


def test_whitening_a_constant_gives_zeros():
    x = torch.full((2, 4), 3.0)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(whiten(x, mask, moments(x, mask)), torch.zeros(2, 4))


def test_last_token_is_one_hot_and_an_empty_row_has_none():
    assert last_token(MASK).int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_previous_token_steps_over_holes():
    assert previous_token(MASK).tolist() == [[-1, -1, 1, 2, 2], [-1, -1, -1, 2, 2], [-1] * 5]
