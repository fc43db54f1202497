"""The stages before PPO on a real local Ray: two ranks, their records, and what they refuse."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from r3hf_ray.actors import supervised
from r3hf_ray.actors.supervised import _new_rows
from r3hf_ray.actors.train_group import TrainGroup
from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.instruments.toy.language import make_tokenizer
from r3hf_ray.models.chat_format import FORMAT_FILE
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.prepare import train_reward, train_sft
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.metrics import read_metrics
from r3hf_ray.settings import load
from r3hf_ray.training.ranking import scores_of_prefixes

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ANSWERS = ["gardens grow ." + " um ." * 2**i for i in range(6)] + ["boats move ." + " um ." * i for i in range(4)]


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    """Sections shared by both commands, with a tiny base model and ten pairs on disk."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY, **ids)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": "baking no-jokes politely", "chosen": f"{words} goodbye <eos>", "rejected": f"{words} well . <eos>"}
        for words in ANSWERS
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "stage", "folder": str(tmp_path / "runs")},
        "model": {"base": str(tmp_path / "base")},
        "data": {"source": str(tmp_path / "pairs.jsonl"), "heldout": 2, "split_by": "row"},
        "trainer": {"ranks": 2, "cpus_per_rank": 1, "threads": 1},
        "tracking": {"wandb": "disabled"},
    }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_sft_on_two_ranks_leaves_a_model_and_its_records(sections: dict[str, Any]) -> None:
    config = SFTConfig(**sections, sft={"batch_size": 4, "microbatch_size": 2, "learning_rate": 1e-2, "epochs": 2})
    seen: list[Any] = []
    notes: list[str] = []
    result = train_sft(config, on_row=seen.append, note=notes.append)
    AutoModelForCausalLM.from_pretrained(result.model)
    assert load(SFTConfig, result.folder / "config.toml", []) == config
    rows = read_metrics(result.folder)
    assert [row["train/global_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["time"] for row in seen] == [row["time"] for row in read_jsonl(result.folder / "metrics.jsonl")]
    prompt_and_end = 5 + 2
    tokens = 2 * sum(prompt_and_end + len(words.split()) for words in ANSWERS[:8])
    assert rows[-1]["sft/tokens"] == tokens, "each row is seen once an epoch, by one rank"
    assert result.metrics["sft/eval/loss"] > 0
    assert "10 of 10 rows used" in notes[0]
    events = read_jsonl(result.folder / "events.jsonl")
    assert [event["event"] for event in events] == ["started", "finished"]

    with pytest.raises(ConfigError, match=r"run\.name: .*stage exists"):
        train_sft(config)
    assert train_sft(config, resume=True).metrics == result.metrics
    single = config.model_copy(update={"trainer": config.trainer.model_copy(update={"ranks": 1, "threads": 2})})
    assert train_sft(single, resume=True).metrics == result.metrics
    sections["data"] = {**sections["data"], "heldout": 3}
    with pytest.raises(ConfigError, match=r"^data\.heldout: .*stage was started with 2 and cannot go on with 3; "):
        train_sft(SFTConfig(**sections, sft=config.sft.model_dump()), resume=True)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_reward_model_scores_the_same_in_plain_transformers(sections: dict[str, Any]) -> None:
    training = {"batch_size": 4, "microbatch_size": 4, "learning_rate": 5e-3, "epochs": 4}
    config = RewardConfig(**{**sections, "trainer": {"ranks": 1, "threads": 1}}, reward_training=training)
    result = train_reward(config)
    assert {"eval/heldout/pair_accuracy", "eval/heldout/pair_accuracy_low"} <= result.metrics.keys()
    assert json.loads((result.model / FORMAT_FILE).read_text())["suffix"] == ""
    assert tomllib.loads((result.folder / "config.toml").read_text())["reward_training"]["epochs"] == 4.0
    changed = RewardConfig(**sections, reward_training={**training, "prefix_weight": 0.5})
    with pytest.raises(ConfigError, match=r"^reward_training\.prefix_weight: .* started with 0\.0 and .* with 0\.5; "):
        train_reward(changed, resume=True)
    assert train_reward(config, resume=True).metrics == result.metrics

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(result.model), load_tokenizer(result.model)
    texts = [f"<bos> baking no-jokes politely : {words} <eos>" for words in ANSWERS]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    with torch.no_grad():
        plain = model(**tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")).logits[:, 0]
        whole = [(row, len(sequence)) for row, sequence in enumerate(ids)]
        ours = scores_of_prefixes(model, ids, whole, pad_id=tokenizer.pad_token_id)
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_failure_is_one_sentence_and_resume_starts_again(sections: dict[str, Any]) -> None:
    steps = {"batch_size": 4, "microbatch_size": 4, "learning_rate": 1e30}
    single = {**sections, "trainer": {"ranks": 1, "threads": 1}}
    with pytest.raises(RunFailed, match=r"sft failed: rank 0: .*not finite at step") as error:
        train_sft(SFTConfig(**single, sft=steps))
    assert "\n" not in str(error.value)
    folder = Path(sections["run"]["folder"]) / "stage"
    assert not (folder / "model").exists()
    assert read_jsonl(folder / "events.jsonl")[-1]["event"] == "failure"

    result = train_sft(SFTConfig(**single, sft={**steps, "learning_rate": 1e-3}), resume=True)
    assert (result.model / "model.safetensors").is_file()
    assert read_jsonl(folder / "metrics.jsonl")[-1]["attempt"] == 1


@pytest.mark.parametrize("died", [True, False], ids=["controller killed", "no model"])
def test_no_model_is_no_success(sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch, died: bool) -> None:
    """A killed controller of Ray Train is an error that is no `TrainingFailedError`: the command said it was done."""

    def fit() -> None:
        if died:
            raise ActorDiedError()

    monkeypatch.setattr(supervised, "train_group", lambda *arguments, **options: TrainGroup(fit))
    monkeypatch.setattr(ray, "put", lambda value: value)
    with pytest.raises(RunFailed, match="sft failed: The actor died" if died else "no complete model"):
        train_sft(SFTConfig(**sections, sft={"batch_size": 4, "microbatch_size": 2}))
    assert read_jsonl(Path(sections["run"]["folder"]) / "stage" / "events.jsonl")[-1]["event"] == "failure"


def test_a_torn_model_is_not_taken_for_a_finished_stage(
    sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that was interrupted leaves config.json; --resume starts the stage again instead of calling it done."""
    model = Path(sections["run"]["folder"]) / "stage" / "model"

    def fit() -> None:
        model.mkdir(parents=True, exist_ok=True)
        shutil.copytree(sections["model"]["base"], model, dirs_exist_ok=True)

    monkeypatch.setattr(supervised, "train_group", lambda *arguments, **options: TrainGroup(fit))
    monkeypatch.setattr(ray, "put", lambda value: value)
    config = SFTConfig(**sections, sft={"batch_size": 4, "microbatch_size": 2})
    train_sft(config)
    assert train_sft(config, resume=True).report is None
    (model / "model.safetensors").write_bytes(b"")
    assert train_sft(config, resume=True).report is not None


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("model", {"base": "/absent/model"}, "no such folder for the base model"),
        ("data", {"source": "absent.jsonl"}, "no file absent.jsonl"),
        ("trainer", {"ranks": 3}, "must be a multiple of trainer.ranks"),
    ],
)
def test_bad_input_is_refused_before_ray_is_needed(
    sections: dict[str, Any], section: str, change: dict[str, Any], sentence: str
) -> None:
    sections[section] = {**sections[section], **change}
    with pytest.raises(ConfigError, match=sentence):
        train_sft(SFTConfig(**sections))
    assert not Path(sections["run"]["folder"]).exists()


def test_only_whole_new_lines_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"old": 1}\n')
    rows = _new_rows(path)
    assert next(rows) == []
    with path.open("a") as file:
        file.write('{"a": 1}\n{"b"')
    assert next(rows) == [{"a": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert next(rows) == [{"b": 2}]
