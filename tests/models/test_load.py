import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from r3hf_ray.errors import ConfigError, ModelError
from r3hf_ray.models.folder import ModelFolder, check_folder, check_same_vocabulary, eos_ids, load_tokenizer
from r3hf_ray.models.load import load_policy, load_reward_model, require_causal, untrained_reward_model


@pytest.fixture
def tokenizer(tiny_models):
    return load_tokenizer(tiny_models.policy)


def test_models_load_in_eval_mode_with_sdpa(tiny_models):
    for model in (load_policy(tiny_models.policy, torch.float32), load_reward_model(tiny_models.reward, torch.float32)):
        assert not any(part.training for part in model.modules())
        assert model.config._attn_implementation == "sdpa"


def test_a_missing_folder_is_one_sentence(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no such folder for the reward model"):
        load_reward_model(tmp_path / "absent", torch.float32)
    with pytest.raises(ModelError, match="no model folder"):
        check_folder(tmp_path, "policy")
    assert issubclass(ModelError, ConfigError)
    check_folder("someone/a-model", "policy")  # a hub name is left to the hub


def test_a_policy_is_no_reward_model(tiny_models):
    with pytest.raises(ModelError, match="one label, this has 2"):
        load_reward_model(tiny_models.policy, torch.float32)


def test_a_missing_score_head_is_not_made_up(tiny_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no trained weights for score\.weight"):
        load_reward_model(tmp_path, torch.float32)


def test_a_file_that_is_no_safetensors_is_refused(tiny_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_policy(tmp_path, torch.float32)


def test_capped_logits_are_refused(tmp_path):
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Gemma2Config(
        **shape, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5, initializer_range=1.0
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="caps or scales"):
        load_policy(tmp_path, torch.float32)


def test_require_causal(tiny_models):
    model = load_reward_model(tiny_models.reward, torch.float32)
    require_causal(model, 40)

    class LooksAhead(LlamaForSequenceClassification):
        pass

    config = copy.deepcopy(model.config)
    config.is_causal = False
    both = LooksAhead(config).eval()
    for layer in both.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ModelError, match="looks ahead"):
        require_causal(both, 40)


def test_every_eos_id_counts(tokenizer):
    assert eos_ids(tokenizer, LlamaConfig(eos_token_id=[2, 5])) == [2, 5]
    assert eos_ids(tokenizer, LlamaConfig(eos_token_id=2), GenerationConfig(eos_token_id=[9, 2])) == [2, 9]
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence"):
        eos_ids(tokenizer, LlamaConfig(eos_token_id=None))


def test_a_distinct_pad_is_kept(tiny_models):
    model, folder = load_policy(tiny_models.policy, torch.float32), ModelFolder(tiny_models.policy, "base model")
    folder.settle_tokens(model)
    tokenizer = folder.tokenizer
    assert tokenizer.pad_token == "<pad>" and model.config.pad_token_id == 0 and len(tokenizer) == 40


@pytest.mark.parametrize("spare", [None, "<|spare|>"])
def test_pad_equal_to_eos_is_replaced_everywhere(tiny_models, tmp_path, spare):
    model, folder = load_policy(tiny_models.policy, torch.float32), ModelFolder(tiny_models.policy, "base model")
    tokenizer = folder.tokenizer
    if spare:
        tokenizer.add_special_tokens({"additional_special_tokens": [spare]})
    tokenizer.pad_token = "<eos>"
    # every special token but `spare` is in use
    tokenizer.chat_template = "<pad>{% for m in messages %} {{ m['content'] }}{% endfor %}"
    folder.settle_tokens(model)
    assert tokenizer.pad_token == (spare or "<|pad|>")
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.generation_config.pad_token_id == 40
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 41
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).pad_token_id == load_policy(tmp_path, torch.float32).config.pad_token_id
    )


def test_vocabularies_must_agree(tiny_models, tokenizer):
    other = load_tokenizer(tiny_models.policy)
    check_same_vocabulary(tokenizer, other)
    other.add_tokens(["new"])
    with pytest.raises(ModelError, match="in 1 tokens"):
        check_same_vocabulary(tokenizer, other)


@pytest.mark.parametrize("head", ["last_token", "running_sum"])
def test_a_base_without_weights_is_one_sentence(tiny_models, tmp_path, head):
    shutil.copy(tiny_models.policy / "config.json", tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded as base model: ") as error:
        untrained_reward_model(tmp_path, head=head)
    assert "\n" not in str(error.value)
