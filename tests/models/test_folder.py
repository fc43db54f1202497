"""One reading of a model folder: where an answer ends, how long a sequence may be, which ids mean nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made.byte_tokenizer import CHATML, byte_tokenizer
from transformers import (
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import NO_LIMIT, ModelFolder, unknown_ids, window
from r3hf_ray.models.load import load_policy, untrained_reward_model


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("ok_policy", ["<|im_end|>"]),
        ("policy_eos_is_not_template_end", ["<|endoftext|>", "<|im_end|>"]),
        ("rm_eos_is_not_template_end", ["<|endoftext|>", "<|im_end|>"]),
        ("policy_end_not_named_special", ["<|endoftext|>", "<|end|>"]),
        ("policy_metaspace", ["</s>"]),
    ],
)
def test_what_the_template_closes_a_turn_with_is_an_end(cases: Path, name: str, ends: list[str]) -> None:
    folder = ModelFolder(cases / name, "policy")
    assert folder.tokenizer.convert_ids_to_tokens(folder.end_ids) == ends
    assert folder.chat.form.end == ends[-1]
    prompt = folder.chat.prompt([{"role": "user", "content": "Hi"}])
    assert folder.chat.answer(prompt, "Yes")[-1] == folder.end_ids[-1]


def test_every_stated_end_counts_once(cases: Path, tmp_path: Path) -> None:
    folder = copied(cases / "policy_eos_is_not_template_end", tmp_path)
    GenerationConfig(eos_token_id=[257, 258]).save_pretrained(folder)
    change(folder / "config.json", eos_token_id=[256, 259])
    assert ModelFolder(folder, "policy").end_ids == [256, 259, 257, 258]


def test_a_template_alone_may_name_the_end(cases: Path, tmp_path: Path) -> None:
    folder = copied(cases / "ok_policy", tmp_path)
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token=None)
    assert ModelFolder(folder, "policy").end_ids == [258]
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with pytest.raises(ModelError, match="no end-of-sequence"):
        _ = ModelFolder(folder, "policy").end_ids


@pytest.mark.parametrize("name", ["policy_eos_is_not_template_end", "ok_policy"])
def test_every_end_is_named_in_what_is_saved(cases: Path, tmp_path: Path, name: str) -> None:
    folder, model = ModelFolder(cases / name, "base model"), load_policy(cases / name, torch.float32)
    folder.settle_tokens(model)
    model.save_pretrained(tmp_path)
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert ends == (folder.end_ids if len(folder.end_ids) > 1 else folder.end_ids[0])


def test_padding_is_no_end_of_the_template(cases: Path, tmp_path: Path) -> None:
    source = copied(cases / "policy_eos_is_not_template_end", tmp_path)
    change(source / "tokenizer_config.json", pad_token="<|im_end|>")
    for load in (lambda: load_policy(source, torch.float32), lambda: untrained_reward_model(source, head="last_token")):
        folder, model = ModelFolder(source, "base model"), load()
        folder.settle_tokens(model)
        assert folder.tokenizer.pad_token == "<|pad|>"
        assert folder.tokenizer.pad_token_id == model.config.pad_token_id == 259


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=48), 48),
        (MptConfig(max_seq_len=40), 40),
        (BloomConfig(), NO_LIMIT),
        (BloomConfig(seq_length=2048), 2048),
        (CohereConfig(max_position_embeddings=8192, model_max_length=131072), 131072),
    ],
)
def test_a_window_has_many_names_or_none(config: PreTrainedConfig, expected: int) -> None:
    assert window(config) == expected


def test_a_folder_without_a_window_has_no_limit(cases: Path) -> None:
    for name in ("policy_no_window", "rm_no_window"):
        assert ModelFolder(cases / name, "policy").window == NO_LIMIT


def test_rows_without_a_token_are_known(padded_policy: Path, cases: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(padded_policy)
    assert ModelFolder(padded_policy, "policy").unknown_ids == list(range(len(tokenizer), len(tokenizer) + 7))
    assert ModelFolder(cases / "ok_policy", "policy").unknown_ids == []
    holes = byte_tokenizer(CHATML)
    vocabulary = {word: i for word, i in holes.get_vocab().items() if i != 5}
    holes.get_vocab = lambda: vocabulary
    assert unknown_ids(holes, len(vocabulary) + 2) == [5, len(vocabulary) + 1]


def test_a_pad_token_without_a_row_is_not_used(cases: Path, tmp_path: Path) -> None:
    folder = copied(cases / "ok_policy", tmp_path)
    assert ModelFolder(folder, "policy").pad_id == 259
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    tokenizer.save_pretrained(folder)
    assert ModelFolder(folder, "policy").pad_id == 258


def test_a_classifier_is_no_policy_whatever_its_weights_are_tied_to(cases: Path) -> None:
    for name in ("rm_gemma2_softcap", "ok_rm", "rm_no_window"):
        with pytest.raises(ModelError, match=r"is a \w+ForSequenceClassification, .* and no policy"):
            ModelFolder(cases / name, "policy").require_language_model()
    ModelFolder(cases / "ok_policy", "policy").require_language_model()


NULL = {"model_type": "llama", "max_position_embeddings": None}


@pytest.mark.parametrize("config", [{"model_type": "nonesuch"}, {"hidden_size": 4}, {}, NULL])
def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded as policy: ") as error:
        ModelFolder(tmp_path, "policy")
    assert "\n" not in str(error.value)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
