import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from r3hf_ray.models import sharding
from r3hf_ray.models.load import load_policy
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import (
    all_reduce_max,
    all_reduce_sum,
    checkpoint_activations,
    full_parameters,
    grad_norm,
    make_mesh,
    reduce_gradients,
    scale_gradients,
    shard,
)
from r3hf_ray.models.values import critic_from_policy


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (4, 9), generator=generator)
    attention = torch.arange(9) < torch.tensor([[9], [7], [8], [5]])
    return ids, attention, attention & (torch.arange(9) >= 3)


def full_gradients(policy):
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in policy.named_parameters())
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).numpy() for name, x in named}


def share_of_gradients(folder, blocks, dtype, checkpointing, rank, world):
    """Gradients of the summed logprobs, each rank giving its rows; on one rank, of all rows."""
    policy = Policy(load_policy(folder, torch.float32)).eval()
    if checkpointing:
        checkpoint_activations(policy)
    shard(policy, make_mesh(world, "cpu") if world > 1 else None, blocks=blocks, dtype=dtype)
    mine = [x[rank::world] for x in rows()]
    loss = policy(*mine, temperature=1.0).sum()
    loss.backward()
    total = float(all_reduce_sum(loss.detach().clone()))
    return total, full_gradients(policy), grad_norm(policy)


@pytest.mark.parametrize("model", ["policy", "tied"])
@pytest.mark.parametrize(("blocks", "checkpointing"), [("never", False), ("always", False), ("always", True)])
def test_gradients_of_two_ranks_add_up_to_those_of_one(tiny_models, run_ranks, model, blocks, checkpointing):
    folder = tiny_models._asdict()[model]
    expected, gradients, norm = share_of_gradients(folder, blocks, torch.float32, False, 0, 1)

    def on_a_rank(rank):
        return share_of_gradients(folder, blocks, torch.float32, checkpointing, rank, 2)

    for total, summed, same in run_ranks(on_a_rank):
        assert total == pytest.approx(expected, rel=1e-6)
        assert summed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(summed[name], gradient, rtol=1e-4, atol=1e-4)
        assert same == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("model", ["policy", "tied"])
def test_full_parameters_of_two_ranks_are_the_state_dict(tiny_models, run_ranks, model):
    folder = tiny_models._asdict()[model]

    def on_a_rank(rank):
        policy = Policy(load_policy(folder, torch.float32)).eval()
        shard(policy, make_mesh(2, "cpu"), blocks="always", dtype=torch.float32)
        before = {name: x.numpy() for name, x in full_parameters(policy.model)}
        with torch.no_grad():
            policy(*rows(), temperature=1.0)  # leaves the root unsharded
        return before, {name: x.numpy() for name, x in full_parameters(policy.model)}

    expected = load_policy(folder, torch.float32).state_dict()
    if model == "tied":
        del expected["lm_head.weight"]
    for answers in run_ranks(on_a_rank):
        for parameters in answers:
            assert parameters.keys() == expected.keys()
            assert all(torch.equal(torch.from_numpy(parameters[name]), x) for name, x in expected.items())


def test_full_parameters_without_a_group_copy_nothing(tiny_models):
    model = load_policy(tiny_models.policy, torch.float32)
    pointers = {name: x.data_ptr() for name, x in model.state_dict().items()}
    assert {name: x.data_ptr() for name, x in full_parameters(model)} == pointers


