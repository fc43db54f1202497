"""Plans of jobs: memory, what would have to change, links, and what a command shows of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made.model_configs import write_config

from r3hf_ray.cli import main
from r3hf_ray.config import PlanConfig
from r3hf_ray.planning.placement import Cluster, cluster_of
from r3hf_ray.planning.plan import RunPlan, make_plan
from r3hf_ray.planning.processes import GIB
from r3hf_ray.planning.transfers import Links
from r3hf_ray.settings import load

ROOT = Path(__file__).parents[2]
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.toml") if "[ppo]" in path.read_text())
LINKS = Links.of_gbit(node=100.0, storage=10.0)


def of(nodes: int, gpus: int = 8, *, gpu: float = 80.0, cpu: float = 1000.0) -> Cluster:
    return cluster_of(nodes=nodes, gpus=gpus, gpu_gib=gpu, cpus=None, cpu_gib=cpu)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: None) -> Any:
    """`planned(path, cluster, overrides)`: a job's plan; a policy that another job has to make is a tiny one."""

    def plan(path: Path, cluster: Cluster, *overrides: str) -> RunPlan:
        config = load(PlanConfig, path, list(overrides))
        monkeypatch.chdir(tmp_path)
        if config.model.policy.startswith(("runs/", "models/")):
            write_config(tmp_path / config.model.policy, "tiny")
        return make_plan(config, cluster, LINKS)

    return plan


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_has_a_plan(path: Path, planned: Any) -> None:
    plan = planned(path, of(8))
    assert [process.name for process in plan.processes][:3] == ["learner", "sampler", "reward"]
    assert not plan.without
    assert plan.fits == (path.stem != "llama3_70b_hh")


def test_what_the_heads_of_jobs_say(planned: Any) -> None:
    heads = {"qwen2.5_0.5b_one_gpu": of(1, 1, cpu=200.0), "llama3_8b_hh": of(1), "llama3_70b_hh": of(8)}
    for name, cluster in heads.items():
        path = ROOT / "jobs" / f"{name}.toml"
        head = path.read_text().partition("[run]")[0]
        learner, sampler, reward = planned(path, cluster).processes[:3]
        for process in (learner, sampler, reward):
            (said,) = re.findall(rf"{process.name} ([0-9.]+) GiB", " ".join(head.split("\n# ")))
            assert float(said) == pytest.approx(process.on_gpu / GIB, rel=0.1), f"{path}: {process.name}"


def test_what_does_not_fit_says_what_to_change_in_order(planned: Any) -> None:
    path = ROOT / "jobs" / "llama3_8b_hh.toml"
    few = ("--learner.ranks", "2", "--learner.gradient_checkpointing", "false")
    plan = planned(path, of(2), *few)
    assert plan.verdicts["learner"] == "does not fit" and not plan.fits
    fields = [sentence.partition(" = ")[0] for sentence in plan.changes["learner"]]
    assert fields == ["learner.gradient_checkpointing", "ppo.microbatch_tokens", "learner.ranks"]
    assert planned(path, of(2), "--learner.ranks", "4", "--ppo.microbatch_tokens", "1024").verdicts["learner"] != (
        "does not fit"
    ), "what was said holds"


def test_more_ranks_hold_less_each(planned: Any) -> None:
    path = ROOT / "jobs" / "llama3_8b_hh.toml"
    sizes = [planned(path, of(4), "--learner.ranks", str(n)).processes[0].device["evaluate"] for n in (6, 12)]
    assert sizes[0]["policy optimizer"] == pytest.approx(2 * sizes[1]["policy optimizer"], rel=1e-6)
    assert sizes[0]["policy weights"] == pytest.approx(4 * 8_030_261_248 / 6, rel=1e-6)


def test_bytes_and_seconds_of_a_sync_and_a_checkpoint(planned: Any) -> None:
    plan = planned(ROOT / "jobs" / "llama3_70b_hh.toml", of(8))
    assert plan.sync.size == 2 * 70_553_706_496
    assert plan.sync.seconds["to samplers on other nodes"] == pytest.approx(plan.sync.size / 12.5e9)
    assert plan.checkpoint.size == 12 * (70_553_706_496 + 7_504_924_672 + 4096 + 1)
    assert plan.checkpoint.seconds["write"] == pytest.approx(plan.checkpoint.size / 1.25e9)


def test_a_run_without_a_critic_holds_none(planned: Any) -> None:
    plan = planned(ROOT / "jobs" / "llama3_8b_hh.toml", of(1), "--ppo.advantage", "r3hf_baseline")
    assert not [name for parts in plan.processes[0].device.values() for name in parts if "critic" in name]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_config(tmp_path / "policy", "tiny")
    path = tmp_path / "job.toml"
    path.write_text(
        f'[run]\nname = "x"\n[model]\npolicy = "{tmp_path}/policy"\nreward_model = "runs/rm/model"\n'
        '[data]\nsource = "x.jsonl"\n[rollout]\nmax_response_tokens = 32\n'
    )
    return path


def test_the_command_shows_a_plan(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job), "--cpu-gb", "64", "--learner.ranks", "4"]) == 0
    said = capsys.readouterr().out
    for words in ("learner x 4", "one weight sync", "runs/rm/model is not there yet", "node 0", "the run fits"):
        assert words in said
    assert main(["plan", str(job), "--cpu-gb", "2", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["verdicts"]["host memory"] == "does not fit"
    assert plan["counts"]["prompts"] == "32 a step: 1920 in 60 steps"
    assert plan["weight_sync"]["bytes"] == 4 * plan["checkpoint"]["bytes"] // 24 or plan["weight_sync"]["bytes"] > 0


def test_a_hub_name_that_cannot_be_fetched_is_one_sentence(
    job: Path, hub_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(job), "--model.policy", "nobody/nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: nobody/nothing: cannot be loaded as policy:") and said.count("\n") == 1


@pytest.mark.slow
def test_a_plan_is_near_what_torch_tracks() -> None:
    """The smallest case of `make plan-check`."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "plan_check", "tiny", "4"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
