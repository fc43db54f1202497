import pytest
import torch
from torch.nn import functional as F

from r3hf_ray.models.load import load_policy
from r3hf_ray.models.logprobs import Policy, token_logprobs, token_logprobs_and_entropy


@pytest.fixture(scope="module", params=["policy", "tied"])
def model(request, tiny_models):
    return load_policy(tiny_models._asdict()[request.param], torch.float32)


def batch(shapes, width=None, seed=0, pad=0):
    """Random rows of (prompt, response) lengths."""
    width = width or max(p + r for p, r in shapes)
    ids = torch.full((len(shapes), width), pad)
    attention, response = (
        torch.zeros(len(shapes), width, dtype=torch.bool),
        torch.zeros(len(shapes), width, dtype=torch.bool),
    )
    for row, (prompt, answer) in enumerate(shapes):
        generator = torch.Generator().manual_seed(1000 * prompt + 10 * answer + seed)
        ids[row, : prompt + answer] = torch.randint(2, 40, (prompt + answer,), generator=generator)
        attention[row, : prompt + answer] = True
        response[row, prompt : prompt + answer] = True
    return ids, attention, response


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_a_loop_over_tokens(model, temperature):
    ids, attention, response = batch([(3, 4), (1, 6), (5, 1)])
    logprobs, entropy = token_logprobs_and_entropy(model, ids, attention, response, temperature=temperature)
    expected, spread = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for b, t in response.nonzero().tolist():
        distribution = F.log_softmax(model(ids[b : b + 1, :t]).logits[0, -1] / temperature, dim=-1)
        expected[b, t], spread[b, t] = distribution[ids[b, t]], -(distribution.exp() * distribution).sum()
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, spread, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        token_logprobs(model, ids, attention, response, temperature=temperature), expected, rtol=1e-5, atol=1e-6
    )
    assert not logprobs[~response].any() and not entropy[~response].any()


@torch.no_grad()
def test_padding_and_company_change_nothing(model):
    ids, attention, response = batch([(3, 4)])
    alone = token_logprobs(model, ids, attention, response, temperature=1.0)
    for pad in (0, 2, 17):
        wide = batch([(3, 4), (2, 9), (6, 6)], width=15, pad=pad)
        packed = token_logprobs(model, *wide, temperature=1.0)
        torch.testing.assert_close(packed[:1, :7], alone, rtol=0, atol=2e-6)
        assert not packed[0, 7:].any()


def test_gradient_is_that_of_the_full_logits(model):
    ids, attention, response = batch([(3, 4), (1, 6)])
    weights = list(model.parameters())
    token_logprobs(model, ids, attention, response, temperature=1.0).sum().backward()
    got = [w.grad.clone() for w in weights]
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    full = F.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    full[response[:, 1:]].sum().backward()
    for mine, weight in zip(got, weights, strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_a_batch_without_responses_gives_zero_and_a_graph(model):
    ids, attention, response = batch([(3, 4)])
    out = Policy(model)(ids, attention, torch.zeros_like(response), temperature=1.0)
    assert not out.any()
    out.sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in model.parameters())
    model.zero_grad()


def test_dropout_is_off(model):
    assert model.config.attention_dropout > 0  # it would show
    rows = batch([(3, 4)])
    first, second = (token_logprobs(model, *rows, temperature=1.0) for _ in range(2))
    assert torch.equal(first, second)


@torch.no_grad()
def test_only_response_positions_are_projected(model):
    ids, attention, response = batch([(3, 4), (1, 6)])
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    token_logprobs(model, ids, attention, response, temperature=1.0)
    hook.remove()
    assert seen == [(10, 40)]
