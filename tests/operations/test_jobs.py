"""Runs that are submitted to a real cluster which asks for a token."""

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.toy_job import toy_job

from operations.conftest import ADDRESS, URL, Head
from r3hf_ray.cli import main

JOB = "jobs/toy_ppo.toml"


def test_the_command_is_told_by_the_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", JOB, "--run.folder", str(tmp_path), "--dry-run"]) == 0
    assert f"python -m r3hf_ray.cli ppo {JOB} --run.folder {tmp_path}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([JOB], "run.folder: runs is relative"),
        ([JOB, "--ppo.stepz", "3"], "no such field"),
        ([JOB, "--run.folder", "/runs", "--tracking.project", "hf_" + "a" * 30], "looks like a key"),
        (["jobs/none.toml"], "no such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        start = time.monotonic()
        assert main(["jobs", "--address", url]) == 2
    assert time.monotonic() - start < 20.0
    assert f"{url}: no job server answers" in capsys.readouterr().err


@pytest.fixture
def submit(head: Head, toy_world: Path, tmp_path: Path) -> Callable[..., Any]:
    """`submit(name, *words, steps=2)`: `r3hf submit` of a toy job from a folder that holds nothing else."""

    def start(name: str, *words: str, steps: int = 2) -> "subprocess.Popen[str]":
        text = toy_job(toy_world, head.folder / "runs", name=name, steps=steps, checkpoint_every=0, wandb="offline")
        (tmp_path / f"{name}.toml").write_text(text)
        return head.popen("submit", f"{name}.toml", *words, folder=tmp_path)

    return start


def ended(process: "subprocess.Popen[str]", *, seconds: float = 300.0) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "runs" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.ray
@pytest.mark.slow
def test_without_a_token_one_sentence_and_at_once(head: Head) -> None:
    start = time.monotonic()
    code, said = head.r3hf("jobs", environment=head.stranger)
    assert code == 2 and "authentication required; export RAY_AUTH_MODE=token" in " ".join(said.split())
    program = "from r3hf_ray.session import ray_session\nwith ray_session(None): pass"
    environment = head.stranger | {"RAY_ADDRESS": ADDRESS}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert "RAY_ADDRESS: cannot join the cluster at" in done.stderr and "RAY_AUTH" in done.stderr
    assert time.monotonic() - start < 90.0


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_cannot_run_fails_with_the_drivers_code(head: Head, submit: Callable[..., Any]) -> None:
    code, said = ended(submit("bad", "--follow", "--model.policy", "/nowhere"))
    assert code == 2 and "/nowhere: no such folder for the policy" in said
    assert "failed (exit code 2)" in head.r3hf("jobs")[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_at_once_one_of_which_is_stopped(head: Head, submit: Callable[..., Any]) -> None:
    """Neither meets the other; the one is saved as it ends; and a key that both had is nowhere to be found."""
    key = secrets.token_hex(20)
    (head.folder / "keys.env").write_text(f"export WANDB_API_KEY={key}\nHF_TOKEN=hf_{key}\n")
    code, said = ended(submit("long", "--env-file", str(head.folder / "keys.env"), steps=500))
    assert code == 0 and "r3hf stop long" in said
    short = submit("short", "--env-file", str(head.folder / "keys.env"), "--follow")
    code, said = ended(submit("long"))
    assert code == 2 and "long is under way" in said
    deadline = time.monotonic() + 300.0
    while not rows(head.folder, "long/metrics.jsonl"):
        assert time.monotonic() < deadline, head.r3hf("jobs")[1]
        time.sleep(0.5)
    code, said = head.r3hf("stop", "long")
    assert code == 0 and "is done and saved" in said, said
    code, said = ended(short)
    assert code == 0 and "step 2/2" in said, said

    events = rows(head.folder, "long/events.jsonl")
    [saved] = [event["step"] for event in events if event["event"] == "checkpoint"]
    done = [row["train/global_step"] for row in rows(head.folder, "long/metrics.jsonl")]
    assert saved == max(done) < 500 and events[-1]["event"] == "stopped"
    assert json.loads((head.folder / "runs/long/live.json").read_text())["state"] == "stopped"
    assert (head.folder / "runs/short/model/config.json").is_file() and (
        head.folder / "runs/short/report.html"
    ).exists()
    listed = head.ray("list", "actors", "--address", URL, "--filter", "state=ALIVE", "--format", "json")
    left = [actor["class_name"] for actor in json.loads(listed)]
    assert [name for name in left if not name.startswith("_")] == [], "Ray's own for all of its cluster may stay"
    told = head.ray("list", "jobs", "--address", URL, "--detail", "--format", "json")
    assert "keys.env" in told and key not in told
    for path in head.folder.rglob("*"):
        if path.is_file() and path.name != "keys.env" and "sockets" not in path.parts:
            assert key.encode() not in path.read_bytes(), path
