"""The command line: what it helps with, and one sentence with the right exit code for each thing that is wrong."""

import json
import shlex
import shutil
import subprocess
import sys
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

from r3hf_ray import __version__
from r3hf_ray.cli import COMMANDS, main
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import DivergenceError, ModelError, RunFailed
from r3hf_ray.flags import AuditFlags, CompareFlags, JobFlags, PlanFlags
from r3hf_ray.records.run_folder import open_run
from r3hf_ray.sections.data import DataSection
from r3hf_ray.settings import fields_of, load, read_flags, section_in

WINDOW = 64
"""Of the tiny policy. [tokens]"""


class Job(NamedTuple):
    """A job.toml that is right, and the folders it names."""

    path: Path
    folder: Path


@pytest.fixture
def job(tmp_path: Path, tiny_models: Any, no_ray: None) -> Job:
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
        (["--ppo.stepz", "3"], ["--ppo.stepz: no such field; did you mean --ppo.steps? (r3hf ppo"]),
        (["--ppo.steps", "many"], ["ppo.steps", "valid integer"]),
        (["--rollout.prompts_per_step", "0"], ["rollout.prompts_per_step", "greater than 0"]),
        (["--rollout.max_actors", "1", "--rollout.actors", "2"], ["rollout.actors = 2 must lie between 1"]),
        (["--learner.ranks", "17"], ["ppo.minibatches (2) x learner.ranks (17) is more than the 32 responses"]),
        (["--rollout.top_p", "0.9"], ["rollout.top_p must be 1"]),
        (["--rollout.top_k", "50"], ["rollout.top_k must be -1 (off)"]),
        (["--model.policy", "/absent/policy"], ["/absent/policy: no such folder for the policy"]),
        (["--model.reward_model", "/absent/rm"], ["/absent/rm: no such folder for the reward model"]),
        (["--model.reference", "/absent/ref"], ["/absent/ref: no such folder for the reference"]),
        (["--data.source", "/absent/prompts.jsonl"], ["data.source: no file /absent/prompts.jsonl"]),
        (
            ["--data.skip", "20"],
            ["none of its 20 rows (read as data.format prompt) is left: 20 skipped (lower data.skip)"],
        ),
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


