"""Models that each rank reads its own slices of are the same, bit for bit, as those that are loaded whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from r3hf_ray.errors import ModelError
from r3hf_ray.models.load import load_policy, untrained_reward_model
from r3hf_ray.models.load_sharded import sharded_critic, sharded_policy
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import full_parameters, grad_norm, make_mesh, shard
from r3hf_ray.models.values import critic_from_policy, critic_from_reward_model

CPU = torch.device("cpu")
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 20.0, "final_logit_softcapping": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": 16},
}
SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}


def rows():
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.arange(9) < torch.tensor([[9], [6], [7]])
    return ids, attention, attention & (torch.arange(9) >= 3)


def sharding(mesh, blocks="always", dtype=torch.float32):
    return lambda module: shard(module, mesh, blocks=blocks, dtype=dtype)


def state_of(module):
    state = {name: x.numpy().copy() for name, x in full_parameters(module)}
    buffers = {name: x.float().numpy().copy() for name, x in module.named_buffers()}
    return state | {f"buffer {name}": x for name, x in buffers.items()}


def policy_both_ways(rank, source):
    mesh = make_mesh(2, "cpu")
    sliced = sharded_policy(source, sharding(mesh), CPU, chunk=64, attention="auto")
    if sliced is None:
        return None
    whole = load_policy(source, torch.float32)
    parts = list(sliced.parameters())
    assert all(isinstance(x, DTensor) for x in parts), "an optimizer would take whole parameters for its own"
    shard_size = sum(x.to_local().numel() for x in parts)
    with torch.no_grad():
        said = sliced(*rows(), temperature=1.0).numpy()
    return {
        "sliced": state_of(sliced.model),
        "whole": state_of(whole),
        "said": said,
        "share": shard_size / sum(x.numel() for x in whole.parameters()),
        "attention": (sliced.model.config._attn_implementation, whole.config._attn_implementation),
        "config": (sliced.model.config.to_dict(), whole.config.to_dict()),
        "generation": (sliced.model.generation_config.to_dict(), whole.generation_config.to_dict()),
        "hooks": [len(model.base_model._forward_pre_hooks) for model in (sliced.model, whole)],
        "head hooks": [len(m.get_output_embeddings()._forward_hooks) for m in (sliced.model, whole)],
    }


def assert_same(found):
    assert found["sliced"].keys() == found["whole"].keys()
    for name, x in found["whole"].items():
        assert (found["sliced"][name] == x).all(), name
    for pair in ("attention", "config", "generation"):
        sliced, whole = found[pair]
        assert sliced == whole
    assert found["hooks"][0] == found["hooks"][1] and found["head hooks"][0] == found["head hooks"][1]
    assert 0.3 < found["share"] < 0.7


@pytest.mark.parametrize("model", ["policy", "tied"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_policy_is_the_same_bit_for_bit(tiny_models, tmp_path, run_ranks, model, stored):
    source = tmp_path / model
    AutoModelForCausalLM.from_pretrained(tiny_models._asdict()[model], dtype=stored).save_pretrained(source)
    found = run_ranks(policy_both_ways, str(source))
    for one in found:
        assert_same(one)
    with torch.no_grad():
        expected = Policy(load_policy(source, torch.float32))(*rows(), temperature=1.0)
    torch.testing.assert_close(torch.from_numpy(found[0]["said"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_and_ties_of_other_families_come_back(tmp_path, run_ranks, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPE | HEADS | FAMILIES[family]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for found in run_ranks(policy_both_ways, str(tmp_path)):
        assert found is not None
        assert_same(found)


def test_names_that_transformers_would_change_are_left_to_it(tiny_models, tmp_path, run_ranks):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    renamed = {name.replace("model.", "", 1): x for name, x in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    assert run_ranks(policy_both_ways, str(tmp_path / "old")) == [None] * 2
    reward = run_ranks(policy_both_ways, str(tiny_models.reward))
    assert reward == [None] * 2  # whose head makes it no policy: load_policy says so


@pytest.mark.parametrize("kind", ["trunk", "head", "summed trunk", "summed head", "policy"])
def test_a_critic_is_the_same_bit_for_bit(tiny_models, tmp_path, run_ranks, kind):
    source, keep = str(tiny_models.reward), kind.endswith("head")
    if kind.startswith("summed"):
        summed = untrained_reward_model(tiny_models.policy, head="running_sum")
        nn.init.normal_(summed.token_score.weight)
        summed.save_pretrained(tmp_path / "summed")
        source = str(tmp_path / "summed")
    units = {"keep_head": True, "mean": 0.3, "scale": 1.5} if keep else {}
    if kind == "policy":
        source = str(tiny_models.tied)
        whole = critic_from_policy(source, torch.float32)
    else:
        whole = critic_from_reward_model(
            source, torch.float32, **({"keep_head": False, "mean": 0.0, "scale": 1.0} | units)
        )
    expected, values = state_of(whole), whole(*rows()[:2]).detach()

    def on_a_rank(rank):
        options = {"of_policy": kind == "policy", "attention": "auto"} | units
        critic = sharded_critic(source, sharding(make_mesh(2, "cpu")), CPU, **options)
        assert all(isinstance(x, DTensor) for x in critic.parameters())
        with torch.no_grad():
            said = critic(*rows()[:2]).numpy()
        return state_of(critic), said, len(critic.trunk._forward_pre_hooks)

    for state, said, hooks in run_ranks(on_a_rank):
        assert state.keys() == expected.keys()
        for name, x in expected.items():
            assert (state[name] == x).all(), name
        torch.testing.assert_close(torch.from_numpy(said), values, rtol=0, atol=1e-6)
        assert hooks == 1


def test_what_is_refused_whole_is_refused_in_slices(tiny_models, tmp_path, run_ranks):
    two = LlamaForSequenceClassification.from_pretrained(tiny_models.reward, num_labels=2, ignore_mismatched_sizes=True)
    two.save_pretrained(tmp_path / "two")
    capped = tmp_path / "capped"
    shape = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **(SHAPE | HEADS | shape))).save_pretrained(capped)

    def on_a_rank(rank):
        cut = sharding(make_mesh(2, "cpu"))
        said = []
        for load in (
            lambda: sharded_critic(str(tmp_path / "two"), cut, CPU, of_policy=False, attention="auto"),
            lambda: sharded_policy(str(capped), cut, CPU, chunk=64, attention="auto"),
        ):
            try:
                load()
            except ModelError as error:
                said.append(str(error))
        return said

    for labels, logits in run_ranks(on_a_rank):
        assert "has one label, this has 2" in labels
        assert "caps or scales its logits" in logits


def test_replicas_of_shards_give_the_gradients_of_one_rank(tiny_models, run_ranks):
    def gradients(rank, world, replicas):
        mesh = make_mesh(world, "cpu", replicas)
        policy = sharded_policy(str(tiny_models.tied), sharding(mesh), CPU, chunk=64, attention="auto")
        mine = [torch.cat([x, x[:1]])[rank::world] for x in rows()]
        policy(*mine, temperature=1.0).sum().backward()
        share = sum(p.to_local().numel() for p in policy.parameters()) / sum(p.numel() for p in policy.parameters())
        whole = {name: p.grad.full_tensor().numpy() for name, p in policy.named_parameters()}
        return whole, grad_norm(policy), share

    ranks = run_ranks(lambda rank: gradients(rank, 4, 2), world=4)
    flat = run_ranks(lambda rank: gradients(rank, 4, 1), world=4)
    for whole, norm, share in ranks:
        assert 0.3 < share < 0.7
        assert norm == pytest.approx(flat[0][1], rel=1e-5)
        for name, x in flat[0][0].items():
            torch.testing.assert_close(torch.from_numpy(whole[name]), torch.from_numpy(x), rtol=0, atol=1e-4)


def test_a_generation_config_travels(tiny_models, tmp_path, run_ranks):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    for found in run_ranks(policy_both_ways, str(tmp_path)):
        assert found["generation"][0]["eos_token_id"] == [2, 7]
        assert_same(found)
