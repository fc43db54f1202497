import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from r3hf_ray.models.attention import hidden_states
from r3hf_ray.models.load import load_policy
from r3hf_ray.models.logprobs import Policy, token_logprobs, token_logprobs_and_entropy
from r3hf_ray.models.sharding import make_mesh, shard


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


# ------------------------------------------------------------------------------------------------------- in chunks


class Peak(TorchDispatchMode):
    """Bytes of all storages that were made inside and live at the same time, at most, of those of `smallest` bytes."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.live, self.peak = smallest, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.smallest:
                storage = x.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [str(function)] * str(function).startswith("c10d")
        return function(*args, **(kwargs or {}))


def wide_model(vocabulary, tied=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **shape)).eval()


def full_logprobs(model, ids, attention, response, temperature):
    """What `token_logprobs` was before it had chunks: a cross-entropy of all logits at once."""
    hidden = hidden_states(model, ids, attention)[:, :-1][response[:, 1:]]
    logits = model.get_output_embeddings()(hidden).float()
    chosen = -F.cross_entropy(logits / temperature, ids[:, 1:][response[:, 1:]], reduction="none")
    return chosen.new_zeros(response.shape).masked_scatter(response, chosen)


def gradients(model, logprobs):
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


LONG = [(3, 60), (1, 90), (5, 70), (2, 9)]


@pytest.mark.parametrize("chunk", [64, 100, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_change_no_bit_but_those_of_the_heads_gradient(tied, temperature, chunk):
    model, rows = wide_model(300, tied), batch(LONG)
    expected = full_logprobs(model, *rows, temperature)
    wanted = gradients(model, expected)
    got = token_logprobs(model, *rows, temperature=temperature, chunk=chunk)
    assert torch.equal(got, expected)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for name, gradient in gradients(model, got).items():
        if name == head and chunk < 229:
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-6 * float(wanted[name].abs().max()))
        else:
            assert torch.equal(gradient, wanted[name]), name
    at_once = token_logprobs_and_entropy(model, *rows, temperature=temperature, chunk=10_000)
    for part, whole in zip(
        token_logprobs_and_entropy(model, *rows, temperature=temperature, chunk=chunk), at_once, strict=True
    ):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("tokens", [0, 1, 31, 64, 65, 127, 129, 1000])
def test_chunks_are_even_and_of_32_rows_at_least(tokens):
    seen = []
    model = wide_model(40)
    ids, attention, response = batch([(1, max(tokens, 1))])
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        token_logprobs(model, ids, attention, response & (tokens > 0), temperature=1.0, chunk=64)
    assert sum(seen) == tokens and max(seen) <= 64
    assert len(seen) == 1 or (min(seen) >= 32 and max(seen) - min(seen) <= 1)


def test_a_16_bit_heads_gradient_is_no_worse_than_at_once():
    model, rows = wide_model(300).bfloat16(), batch(LONG)
    exact = wide_model(300).double()
    exact.load_state_dict(model.state_dict())
    low = {
        "at once": full_logprobs(model, *rows, 1.0),
        "chunks": token_logprobs(model, *rows, temperature=1.0, chunk=64),
    }
    hidden = hidden_states(model, *rows[:2])[:, :-1][rows[2][:, 1:]].detach()
    weights = torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(1))[rows[2]].double()
    logits = F.linear(hidden.double(), exact.lm_head.weight)
    (-F.cross_entropy(logits, rows[0][:, 1:][rows[2][:, 1:]], reduction="none") * weights).sum().backward()
    error = {
        name: float((gradients(model, logprobs)["lm_head.weight"].double() - exact.lm_head.weight.grad).norm())
        for name, logprobs in low.items()
    }
    assert torch.equal(low["chunks"], low["at once"])
    assert error["chunks"] <= error["at once"] * 1.001


def test_at_most_four_copies_of_a_chunks_logits_and_one_gradient_of_the_head_live_at_once():
    vocabulary, chunk = 3000, 64
    model, rows = wide_model(vocabulary), batch(LONG)
    one, head = 4 * chunk * vocabulary, 4 * 32 * vocabulary
    tokens = int(rows[2].sum())
    with Peak(smallest=head) as whole:
        full_logprobs(model, *rows, 0.7).sum().backward()
    model.zero_grad()
    assert whole.peak >= 3 * 4 * tokens * vocabulary
    with Peak(smallest=head) as backward:
        token_logprobs(model, *rows, temperature=0.7, chunk=chunk).sum().backward()
    with Peak(smallest=head) as forward:
        token_logprobs_and_entropy(model, *rows, temperature=0.7, chunk=chunk)
    assert one <= forward.peak <= 4 * one
    # The embeddings, whose gradient is as large, come after the head's.
    assert one <= backward.peak <= 4 * one + 2 * head


@pytest.mark.parametrize("blocks", ["never", "always"])
def test_a_sharded_head_is_gathered_once_however_many_chunks(tiny_models, run_ranks, blocks):
    def on_a_rank(rank):
        counts = []
        for chunk in (1024, 64):
            policy = Policy(load_policy(tiny_models.tied, torch.float32), chunk=chunk).eval()
            shard(policy, make_mesh(2, "cpu"), blocks=blocks, dtype=torch.float32)
            with Collectives() as seen:
                policy(*batch(LONG[:1] * 3), temperature=1.0).sum().backward()
            counts.append(seen.names)
        return counts

    for whole, parts in run_ranks(on_a_rank):
        assert whole == parts
        gathers = sum("allgather" in name for name in whole)
        assert gathers == {"never": 1, "always": 1 + 2 * 2}[blocks]  # the root once, a block in each direction
