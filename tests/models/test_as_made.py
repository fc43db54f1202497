"""A model is run as it was made: its attention, its head, its widths; what is run otherwise is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomForSequenceClassification,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.instruments.scored_answers import Answer, load_judge, score_answers, untrained
from r3hf_ray.models.attention import hidden_states
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.load import load_policy, load_reward_model, score_head, untrained_reward_model
from r3hf_ray.models.logprobs import token_logprobs, token_logprobs_and_entropy
from r3hf_ray.models.values import critic_from_policy, critic_from_reward_model
from r3hf_ray.scoring.prefix_scores import prefix_scores

IDS = torch.tensor([[5, 9, 30, 31, 64, 7, 100, 41]])
MASK = torch.ones_like(IDS, dtype=torch.bool)
RESPONSE = torch.arange(8)[None] >= 3


def pooled(model: Any) -> float:
    scores, _ = prefix_scores(model, IDS, MASK, RESPONSE, suffix_ids=[], finished=torch.tensor([True]))
    return scores.pooled.item()


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """OPT-350m's shape: embeddings of another width than the blocks, projected in and out."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "word_embed_proj_dim": 20, "ffn_dim": 48, "num_hidden_layers": 2}
    config = {**shape, "num_attention_heads": 2, "max_position_embeddings": 64, "do_layer_norm_before": False}
    folder = tmp_path_factory.mktemp("opt")
    OPTForCausalLM(OPTConfig(**config, init_std=0.2)).save_pretrained(folder / "policy")
    OPTForSequenceClassification(OPTConfig(**config, num_labels=1, init_std=0.2)).save_pretrained(folder / "reward")
    return {name: folder / name for name in ("policy", "reward")}


# ------------------------------------------------------------------------------------------------------ attention


def test_soft_capped_attention_is_kept_wherever_a_score_is_read(cases: Path) -> None:
    source = cases / "rm_gemma2_softcap"
    made, fast = (
        AutoModelForSequenceClassification.from_pretrained(source, attn_implementation=kind).eval()
        for kind in ("eager", "sdpa")
    )
    with torch.no_grad():
        expected, dropped = made(IDS).logits.item(), fast(IDS).logits.item()
    assert abs(expected - dropped) > 0.01, "or this test shows nothing"
    assert pooled(load_reward_model(source, torch.float32)) == pytest.approx(expected, abs=1e-5)
    for attention in (False, True):  # audit and credit, without and with attention maps
        judge = load_judge(str(source), attention=attention)
        (scored,) = score_answers(judge, [Answer(IDS[0, :3].tolist(), IDS[0, 3:].tolist())])
        assert scored.score == pytest.approx(expected, abs=1e-5)
    assert untrained(judge, seed=1).reader.model.config._attn_implementation == "eager"
    assert load_reward_model(source, torch.bfloat16).config._attn_implementation == "eager"
    for head in ("last_token", "running_sum"):
        assert untrained_reward_model(source, head=head).config._attn_implementation == "eager"
    critic = critic_from_reward_model(source, torch.float32, keep_head=True, mean=0.0, scale=1.0)
    assert critic(IDS, MASK)[0, -1].item() == pytest.approx(expected, abs=1e-5)


