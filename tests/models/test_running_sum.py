"""Running-sum reward models: what their score is, and that nothing can take them for usual ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.load import (
    load_reward_model,
    require_causal,
    require_score_head,
    score_head,
    untrained_reward_model,
)
from r3hf_ray.models.running_sum import RunningSumConfig, RunningSumForSequenceClassification, running_sum

ROWS = [[1, 5, 9, 30, 17, 2], [1, 7, 7], [1, 33, 12, 8, 25, 11, 39, 4, 2]]
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])


def padded(rows: list[list[int]], *, width: int, pad: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask."""
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    position, lengths = torch.arange(width), torch.tensor([[len(row)] for row in rows])
    return torch.tensor(ids), (position >= width - lengths if left else position < lengths).long()


@FAMILIES
@torch.no_grad()
def test_the_score_is_the_sum_of_the_head_over_the_tokens(sum_models, family):
    model = load_reward_model(sum_models(family), torch.float32)
    for row in ROWS:
        ids = torch.tensor([row])
        said = model.token_score(model.model(input_ids=ids).last_hidden_state)[0, :, 0]
        assert said.abs().min() > 0
        assert model(input_ids=ids).logits.item() == pytest.approx(said.double().sum().item(), rel=1e-6)
        so_far = running_sum(said[None], torch.ones_like(ids))[0]
        torch.testing.assert_close(so_far.diff(), said[1:], rtol=0, atol=1e-6)
        prefixes = [model(input_ids=ids[:, : t + 1]).logits.item() for t in range(len(row))]
        torch.testing.assert_close(so_far, torch.tensor(prefixes), rtol=0, atol=5e-6)


@FAMILIES
@torch.no_grad()
def test_padding_and_the_rows_beside_change_nothing(sum_models, family):
    model = load_reward_model(sum_models(family), torch.float32)
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])
    for width, pad, left in ((9, 0, False), (14, 30, False), (12, 0, True)):
        ids, mask = padded(ROWS, width=width, pad=pad, left=left)
        assert mask.sum(1).tolist() == [6, 3, 9]
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, alone, rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match="needs attention_mask"):
        model(input_ids=ids)


def test_a_long_row_keeps_its_digits_and_its_gradient():
    """A prompt that adds up to 1e5 leaves the small steps behind it to within one rounding of the sum."""
    scores = torch.cat([torch.full((1, 1000), 100.0), torch.full((1, 50), 0.125)], dim=1).requires_grad_()
    mask = torch.ones_like(scores)
    mask[:, -5:] = 0
    sums = running_sum(scores, mask)
    assert sums.dtype == torch.float32
    assert sums[0, 1044].item() == 1e5 + 45 * 0.125 == sums[0, -1].item()
    sums[0, -1].backward()
    assert scores.grad.tolist() == mask.tolist()


STRANGER = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

rows, scores, refused = json.loads(sys.argv[1]), [], []
for folder in sys.argv[2:]:
    for auto in (AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM):
        for options in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **options)
            except ValueError as error:
                refused.append(str(error))
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        scores.append([model(input_ids=torch.tensor([row])).logits.item() for row in rows])
    model.save_pretrained(folder + "_again")
ours = [name for name in sys.modules if name.split(".")[0] == "r3hf_ray"]
sys.stdout.write("ANSWER" + json.dumps({"refused": refused, "scores": scores, "ours": ours}))
"""


@torch.no_grad()
def test_a_stranger_gets_the_same_scores_or_a_refusal(sum_models, tmp_path):
    """A process that never heard of us: the folder's own code, or nothing; what it saves is a whole folder again."""
    folders = [str(shutil.copytree(sum_models(family), tmp_path / family)) for family in ("llama", "qwen2")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, json.dumps(ROWS), *folders]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.rsplit("ANSWER", 1)[1])
    assert answer["ours"] == []
    assert len(answer["refused"]) == 2 * 6 and all("trust_remote_code=True" in text for text in answer["refused"])
    for folder, scores in zip(folders, answer["scores"], strict=True):
        for source in (folder, folder + "_again"):
            model = load_reward_model(source, torch.float32)
            assert [model(input_ids=torch.tensor([row])).logits.item() for row in ROWS] == scores


def test_a_usual_class_that_is_forced_on_the_folder_finds_no_head(sum_models):
    _, report = LlamaForSequenceClassification.from_pretrained(
        sum_models("llama"), num_labels=1, output_loading_info=True
    )
    assert report["missing_keys"] == {"score.weight"} and report["unexpected_keys"] == {"token_score.weight"}


