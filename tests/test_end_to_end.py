"""Whole runs on a real Ray, with vLLM and Ray Train: what is promised of a run's records, its repetition and its end.

All runs but the submitted job share one Ray instance, so that the start of processes is their only cost.
"""

import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import wandb
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from r3hf_ray.cli import main
from r3hf_ray.config import PPOConfig
from r3hf_ray.instruments.compare.arm_runs import PlannedRun
from r3hf_ray.instruments.compare.screening import screened
from r3hf_ray.instruments.toy.settings import ToySection
from r3hf_ray.instruments.toy.world import make_world
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.metrics import read_metrics
from r3hf_ray.records.samples import sample_steps
from r3hf_ray.settings import load

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, BEFORE_RESUME, PROMPTS = 5, 3, 8
CPUS = 4.0
"""Of `local_ray`."""
TIMES = ("time", "time/", "perf/", "sync/seconds", "attempt")
"""What may differ between two runs of the same configuration."""


class Run(NamedTuple):
    """A finished command: exit code, what it said, and its folder."""

    code: int
    said: str
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Training rows as they were written, without evaluations."""
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if "policy/loss" in row]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in read_jsonl(self.folder / "events.jsonl") if event["event"] == kind]


class World(NamedTuple):
    """Folder with job.toml, models and prompts, and how to run it."""

    folder: Path
    run: Callable[..., Run]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one configuration must share to the last bit."""
    return {name: value for name, value in row.items() if not name.startswith(TIMES)}


def make_reward_model(folder: Path, *, head: float | None = None) -> None:
    """A random reward model of the toy policy's shape; `head` fills its score head."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder.parent / "base", num_labels=1)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight) if head is None else torch.nn.init.constant_(model.score.weight, head)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder.parent / "base").save_pretrained(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """job.toml of a tiny run: 8 prompts a step, 12 response tokens, 2 ranks, 1 rollout and 2 reward actors."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, ToySection(sft_rows=1, train_prompts=24, heldout_prompts=8))
    make_reward_model(folder / "reward")
    (folder / "job.toml").write_text(
        f"""
[run]
name = "run"
folder = "{folder / "runs"}"
[model]
policy = "{folder / "base"}"
reward_model = "{folder / "reward"}"
[data]
source = "{folder / "prompts.jsonl"}"
heldout = 8
split_by = "row"
[rollout]
prompts_per_step = {PROMPTS}
max_response_tokens = 12
[reward]
calibration_samples = 8
gold = "r3hf_ray.instruments.toy.language:gold_reward"
[ppo]
steps = {STEPS}
[learner]
checkpoint_every = 1
[tracking]
wandb = "offline"
samples_every = 1
"""
    )
    return folder / "job.toml"


@pytest.fixture(scope="module")
def world(job: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """`world.run(name, *arguments)` runs `r3hf ppo job.toml` on the shared Ray; no wandb of the user is touched."""
    patch, home = pytest.MonkeyPatch(), str(tmp_path_factory.mktemp("wandb"))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        patch.setenv(name, home)
    folder = job.parent

    def run(name: str, *arguments: str) -> Run:
        said = folder / f"{name}.txt"
        with said.open("a") as file, pytest.MonkeyPatch.context() as output:
            output.setattr(sys, "stdout", file)
            output.setattr(sys, "stderr", file)
            code = main(["ppo", str(job), "--run.name", name, *arguments])
        return Run(code, said.read_text(), folder / "runs" / name)

    yield World(folder, run)
    patch.undo()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Run:
    """Five steps at lag 0."""
    run = world.run("undisturbed")
    assert run.code == 0, run.said
    return run


def test_a_run_leaves_everything(undisturbed: Run, world: World) -> None:
    folder = undisturbed.folder
    names = {"config.toml", "metrics.jsonl", "events.jsonl", "checkpoints", "model", "samples", "report.html", "wandb"}
    assert names <= {path.name for path in folder.iterdir()}
    assert load(PPOConfig, folder / "config.toml", []).ppo.steps == STEPS
    assert [row["train/global_step"] for row in undisturbed.rows] == list(range(1, STEPS + 1))
    assert sample_steps(folder) == list(range(1, STEPS + 1))
    report = (folder / "report.html").read_text()
    assert "reward/score/mean" in report
    assert len(undisturbed.events("finished")) == 1
    assert not undisturbed.events("failure")
    evaluated = [row["train/global_step"] for row in read_metrics(folder) if "eval/heldout/gold/mean" in row]
    assert evaluated == [0, STEPS]

    trained = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(world.folder / "base").state_dict()
    assert trained.keys() == initial.keys()
    assert not torch.equal(trained["lm_head.weight"], initial["lm_head.weight"])
    tokens = AutoTokenizer.from_pretrained(folder / "model")
    assert tokens.get_vocab() == AutoTokenizer.from_pretrained(world.folder / "base").get_vocab()


def test_the_numbers_of_a_synchronous_run(undisturbed: Run) -> None:
    for step, row in enumerate(undisturbed.rows, start=1):
        assert row["r3hf/telescoping_error/max"] < 1e-5
        assert row["kl/sampler/logp_absdiff_max"] < 1e-4, "the sampler runs the learner's weights"
        assert row["sync/probe_gap"] < 1e-4
        assert (row["sync/version"], row["sync/mismatch"], row["rollout/workers"]) == (step, 0, 1)
        assert (row["async/staleness/mean"], row["async/staleness/max"]) == (0, 0)
        assert row["policy/ratio/mean"] == pytest.approx(1.0, abs=0.05)
        assert 0 <= row["policy/clipfrac"] < 0.5
        assert (row["rollout/failed"], row["rollout/retried"]) == (0, 0)
    assert undisturbed.rows[0]["kl/ref/mean"] == pytest.approx(0.0, abs=1e-4), "the reference is the initial policy"
    assert undisturbed.rows[-1]["kl/ref/mean"] != 0.0


def test_wandbs_file_equals_metrics_jsonl(undisturbed: Run, wandb_history: Callable[[Path], list[Any]]) -> None:
    wandb.teardown()  # the file is complete only when wandb's service has ended
    (file,) = (undisturbed.folder / "wandb").glob("offline-run-*/run-*.wandb")
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_history(file)]
    tables = [row for row in logged if "samples/train.nrows" in row]
    assert [row for row in logged if row not in tables] == read_jsonl(undisturbed.folder / "metrics.jsonl")
    assert len(tables) == STEPS