def test_attention_is_chosen_by_what_it_gives_not_by_its_name(
    tiny_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_reward_model(tiny_models.reward, torch.float32).config._attn_implementation == "sdpa"
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def sunk(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return plain(module, query * 0.5, *rest, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sunk)  # what SDPA knows nothing of
    assert load_reward_model(tiny_models.reward, torch.float32).config._attn_implementation == "eager"
    assert load_policy(tiny_models.policy, torch.float32).config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_without_sdpa_or_window_are_run_as_they_are(cases: Path, dtype: torch.dtype) -> None:
    assert load_policy(cases / "policy_no_window", dtype).config._attn_implementation == "eager"
    model = load_reward_model(cases / "rm_no_window", dtype)
    own = BloomForSequenceClassification.from_pretrained(cases / "rm_no_window", dtype=dtype).eval()
    with torch.no_grad():
        assert pooled(model) == pytest.approx(own(IDS).logits.item(), abs=1e-5 if dtype == torch.float32 else 1e-2)


# ----------------------------------------------------------------------------------------------------------- head


def test_a_model_that_scores_in_another_way_is_refused(tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForSequenceClassification.forward

    def shifted(self: Any, **inputs: Any) -> Any:
        output = plain(self, **inputs)
        output.logits = torch.tanh(output.logits) + 1.0
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", shifted)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=r"its own score of a probe is [-\d.e]+, and its head says [-\d.e]+ at"):
            load_reward_model(tiny_models.reward, dtype)


def test_a_float32_head_is_read_in_its_own_precision(tiny_models: Any, tmp_path: Path) -> None:
    """Trunk in bfloat16, head in float32: as `r3hf reward` and many others save them."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_models.reward)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: x if name == "score.weight" else x.bfloat16() for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    head = tensors["score.weight"]
    assert not torch.equal(head, head.bfloat16().float()), "or this test shows nothing"
    loaded = load_reward_model(tmp_path, torch.bfloat16)
    assert torch.equal(score_head(loaded).weight, head)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    critic = critic_from_reward_model(tmp_path, torch.bfloat16, keep_head=True, mean=0.0, scale=1.0)
    assert torch.equal(critic.head.weight, head)


def test_a_reward_model_with_tied_embeddings_is_no_policy(cases: Path, tmp_path: Path) -> None:
    """Its lm_head is not missing, since it is the embedding: only its score gives it away."""
    tied = AutoModelForSequenceClassification.from_pretrained(cases / "rm_gemma2_softcap")
    assert tied.config.tie_word_embeddings
    tied.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma2ForCausalLM"]}))
    with pytest.raises(ModelError, match=r"holds score\.weight, so it is a reward model and no policy"):
        load_policy(tmp_path, torch.float32)


def test_a_quantised_folder_is_one_sentence(tiny_models: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="cannot be loaded as policy: ") as error:
        load_policy(tmp_path, torch.float32)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- widths


@torch.no_grad()
def test_projected_embeddings_fit_every_head(opt: dict[str, Path], tmp_path: Path) -> None:
    policy, reward = load_policy(opt["policy"], torch.float32), load_reward_model(opt["reward"], torch.float32)
    assert hidden_states(policy, IDS, MASK).shape[-1] == 20
    expected = policy(input_ids=IDS).logits.log_softmax(-1)[0, :-1].gather(1, IDS[0, 1:, None])[2:, 0]
    torch.testing.assert_close(token_logprobs(policy, IDS, MASK, RESPONSE, temperature=1.0)[RESPONSE], expected)
    assert pooled(reward) == pytest.approx(reward(input_ids=IDS, attention_mask=MASK).logits.item(), abs=1e-5)
    assert critic_from_policy(opt["policy"], torch.float32)(IDS, MASK).shape == IDS.shape
    critic = critic_from_reward_model(opt["reward"], torch.float32, keep_head=True, mean=0.0, scale=1.0)
    assert critic(IDS, MASK)[0, -1].item() == pytest.approx(pooled(reward), abs=1e-5)
    summed = untrained_reward_model(opt["policy"], head="running_sum")
    torch.nn.init.normal_(summed.token_score.weight)
    summed.save_pretrained(tmp_path)
    assert pooled(load_reward_model(tmp_path, torch.float32)) == pytest.approx(summed(IDS).logits.item(), abs=1e-4)


# ----------------------------------------------------------------------------------------------- padded vocabulary


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_without_a_token_have_no_probability(padded_policy: Path, dtype: torch.dtype, temperature: float) -> None:
    plain = AutoModelForCausalLM.from_pretrained(padded_policy, dtype=dtype).eval()
    unknown = ModelFolder(padded_policy, "policy").unknown_ids
    logits = plain(input_ids=IDS).logits.float()[0, 2:-1] / temperature
    assert logits.softmax(-1)[:, unknown].sum(-1).mean() > 0.3, "or this test shows nothing"
    logits[:, unknown] = float("-inf")
    distribution = torch.distributions.Categorical(logits=logits[:, : unknown[0]])
    model = load_policy(padded_policy, dtype)
    arguments = (IDS, MASK, RESPONSE)
    alone = token_logprobs(model, *arguments, temperature=temperature)[RESPONSE]
    logprobs, entropy = token_logprobs_and_entropy(model, *arguments, temperature=temperature)
    torch.testing.assert_close(alone, distribution.log_prob(IDS[0, 3:]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logprobs[RESPONSE], alone)
    torch.testing.assert_close(entropy[RESPONSE], distribution.entropy(), atol=1e-3, rtol=1e-3)


def test_masked_rows_get_no_gradient_and_are_saved_as_they_are(padded_policy: Path, tmp_path: Path) -> None:
    model = load_policy(padded_policy, torch.float32)
    first = ModelFolder(padded_policy, "policy").unknown_ids[0]
    token_logprobs(model, IDS, MASK, RESPONSE, temperature=0.7).sum().backward()
    assert model.lm_head.weight.grad[:first].abs().sum() > 0
    assert not model.lm_head.weight.grad[first:].any()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    saved, given = load_file(tmp_path / "model.safetensors"), load_file(padded_policy / "model.safetensors")
    assert all(torch.equal(saved[name], given[name]) for name in given)


def test_generation_through_transformers_samples_known_ids_only(padded_policy: Path) -> None:
    model = load_policy(padded_policy, torch.float32)
    torch.manual_seed(0)
    sampled = model.generate(IDS, do_sample=True, max_new_tokens=20, eos_token_id=-1)
    assert sampled.max() < ModelFolder(padded_policy, "policy").unknown_ids[0]
