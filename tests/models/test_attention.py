"""Which attention a model runs with, and that leaving the padding mask out changes no value."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models import attention as attending
from r3hf_ray.models.attention import hidden_states
from r3hf_ray.models.load import load_policy, load_reward_model, untrained_reward_model
from r3hf_ray.models.logprobs import token_logprobs
from r3hf_ray.models.values import critic_from_policy

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
}
LENGTHS = torch.tensor([[33], [20], [7], [12]])
MASK = torch.arange(33) < LENGTHS
RESPONSE = MASK & (torch.arange(33) >= 3)
IDS = torch.randint(3, 97, (4, 33), generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, 0)


def made(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPE | HEADS | FAMILIES.get(family, {}) | settings))
    return AutoModelForCausalLM.from_config(config).eval()


def masks_seen(model: PreTrainedModel) -> list[Any]:
    """Whether the trunk is given a mask, of each forward to come."""
    seen: list[Any] = []
    trunk = model.base_model
    plain = trunk.forward

    def spied(*given: Any, **named: Any) -> Any:
        seen.append(named.get("attention_mask") is not None)
        return plain(*given, **named)

    trunk.forward = spied
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_changes_without_a_padding_mask(family: str) -> None:
    model, other = made(family), made(family)
    attending.settle(model, family, "auto")
    seen = masks_seen(model)
    answers = [token_logprobs(one, IDS, MASK, RESPONSE, temperature=1.0) for one in (model, other)]
    assert seen == [False]
    assert torch.equal(*answers)
    for answer in answers:
        answer.sum().backward()
    gradients = [dict(one.named_parameters()) for one in (model, other)]
    for name, p in gradients[0].items():
        expected = gradients[1][name].grad
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-12, msg=name)


def test_policy_critic_reward_model_and_base_model_are_run_without_it(tiny_models: Any) -> None:
    critic = critic_from_policy(tiny_models.policy, torch.float32)
    models = [
        load_policy(tiny_models.policy, torch.float32),
        load_reward_model(tiny_models.reward, torch.bfloat16),
        untrained_reward_model(tiny_models.policy, head="last_token"),
        untrained_reward_model(tiny_models.policy, head="running_sum"),
        critic.trunk,
    ]
    for model in models:
        seen = masks_seen(model)
        hidden_states(model, IDS % 40, MASK)
        assert seen == [False]


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    ],
)
def test_a_model_with_a_window_keeps_its_mask(family: str, window: dict[str, Any]) -> None:
    model = made(family, **window)
    attending.settle(model, family, "auto")
    seen = masks_seen(model)
    hidden_states(model, IDS, MASK)
    assert seen == [True]


def test_a_model_whose_states_depend_on_the_mask_keeps_it() -> None:
    """An encoder looks ahead; this Llama counts the tokens of its row."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    encoder = BertForSequenceClassification(BertConfig(**shape, num_attention_heads=4)).eval()

    class Counting(LlamaForCausalLM):
        pass

    counting = Counting(LlamaConfig(**shape, num_attention_heads=4)).eval()
    plain = counting.model.forward

    def counted(*given: Any, **named: Any) -> Any:
        output = plain(*given, **named)
        if named["attention_mask"] is not None:
            output.last_hidden_state = output.last_hidden_state + named["attention_mask"].sum(1)[:, None, None]
        return output

    counting.model.forward = counted
    for model in (encoder, counting):
        before = hidden_states(model, IDS, MASK) if model is counting else None
        assert attending._needs_mask(model)
        attending.settle(model, "it", "auto")
        if before is not None:
            assert torch.equal(hidden_states(model, IDS, MASK), before)


def test_prompts_padded_on_the_left_are_still_generated_from_as_they_are(tiny_models: Any) -> None:
    model = load_policy(tiny_models.policy, torch.float32)
    alone = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 0, 5, 6, 7], [4, 9, 8, 5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, 3:]
    got = model.generate(padded, attention_mask=(padded > 0).long(), **options)[0, 6:]
    assert torch.equal(got, wanted)


def test_dropping_the_mask_leaves_the_model_in_its_mode(tiny_models: Any) -> None:
    for trains in (True, False):
        model = untrained_reward_model(tiny_models.policy, head="last_token")
        model.base_model.train(trains)
        attending.settle(model, "it", "auto")
        assert model.base_model.training == trains


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_an_attention_that_is_asked_for_is_taken(tiny_models: Any, asked: Any) -> None:
    assert load_policy(tiny_models.policy, torch.float32, attention=asked).config._attn_implementation == asked
    model = load_reward_model(tiny_models.reward, torch.float32, attention=asked)
    assert model.config._attn_implementation == asked


def test_sdpa_is_refused_where_the_model_is_soft_capped(cases: Path) -> None:
    with pytest.raises(ModelError, match=r"soft-capped, which sdpa leaves out; set model\.attention = auto"):
        load_reward_model(cases / "rm_gemma2_softcap", torch.float32, attention="sdpa")


def test_sdpa_is_refused_where_it_gives_other_scores(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def sunk(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return plain(module, query * 0.5, *rest, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sunk)
    with pytest.raises(ModelError, match="sdpa does not give the scores of its plain attention"):
        load_policy(tiny_models.policy, torch.float32, attention="sdpa")


def test_flash_attention_that_is_not_there_is_one_sentence(tiny_models: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.attention = flash_attention_2: .+"):
        load_policy(tiny_models.policy, torch.float32, attention="flash_attention_2")