def test_a_run_repeats_to_the_bit_and_a_resumed_one_goes_on(undisturbed: Run, world: World) -> None:
    first = world.run("resumed", "--ppo.steps", str(BEFORE_RESUME))
    assert first.code == 0, first.said
    assert [numbers(row) for row in first.rows] == [numbers(row) for row in undisturbed.rows[:BEFORE_RESUME]]
    refused = world.run("resumed")
    assert refused.code == 2
    assert "resumed exists; use another name or continue it with --resume" in refused.said

    again = world.run("resumed", "--resume", "--tracking.samples_per_dump", "4")
    assert again.code == 0, again.said
    assert [row["train/global_step"] for row in again.rows] == list(range(1, STEPS + 1)), "nothing is done twice"
    assert [numbers(row) for row in again.rows] == [numbers(row) for row in undisturbed.rows]
    assert [row["attempt"] for row in again.rows] == [0] * BEFORE_RESUME + [1] * (STEPS - BEFORE_RESUME)
    assert [event["step"] for event in again.events("started")] == [0, BEFORE_RESUME]
    files = list((again.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{(again.folder / 'wandb_id').read_text().strip()}.wandb"}
    for step in range(1, STEPS + 1):
        prompts, tokens = sampled(again.folder, step)
        wanted_prompts, wanted_tokens = sampled(undisturbed.folder, step)
        assert set(prompts) <= set(range((step - 1) * PROMPTS, step * PROMPTS)), "the stream goes on in order"
        assert tokens == wanted_tokens[: len(tokens)]
        assert prompts == wanted_prompts[: len(prompts)]


def test_any_number_of_samplers_and_scorers_gives_the_same_bits(world: World) -> None:
    """Groups are fixed by what they hold; who generates and scores them is not."""
    found = []
    for samplers, scorers in (("1", "2"), ("2", "2"), ("3", "1")):
        fleet = ("--rollout.actors", samplers, "--reward.actors", scorers)
        run = world.run(f"fleet-{samplers}-{scorers}", "--ppo.steps", "2", "--rollout.group_size", "2", *fleet)
        assert run.code == 0, run.said
        assert [row["fleet/reward_actors"] for row in run.rows] == [int(scorers)] * 2
        apart = ("fleet/", "rollout/workers")
        found.append(
            [{k: v for k, v in numbers(row).items() if not k.startswith(apart)} for row in read_metrics(run.folder)]
        )
        deadline, left = time.monotonic() + 20.0, {"coordinator", "rollout 0", "reward 0"}
        while left & {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}:
            assert time.monotonic() < deadline, "a finished run leaves no actor"
            time.sleep(0.2)
    assert found[0] == found[1] == found[2]


def test_one_process_computes_what_the_system_computes(undisturbed: Run, job: Path) -> None:
    config = load(PPOConfig, job, ["--run.name", "in-process"])
    ((_, outcome),) = screened([PlannedRun(arm="screened", seed=0, config=config)], processes=1)
    assert outcome["event"] == "finished", outcome
    rows = read_metrics(config.run.folder / config.run.name)
    assert [row["train/global_step"] for row in rows] == list(range(STEPS + 1))
    for ours, theirs in zip(rows, read_metrics(undisturbed.folder), strict=True):
        for name in ours.keys() & {"reward/gold/mean", "kl/ref/mean", "policy/loss", "eval/heldout/score/mean"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (name, ours["train/global_step"])


def make_foreign_reward_model(folder: Path) -> None:
    """A random reward model that spells in bytes and reads ``[question] answer``; vLLM takes its shape."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["cats purr . stars move . how-to safety . thanks goodbye"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}] {% else %}{{ m['content'] }}<eos>"
        "{% endif %}{% endfor %}"
    )
    torch.manual_seed(2)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=400, **sizes, num_labels=1, pad_token_id=0, eos_token_id=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_foreign_models_a_cost_and_vllm_scores(world: World) -> None:
    foreign = world.folder / "foreign"
    make_foreign_reward_model(foreign)
    own = str(world.folder / "reward")
    run = world.run(
        "several",
        *("--ppo.steps", "2", "--reward.backend", "vllm", "--reward.actors", "1"),
        *("--model.rewards", json.dumps([{"name": "foreign", "source": str(foreign), "weight": 0.5}])),
        *("--model.cost", own, "--cost.multiplier", "0.2", "--cost.multiplier_lr", "0.1", "--cost.limit", "-100"),
        *("--reward.max_alignment_loss", "1.0"),
    )
    assert run.code == 0, run.said
    assert len(run.rows) == 2
    for row in run.rows:
        assert row["r3hf/telescoping_error/max"] < 1e-4
        assert 0.0 <= row["r3hf/alignment_loss"] < 1.0
        assert row["cost/score/mean"] == pytest.approx(row["reward/score/mean"], abs=1e-4), "the same model twice"
        assert math.isfinite(row["reward/foreign/score/mean"])
    first, second = (row["cost/multiplier"] for row in run.rows)
    assert first == pytest.approx(0.2)
    assert second > first, "the limit is violated"


def sampled(folder: Path, step: int) -> tuple[list[int], list[int]]:
    """Prompt and token ids of a step's dump."""
    (file,) = (folder / "samples").glob(f"step_{step:06d}.parquet")
    table = pq.read_table(file)
    return table["prompt_id"].to_pylist(), table["token_id"].to_pylist()


def test_a_killed_rank_restarts_at_the_last_checkpoint(undisturbed: Run, world: World) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill_a_rank() -> None:
        metrics = world.folder / "runs" / "killed" / "metrics.jsonl"
        while not any(row["train/global_step"] == 2 for row in read_jsonl(metrics)):
            if over.wait(0.05):
                return
        ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        killed.append(ranks[-1].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    run = world.run("killed")
    over.set()
    assert killed
    assert run.code == 0, run.said
    (restart,) = run.events("restart")
    assert restart["attempt"] == 1
    assert restart["step"] >= 1, "a checkpoint was committed"
    rows = read_metrics(run.folder)
    assert [numbers(row) for row in rows] == [numbers(row) for row in read_metrics(undisturbed.folder)]
    assert [row["attempt"] for row in rows] == [int(step > restart["step"]) for step in range(STEPS + 1)]


def test_lag_one_overlaps_and_is_bounded_and_a_trained_model_is_a_policy(world: World, undisturbed: Run) -> None:
    """The policy is what another run has left in `model/`: learner, reference and vLLM load it as it is."""
    lag = ("--rollout.max_lag", "1", "--ppo.importance_cap", "2.0", "--rollout.actors", "2")
    run = world.run("lag", *lag, "--ppo.steps", "3", "--model.policy", str(undisturbed.folder / "model"))
    assert run.code == 0, run.said
    assert [row["train/global_step"] for row in run.rows] == [1, 2, 3]
    assert [row["async/staleness/max"] for row in run.rows] == [0, 1, 1]
    for row in run.rows:
        assert row["kl/is_weight/max"] <= 2.0
        assert row["rollout/workers"] == 2
        assert row["r3hf/telescoping_error/max"] < 1e-5


SMALL = ("--learner.ranks", "1", "--reward.actors", "1", "--tracking.wandb", "disabled", "--evaluation.prompts", "0")


def test_a_reward_that_is_not_finite_is_never_trained_on(world: World) -> None:
    make_reward_model(world.folder / "nan_reward", head=float("nan"))
    run = world.run("nan_reward", *SMALL, "--model.reward_model", str(world.folder / "nan_reward"))
    assert run.code == 1
    assert "model.reward_model gives a score (R(x, y) nan) that is not finite: check its weights" in sentence(run)
    assert not run.rows
    assert run.events("quarantined")
    assert not (run.folder / "model").exists()


def test_a_diverging_run_stops_with_a_capsule(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    run = world.run("diverged", *SMALL, "--learner.ranks", "2", "--optimizer.policy_lr", "1e30")
    assert run.code == 1
    assert "policy/loss nan" in sentence(run)
    assert not run.events("restart"), f"the same would happen again ({time.monotonic() - start:.0f} s)"
    assert not run.rows
    assert not (run.folder / "model").exists()
    (capsule,) = (run.folder / "divergence").iterdir()
    assert f"r3hf replay {capsule}" in run.said.replace("\n", "")
    assert main(["replay", str(capsule)]) == 0
    said = capsys.readouterr().out
    assert "policy loss nan" in said
    assert "not finite, in the order of computation" in said
    assert "policy gradient: " in said


def test_broken_code_in_a_rank_ends_the_run_without_restarts(world: World) -> None:
    """The rank that dumps samples breaks, while the other one waits for it in the collective of a checkpoint."""
    ranks = ("--learner.ranks", "2", "--learner.checkpoint_every", "1")
    run = world.run("broken", *SMALL, *ranks, "--reward.gold_credit", "operator:add")  # prompt + tokens: a TypeError
    assert run.code == 1
    assert "the learner broke (TypeError in " in sentence(run)
    assert not run.events("restart")
    assert len(run.events("started")) == 1
    assert len(run.rows) <= 1
    assert not list((run.folder / "checkpoints").glob("checkpoint_*"))
    for _ in range(50):
        if ray.available_resources()["CPU"] == CPUS:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"of {CPUS:g} CPUs only {ray.available_resources()['CPU']:g} are free again")


def sentence(run: Run) -> str:
    """What a failed run says last: one line, no traceback, no class of an exception."""
    assert "Traceback" not in run.said
    (line,) = [line for line in run.said.splitlines() if line.startswith("failed: ")]
    assert run.events("failure")[-1]["reason"] == line.removeprefix("failed: ")
    assert "Error:" not in line
    return line


# ------------------------------------------------------------------ ray job submit


class Head(NamedTuple):
    """A local Ray head with token authentication."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside Ray's range for workers (10002 to 19999)."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """`ray start --head --block` on free ports, dashboard on loopback, everything of it below a folder of its own."""
    (tmp_path / "token").write_text(secrets.token_hex(32))
    bin_folder = str(Path(sys.executable).parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    port, dashboard, client, agent, metrics = free_ports(5)
    ports = {"port": port, "dashboard-port": dashboard, "ray-client-server-port": client}
    ports |= {"dashboard-agent-listen-port": agent, "metrics-export-port": metrics}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # socket paths are short
        command = [f"{bin_folder}/ray", "start", "--head", "--block", "--num-cpus=4", "--dashboard-host=127.0.0.1"]
        command += [f"--temp-dir={folder}", "--disable-usage-stats", *(f"--{k}={v}" for k, v in ports.items())]
        with (tmp_path / "head.txt").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def submit(head: Head, *entrypoint: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, waiting for the job."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head.address, "--", *entrypoint]
    return subprocess.run(
        command, env=environment or head.environment, capture_output=True, text=True, timeout=300, cwd=ray_free_folder()
    )


def ray_free_folder() -> Path:
    """A working directory that is nobody's repository."""
    return Path(tempfile.gettempdir())


def wait_for(head: Head) -> None:
    """Until the head takes jobs."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", head.address]
    for _ in range(30):
        if subprocess.run(command, env=head.environment, capture_output=True, timeout=60).returncode == 0:
            return
        time.sleep(1.0)
    pytest.fail("the head does not answer")


def test_ray_job_submit(head: Head, job: Path) -> None:
    wait_for(head)
    arguments = ("r3hf", "ppo", str(job), "--run.name", "submitted", *SMALL)
    done = submit(head, *arguments, "--ppo.steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = job.parent / "runs" / "submitted"
    assert [row["train/global_step"] for row in read_metrics(folder)] == [1, 2]
    assert {"model", "report.html", "checkpoints"} <= {path.name for path in folder.iterdir()}

    wrong = submit(head, *arguments, "--ppo.stepz", "2")
    assert wrong.returncode != 0
    assert "ppo.stepz" in wrong.stdout + wrong.stderr

    (job.parent / "no_token").mkdir()
    stranger = {k: v for k, v in head.environment.items() if not k.startswith("RAY_")}
    stranger["HOME"] = str(job.parent / "no_token")
    refused = submit(head, *arguments, environment=stranger)
    assert refused.returncode != 0
    assert "Token authentication is enabled" in refused.stdout + refused.stderr
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{head.address}/api/jobs/")