def test_a_rank_with_a_filler_only_changes_nothing(tiny_models, run_ranks):
    folder = tiny_models.policy
    _, gradients, _ = share_of_gradients(folder, "never", torch.float32, False, 0, 1)

    def on_a_rank(rank):
        policy = Policy(load_policy(folder, torch.float32)).eval()
        shard(policy, make_mesh(2, "cpu"), blocks="never", dtype=torch.float32)
        ids, attention, response = rows()
        policy(ids, attention, response & (rank == 0), temperature=1.0).sum().backward()
        norm = grad_norm(policy)
        return norm, full_gradients(policy)

    for norm, summed in run_ranks(on_a_rank):
        assert norm > 0
        for name, gradient in gradients.items():
            np.testing.assert_allclose(summed[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_computes_low_and_keeps_float32_weights(tiny_models, run_ranks, world):
    folder = tiny_models.policy

    def on_a_rank(rank):
        critic = critic_from_policy(folder, torch.float32)
        nn.init.ones_(critic.head.weight)
        seen = []
        critic.trunk.layers[0].mlp.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        critic.head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        mesh = make_mesh(world, "cpu")
        shard(critic, mesh, blocks="always", dtype=torch.bfloat16, keep_float32=critic.head)
        out = critic(*rows()[:2])
        out.sum().backward()
        kept = {x.dtype for p in critic.parameters() for x in (p, p.grad)}
        return seen, out.dtype, kept

    for seen, out, kept in run_ranks(on_a_rank, world=world):
        assert seen == [torch.bfloat16, torch.float32]
        assert out == torch.float32
        assert kept == {torch.float32}


def test_bfloat16_on_one_rank_without_a_group(tiny_models, run_ranks):
    folder = tiny_models.policy

    def alone(rank):
        torch.distributed.destroy_process_group()
        policy = Policy(load_policy(folder, torch.float32)).eval()
        reference = policy(*rows(), temperature=1.0).detach()
        shard(policy, None, blocks="never", dtype=torch.bfloat16)
        low = policy(*rows(), temperature=1.0)
        low.sum().backward()
        return float((low - reference).abs().max()), math.isfinite(grad_norm(policy))

    [(gap, finite)] = run_ranks(alone, world=1)
    assert 1e-4 < gap < 0.3 and finite


def test_one_float32_rank_is_not_sharded(tiny_models):
    policy = Policy(load_policy(tiny_models.policy, torch.float32))
    shard(policy, None, blocks="always", dtype=torch.float32)
    assert type(policy) is Policy
    with pytest.raises(RuntimeError, match="2 ranks"):
        make_mesh(2, "cpu")


def test_checkpointing_recomputes_in_eval_mode_and_keeps_names(tiny_models):
    plain, saving = (Policy(load_policy(tiny_models.policy, torch.float32)) for _ in range(2))
    checkpoint_activations(saving)
    calls = []
    for name, policy in (("plain", plain), ("saving", saving)):
        policy.model.model.layers[0].self_attn.register_forward_hook(lambda *_, name=name: calls.append(name))
    for policy in (plain, saving):
        policy.eval()(*rows(), temperature=1.0).sum().backward()
    assert calls == ["plain", "saving", "saving"]
    assert grad_norm(plain) == grad_norm(saving)
    assert [name for name, _ in full_parameters(plain.model)] == [name for name, _ in full_parameters(saving.model)]


def test_clipping_equals_torch(tiny_models):
    mine, theirs = (Policy(load_policy(tiny_models.policy, torch.float32)).eval() for _ in range(2))
    for policy in (mine, theirs):
        policy(*rows(), temperature=1.0).sum().backward()
    expected = float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    norm = grad_norm(mine)
    assert norm == pytest.approx(expected, rel=1e-6)
    scale_gradients(mine, norm=norm, max_norm=0.5)
    assert grad_norm(mine) == pytest.approx(0.5, rel=1e-5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    scale_gradients(mine, norm=0.5, max_norm=10.0)
    assert grad_norm(mine) == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_that_is_not_finite_shows_in_the_norm(tiny_models):
    policy = Policy(load_policy(tiny_models.policy, torch.float32))
    parameters = list(policy.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    parameters[3].grad.view(-1)[5] = math.nan
    assert math.isnan(grad_norm(policy))
    parameters[3].grad.view(-1)[5] = math.inf
    assert math.isinf(grad_norm(policy))


def test_reductions(run_ranks):
    def on_a_rank(rank):
        return (
            all_reduce_sum(torch.tensor([1.0 + rank])).tolist(),
            all_reduce_max(torch.tensor([1.0 + rank])).tolist(),
        )

    assert run_ranks(on_a_rank) == [([3.0], [2.0])] * 2
    x = torch.tensor([4.0])
    assert all_reduce_sum(x) is x and all_reduce_max(x) is x


@pytest.mark.parametrize(("when", "reductions"), [("auto", 1), ("minibatch", 1), ("microbatch", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_reduced_after_the_last_microbatch(tiny_models, run_ranks, when, reductions, dtype):
    def on_a_rank(rank):
        grads, counts, names = [], [], []

        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.extend([str(function)] * ("reduce_scatter" in str(function)))
                return function(*args, **(kwargs or {}))

        for rule in (when, "microbatch"):
            policy = Policy(load_policy(tiny_models.policy, torch.float32)).eval()
            shard(policy, make_mesh(2, "cpu"), blocks="never", dtype=dtype)
            with Counter():
                for number in range(3):
                    reduce_gradients(policy, number == 2, rule)
                    mine = [x[(number + rank) % 4 :][:1] for x in rows()]
                    policy(*mine, temperature=1.0).sum().backward()
            grads.append(full_gradients(policy))
            counts.append(len(names))
            names.clear()
        return grads, counts

    for (once, each), counts in run_ranks(on_a_rank):
        assert counts == [reductions, 3]
        for name, gradient in each.items():
            atol = 1e-6 * float(np.abs(gradient).max()) + 1e-12
            np.testing.assert_allclose(once[name], gradient, rtol=0, atol=atol if dtype == torch.float32 else 1e-4)


def test_a_whole_gradient_that_is_too_large_is_not_held(tiny_models, run_ranks):
    def on_a_rank(rank):
        policy = Policy(load_policy(tiny_models.policy, torch.float32)).eval()
        shard(policy, make_mesh(2, "cpu"), blocks="never", dtype=torch.float32)
        sharding.WHOLE_GRADIENT_BYTES = 1000
        reduce_gradients(policy, False, "auto")
        policy(*rows(), temperature=1.0).sum().backward()
        return [p.grad is not None for p in policy.parameters()]

    assert all(all(given) for given in run_ranks(on_a_rank))


def test_full_parameters_are_cast_where_they_are_and_gathered_in_that_type(tiny_models, run_ranks):
    def on_a_rank(rank):
        policy = Policy(load_policy(tiny_models.tied, torch.float32)).eval()
        shard(policy, make_mesh(2, "cpu"), blocks="always", dtype=torch.float32)
        sent = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if "all_gather" in str(function):
                    sent.append(args[0].dtype)
                return function(*args, **(kwargs or {}))

        with Watch():
            cast = {name: x.float().numpy() for name, x in full_parameters(policy.model, torch.bfloat16)}
        return sent, cast

    whole = load_policy(tiny_models.tied, torch.float32).state_dict()
    expected = {name: x.bfloat16().float() for name, x in whole.items()}
    for sent, cast in run_ranks(on_a_rank):
        assert set(sent) == {torch.bfloat16}
        assert all(torch.equal(torch.from_numpy(x), expected[name]) for name, x in cast.items())