def test_the_folder_names_its_code_and_no_usual_class(sum_models):
    folder, module = sum_models("llama"), sys.modules[RunningSumConfig.__module__]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("r3hf_running_sum", "llama")
    assert config["architectures"] == ["RunningSumForSequenceClassification"]
    assert config["auto_map"] == {
        "AutoConfig": "running_sum.RunningSumConfig",
        "AutoModelForSequenceClassification": "running_sum.RunningSumForSequenceClassification",
    }
    source = (folder / "running_sum.py").read_text()
    assert source == Path(module.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"typing", "torch", "transformers"}, "a stranger has no other package"


@FAMILIES
def test_it_passes_the_checks_of_any_reward_model(sum_models, family):
    folder = sum_models(family)
    require_score_head(folder)
    model = load_reward_model(folder, torch.float32)
    assert type(model) is type(AutoModelForSequenceClassification.from_pretrained(folder))
    assert score_head(model) is model.token_score
    require_causal(model, 40)
    assert model.config.num_labels == AutoConfig.from_pretrained(folder).num_labels == 1
    assert not any(part.training for part in model.modules())
    assert model.model.config is model.config.text_config
    assert model.model.config._attn_implementation == "sdpa"
    assert load_reward_model(folder, torch.float32, attention="eager").model.config._attn_implementation == "eager"


@torch.no_grad()
def test_its_head_stays_float32_above_a_bfloat16_trunk(sum_models):
    exact = load_reward_model(sum_models("llama"), torch.float32)
    model = load_reward_model(sum_models("llama"), torch.bfloat16)
    assert next(model.model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.token_score.weight, exact.token_score.weight), "the head is not rounded on the way"
    ids = torch.tensor([ROWS[0]])
    assert model(input_ids=ids).logits.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = model(input_ids=ids).logits
    torch.testing.assert_close(said, exact(input_ids=ids).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_pad_token_that_grows_the_embedding_is_saved_with_it(tiny_models, tmp_path):
    folder = ModelFolder(tiny_models.policy, "base model")
    tokenizer = folder.tokenizer
    tokenizer.pad_token, tokenizer.chat_template = (
        "<eos>",
        "<pad>{% for m in messages %} {{ m['content'] }}{% endfor %}",
    )
    model = untrained_reward_model(tiny_models.policy, head="running_sum")
    folder.settle_tokens(model)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 41
    assert tokenizer.pad_token_id == model.config.text_config.pad_token_id == 40
    torch.nn.init.normal_(model.token_score.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path).pad({"input_ids": ROWS}, padding_side="right", return_tensors="pt")
    assert batch["input_ids"].max() == 40
    assert torch.equal(load_reward_model(tmp_path, torch.float32)(**batch).logits, model.eval()(**batch).logits)


@torch.no_grad()
def test_a_fresh_head_says_nothing_and_the_trunk_is_the_base(tiny_models):
    """Over a policy, and over a usual reward model, whose own head is of the other kind."""
    plain = LlamaForCausalLM.from_pretrained(tiny_models.policy)
    model = untrained_reward_model(tiny_models.policy, head="running_sum")
    assert isinstance(model, RunningSumForSequenceClassification)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(dict(model.model.named_parameters())[name], parameter)
    assert not model(input_ids=torch.tensor([ROWS[0]])).logits.any()
    assert not untrained_reward_model(tiny_models.reward, head="running_sum").token_score.weight.any()


def test_a_running_sum_goes_on_as_one_and_as_nothing_else(sum_models):
    model = untrained_reward_model(sum_models("llama"), head="running_sum")
    assert model.token_score.weight.all()
    with pytest.raises(ModelError, match=r'reward_training\.head = "running_sum"'):
        untrained_reward_model(sum_models("llama"), head="last_token")
    with pytest.raises(ModelError, match="no such folder for the base model"):
        untrained_reward_model("/absent/base", head="last_token")


def test_gradient_checkpointing_gives_the_same_gradient(sum_models):
    gradients = []
    for checkpointing in (False, True):
        model = untrained_reward_model(sum_models("llama"), head="running_sum")
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.config.text_config.attention_dropout = 0.0
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        model(input_ids=torch.tensor([ROWS[0]])).logits.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1])
