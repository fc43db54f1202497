"""The command line: what it helps with, and one sentence with the right exit code for each thing that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from r3hf_ray.cli import main
from r3hf_ray.config import PPOConfig, load
from r3hf_ray.records.run_folder import open_run
from r3hf_ray.sections.data import DataSection

WINDOW = 64
"""Of the tiny policy. [tokens]"""


class Job(NamedTuple):
    """A job.toml that is right, and the folders it names."""

    path: Path
    folder: Path


@pytest.fixture
def job(tmp_path: Path, tiny_models: Any) -> Job:
    rows = ({"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(20))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "job.toml"
    path.write_text(
        f"""
[run]
name = "run"
folder = "{tmp_path / "runs"}"
[model]
policy = "{tiny_models.policy}"
reward_model = "{tiny_models.reward}"
[data]
source = "{tmp_path / "prompts.jsonl"}"
[rollout]
max_response_tokens = 12
"""
    )
    return Job(path, tmp_path)


def refused(job: Job, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of `r3hf ppo job.toml ARGUMENTS`; nothing was started and no folder was made for it."""
    before = sorted((job.folder / "runs").glob("*"))
    capsys.readouterr()
    code = main(["ppo", str(job.path), *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert not ray.is_initialized()
    assert sorted((job.folder / "runs").glob("*")) == before
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert "Error" not in line, "the name of a Python class"
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ppo.stepz", "3"], ["ppo.stepz", "r3hf COMMAND --help"]),
        (["--ppo.steps", "many"], ["ppo.steps", "valid integer"]),
        (["--rollout.prompts_per_step", "0"], ["rollout.prompts_per_step", "greater than 0"]),
        (["--rollout.chunks_per_step", "5"], ["rollout.chunks_per_step (5) must divide rollout.prompts_per_step (32)"]),
        (["--learner.ranks", "17"], ["ppo.minibatches (2) x learner.ranks (17) is more than the 32 responses"]),
        (["--rollout.top_p", "0.9"], ["rollout.top_p must be 1"]),
        (["--rollout.top_k", "50"], ["rollout.top_k must be -1 (off)"]),
        (["--model.policy", "/absent/policy"], ["/absent/policy: no such folder for the policy"]),
        (["--model.reward_model", "/absent/rm"], ["/absent/rm: no such folder for the reward model"]),
        (["--model.reference", "/absent/ref"], ["/absent/ref: no such folder for the reference"]),
        (["--data.source", "/absent/prompts.jsonl"], ["data.source: no file /absent/prompts.jsonl"]),
        (["--data.skip", "20"], ["data.skip (20)", "nothing to train on"]),
        (["--reward.gold", "no_such_module:judge"], ["reward.gold", "no_such_module", "write package.module:function"]),
        (
            ["--reward.gold", "r3hf_ray.instruments.toy.language:absent"],
            ["reward.gold", "write package.module:function"],
        ),
        (["--reward.gold", "nothing"], ["reward.gold", "write package.module:function"]),
        (["--reward.gold_credit", "nothing"], ["reward.gold_credit", "write package.module:function"]),
        (["--run.cpus", "2", "--rollout.actors", "8"], ["asks for 3.6 CPUs", "the cluster has 2", "cpus_per_actor"]),
        (["--run.cpus", "4", "--learner.gpus_per_rank", "1"], ["2 GPUs", "has 0"]),
        (["--rollout.max_response_tokens", "60"], ["row 1", "rollout.max_response_tokens (60)", "window of 64"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_setting_is_one_sentence(
    job: Job, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(job, arguments, capsys)
    assert not [word for word in words if word not in sentence], sentence


def test_a_missing_job_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(Job(tmp_path / "absent.toml", tmp_path), [], capsys)
    assert "absent.toml: no such file" in sentence


def test_a_line_that_cannot_be_read_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    path = job.folder / "prompts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], '{"prompt": "w1', *lines[6:]]) + "\n")
    assert f"{path}:7: not JSON" in refused(job, [], capsys)


def test_a_prompt_longer_than_the_window_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with (job.folder / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1 " * WINDOW}) + "\n")
    sentence = refused(job, [], capsys)
    assert "row 21" in sentence
    assert "lower data.max_prompt_tokens" in sentence


def llama_classifier(labels: int) -> Callable[[Path, Path], None]:
    """Saves a reward model of the tiny shape with so many labels."""

    def save(source: Path, folder: Path) -> None:
        LlamaForSequenceClassification(LlamaConfig.from_pretrained(source, num_labels=labels)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return save


def encoder(source: Path, folder: Path) -> None:
    """Saves a classifier that reads in both directions."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=0)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def other_vocabulary(source: Path, folder: Path) -> None:
    """Saves the same reward model with a tokenizer whose words are numbered otherwise."""
    shutil.copytree(source, folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in reversed(range(36)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def empty(source: Path, folder: Path) -> None:
    """A folder without a model."""
    folder.mkdir()


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (llama_classifier(2), ["a reward model has one label, this has 2"]),
        (encoder, ["no linear `score` head; use a decoder-only sequence classifier"]),
        (empty, ["no model folder (no config.json)"]),
    ],
    ids=["two labels", "encoder", "empty folder"],
)
def test_an_unusable_reward_model_is_one_sentence(
    job: Job,
    tiny_models: Any,
    save: Callable[[Path, Path], None],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = job.folder / "other_reward"
    save(tiny_models.reward, folder)
    sentence = refused(job, ["--model.reward_model", str(folder)], capsys)
    assert not [word for word in [str(folder), *words] if word not in sentence], sentence


def test_a_critic_cannot_start_from_a_model_of_other_words(
    job: Job, tiny_models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.folder / "other_words"
    other_vocabulary(tiny_models.reward, folder)
    sentence = refused(job, ["--model.reward_model", str(folder), "--critic.init", "reward_trunk"], capsys)
    assert "critic.init" in sentence
    assert str(folder) in sentence


def test_a_policy_without_an_end_token_is_refused(
    job: Job, tiny_models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.folder / "endless"
    shutil.copytree(tiny_models.policy, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("eos_token")}))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"eos_token_id": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    sentence = refused(job, ["--model.policy", str(folder)], capsys)
    assert "endless: no end-of-sequence token; set eos_token in its tokenizer" in sentence


@pytest.fixture
def started(job: Job) -> Job:
    """The job's run folder exists already."""
    config = load(PPOConfig, job.path, [])
    open_run(config, config.run, resume=False)
    return job


def test_a_run_folder_is_not_taken_twice(started: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/run exists; use another name or continue it with --resume" in refused(started, [], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run.seed", "1"], ["run.seed", "was started with 0 and cannot go on with 1"]),
        (["--data.skip", "1"], ["data.skip", "was started with 0 and cannot go on with 1"]),
        (["--ppo.gae_lambda", "0.9"], ["ppo.gae_lambda", "0.95", "0.9"]),
        (["--reward.mode", "terminal"], ["reward.mode", "'r3hf'", "'terminal'"]),
        (["--rollout.samples_per_prompt", "2"], ["rollout.samples_per_prompt"]),
        (["--weights.probe_tokens", "10"], ["weights.probe_tokens"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_resumed_run_stays_the_same_run(
    started: Job, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(started, ["--resume", *arguments], capsys)
    assert sentence.startswith(f"error: {words[0]}: ")
    assert not [word for word in words if word not in sentence], sentence


def test_a_resumed_run_keeps_its_model(started: Job, tiny_models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(started, ["--resume", "--model.policy", str(tiny_models.tied)], capsys)
    assert sentence.startswith("error: model.policy: ")
    assert str(tiny_models.policy) in sentence


@pytest.mark.parametrize("command", ["report", "replay"])
def test_a_folder_that_holds_nothing_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: no ")


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    commands = ["quickstart", "sft", "reward", "ppo", "report", "fetch-smollm2", "replay"]
    assert not [command for command in commands if f"r3hf {command}" not in said]


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("ppo", ["--rollout.max_lag", "--reward.mode", "--learner.ranks", "--resume"]),
        ("sft", ["--sft.learning_rate", "--trainer.ranks", "--resume"]),
        ("reward", ["--reward_training.groups_per_step", "--data.heldout", "--resume"]),
    ],
)
def test_help_of_a_command_names_its_fields(
    command: str, fields: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert not [field for field in fields if field not in said]


def test_audit_reads_pairs_as_a_job_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[DataSection] = []

    def run_audit(reward_model: str, data: DataSection, *, folder: Path, console: object) -> int:
        asked.append(data)
        return 0

    monkeypatch.setattr("r3hf_ray.instruments.audit.commands.run_audit", run_audit)
    plain = ["audit", "--reward-model", "m", "--pairs", "openai/summarize_from_feedback"]
    assert main(plain) == 0
    source = "openai/summarize_from_feedback"
    assert asked == [DataSection(source=source)]  # what is left out is what a job would take
    options = ["--config", "comparisons", "--data-dir", "d", "--split", "validation", "--format", "tldr_pairs"]
    assert main([*plain, *options, "--skip", "3", "--limit", "9"]) == 0
    given = {"config": "comparisons", "data_dir": "d", "split": "validation", "format": "tldr_pairs"}
    assert asked[1] == DataSection(source=source, skip=3, limit=9, **given)
    with pytest.raises(SystemExit) as done:
        main([*plain, "--format", "nonsense"])
    assert done.value.code == 2 and "safe_rlhf_cost" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["replay"], ["report", "runs/a", "--ppo.steps", "3"]])
def test_a_command_that_is_none_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: r3hf" in capsys.readouterr().err