def test_a_missing_job_is_one_sentence(tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
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


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_help_names_the_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(["--help"], capsys)
    assert [line for line in said.splitlines() if line.endswith(":")] == ["train:", "run:", "look:", "tools:"]
    assert not [command for command in COMMANDS if f"  r3hf {command}" not in said]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_a_screen_and_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown([command, "--help"], capsys).splitlines()
    assert len(said) <= 40 and max(map(len, said)) <= 120
    (example,) = [line.removeprefix("example: r3hf ") for line in said if line.startswith("example: ")]
    name, *words = shlex.split(example)
    assert name == command
    monkeypatch.chdir(Path(__file__).parents[1])
    options = read_flags(COMMANDS[name].flags, name, words)
    if isinstance(options, JobFlags | PlanFlags | CompareFlags):
        job = COMMANDS[name].job
        assert job is not None
        load(job, options.job, options.overrides)


SECTIONS = [
    (name, section)
    for name, entry in COMMANDS.items()
    for section, field in (entry.job.model_fields if entry.job else {}).items()
    if section_in(field.annotation)
]


@pytest.mark.parametrize(("command", "section"), SECTIONS, ids=" ".join)
def test_a_section_fits_a_screen_a_line_a_field(command: str, section: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown([command, "--help", section], capsys)
    assert len(said.splitlines()) <= 40
    job = COMMANDS[command].job
    assert job is not None
    names = [name for name, _ in fields_of(job) if name.startswith(f"{section}.") and name.count(".") == 1]
    assert len(names) >= 2
    for name in names:
        assert f"  --{name} " in said


@pytest.mark.parametrize("command", [name for name, entry in COMMANDS.items() if entry.job])
def test_every_field_is_somewhere_in_full(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(shown([command, "--help", "all"], capsys).split())
    job = COMMANDS[command].job
    assert job is not None
    for name, field in fields_of(job):
        if "." in name:
            assert field.description, f"{name}: an attribute docstring with its unit"
            assert f"--{name} " in said and " ".join(field.description.split()) in said, name


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("reward.mode", ["--reward.mode TEXT", "(`r3hf`), the same summed over spans", "(default: r3hf)"]),
        ("--reward.mode", ["--reward.mode TEXT"]),
        ("lambda", ["--ppo.gae_lambda FLOAT", "--cost.multiplier FLOAT"]),
    ],
)
def test_help_finds_a_field_by_its_name_or_a_word(
    topic: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(["ppo", "--help", topic], capsys)
    assert not [word for word in words if word not in said], said
    assert "--run.name" not in said


def test_help_on_nothing_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--help", "rewrad"]) == 2
    assert "rewrad: no field of r3hf ppo speaks of it; did you mean reward?" in capsys.readouterr().err


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--version"], capsys).strip() == f"r3hf_ray {__version__}"


def test_audit_reads_pairs_as_a_job_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[DataSection] = []

    def run_audit(options: AuditFlags, console: object) -> int:
        asked.append(options.data)
        return 0

    monkeypatch.setattr("r3hf_ray.instruments.audit.run.run_audit", run_audit)
    plain = ["audit", "--reward-model", "m", "--pairs", "openai/summarize_from_feedback"]
    assert main(plain) == 0
    source = "openai/summarize_from_feedback"
    assert asked == [DataSection(source=source)]  # what is left out is what a job would take
    options = ["--config", "comparisons", "--data-dir", "d", "--split", "validation", "--format", "tldr_pairs"]
    assert main([*plain, *options, "--skip", "3", "--limit", "9"]) == 0
    given = {"config": "comparisons", "data_dir": "d", "split": "validation", "format": "tldr_pairs"}
    assert asked[1] == DataSection(source=source, skip=3, limit=9, **given)
    assert main([*plain, "--format", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: command line: --format: must be 'auto', ") and "safe_rlhf_cost" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["qickstart"], "qickstart: no such command; did you mean quickstart? r3hf --help lists them"),
        (["replay"], "command line: the following arguments are required: CAPSULE (r3hf replay --help"),
        (["ppo"], "command line: the following arguments are required: JOB (r3hf ppo --help"),
        (["audit", "--pairs", "p"], "command line: the following arguments are required: --reward-model (r3hf audit"),
        (["report", "runs/a", "--ppo.steps", "3"], "command line: --ppo.steps: no such field; (r3hf report --help"),
        (["report", "a", "b"], "command line: unrecognized arguments: b (r3hf report --help"),
        (["quickstart", "--sed", "3"], "command line: --sed: no such field; did you mean --seed? (r3hf quickstart"),
        (["quickstart", "--seed"], "command line: argument --seed: expected one argument (r3hf quickstart --help"),
        (["quickstart", "--seed", "-1"], "command line: --seed: must be greater than or equal to 0; got '-1'"),
        (
            ["audit", "--reward_model", "m", "--pairs", "p"],
            "command line: the following arguments are required: --reward-model",
        ),
        (
            ["credit", "--benchmark", "toy", "--reward-model", "m", "--max-response-tokens", "many"],
            "command line: --max-response-tokens: must be a valid integer, unable to parse string as an integer; got "
            "'many'",
        ),
        (["ppo", "--ppo.steps", "3", "JOB"], "3: no such file; name a TOML file first, as in jobs/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")


def test_nothing_is_the_overview_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "r3hf quickstart" in capsys.readouterr().out


def test_help_comes_within_a_second() -> None:
    """Measured as what is loaded, since a machine may be busy: none of the libraries that take seconds."""
    program = (
        "import sys; from r3hf_ray.cli import main; main(['ppo', '--help']);"
        "print('HEAVY', *({'torch', 'ray', 'transformers', 'vllm', 'datasets', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (RunFailed("rank 0 is [gone]"), 1, "failed: rank 0 is [gone]"),
        (DivergenceError("policy/loss nan"), 1, "failed: policy/loss nan"),
        (ModelError("m: no model"), 2, "error: m: no model"),
        (KeyboardInterrupt(), 130, "stopped; what was done is kept: --resume goes on from it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_end_has_its_exit_code(
    job: Job,
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: object) -> int:
        raise raised

    monkeypatch.setitem(COMMANDS, "ppo", COMMANDS["ppo"]._replace(run=run))
    assert main(["ppo", str(job.path)]) == code
    assert capsys.readouterr().err.strip() == said
