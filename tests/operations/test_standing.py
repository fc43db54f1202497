"""`r3hf status`: what is said of a run from its folder, and with what its coordinator says."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.operations import lookout
from r3hf_ray.operations.lookout import Slowness
from r3hf_ray.operations.paragraph import overview, paragraph
from r3hf_ray.operations.standing import Live, standing
from r3hf_ray.records import lease as leases
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.lease import Lease, new_lease
from r3hf_ray.records.run_folder import to_toml


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """`run(steps_done, lease=..., events=[...])`: the folder of a run of sixty steps."""

    def make(done: int, *, lease: Lease | None = None, events: tuple[dict[str, Any], ...] = ()) -> Path:
        folder = tmp_path / "runs" / "x"
        folder.mkdir(parents=True)
        config = PPOConfig(run={"name": "x"}, model={"policy": "p", "reward_model": "r"}, data={"source": "d"})
        (folder / "config.toml").write_text(to_toml(config))
        (folder / "ledger").mkdir()
        with JsonlLog(folder / "metrics.jsonl") as log:
            for step in range(1, done + 1):
                log.write({"train/global_step": step, "attempt": 0, "policy/loss": 0.1, "time/step": 3.0})
        with JsonlLog(folder / "events.jsonl") as log:
            for event in events:
                log.write(event)
        if lease:
            leases._put(folder, lease)
        return folder

    return make


def member(name: str, state: str, **facts: Any) -> Any:
    kind = name.partition(" ")[0]
    empty = {"version": -1, "requests": 0, "groups": 0, "age": 0.0, "restarts": 0, "reason": ""}
    return SimpleNamespace(name=name, kind=kind, state=SimpleNamespace(value=state), **(empty | facts))


def test_a_finished_run_is_said_to_be(run: Callable[..., Path]) -> None:
    text = paragraph(standing(run(12, lease=replace(new_lease(), state="finished"))))
    assert "step 12 of 60, 3.0 s a step; finished" in text


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_what_ended_early_says_why_and_how_to_go_on(run: Callable[..., Path], state: str) -> None:
    text = paragraph(standing(run(3, lease=replace(new_lease(), state=state, reason="no room"))))
    assert f"; {state}: no room; --resume goes on" in text


def test_a_driver_that_is_gone_is_said_with_the_age_of_its_heartbeat(run: Callable[..., Path]) -> None:
    lease = replace(new_lease(), host="far", heartbeat=time.time() - 720)
    text = paragraph(standing(run(3, lease=lease)))
    assert "interrupted: its driver is gone, last heartbeat 12 min ago" in text and "host far" in text


def test_a_run_of_before_there_were_leases_is_read_by_its_events(run: Callable[..., Path]) -> None:
    assert "; finished" in paragraph(standing(run(3, events=({"event": "finished"},))))


def test_a_stage_is_shown_with_what_it_waits_for(run: Callable[..., Path]) -> None:
    died = "no answer for 120 s (run.patience): it is started anew"
    members = [
        member("rollout 0", "busy", version=12, requests=16, groups=1, age=12.0),
        member("rollout 1", "lost", restarts=2, reason=died),
        member("rollout 2", "starting"),
        member("reward 0", "ready"),
    ]
    doing = {"rollout": "generating (12 s)", "reward": "idle", "learner": "waiting for the batch of step 13 (12 s)"}
    live = Live(members=members, pending=["rollout 2", "RayTrainWorker"], free={"CPU": 0.1, "GPU": 0.0})
    events = (
        {"event": "restart", "reason": "rank 1: killed"},
        {"event": "warning", "reason": "Adam's epsilon"},
        {"event": "failure", "actor": "rollout 1", "reason": died},
    )
    text = paragraph(standing(run(12, lease=replace(new_lease(), doing=doing), events=events), live=live))
    for told in (
        "step 12 of 60",
        "; running",
        "waiting for the batch of step 13 (12 s)",
        "generating (12 s)",
        "1 of 3 serve, 16 responses under way, oldest 12 s",
        "rollout 0: busy, version 12, 16 responses, oldest 12 s",
        f"rollout 1: lost, 2 restarts, the last: {died}",
        "rollout 2: starting, not placed: asks 0.3 CPU, free 0.1 CPU",
        "RayTrainWorker; free: 0.1 CPU",
        "1; the last: rank 1: killed",
        f"rollout 1: {died}",
        "Adam's epsilon",
    ):
        assert told in text, f"{told!r} is not in\n{text}"
    assert text.index("rollout 1: lost") < text.index("rollout 0: busy"), "those in trouble first"


def test_a_thousand_members_fit_one_screen(run: Callable[..., Path]) -> None:
    members = [member(f"rollout {number}", "busy", requests=4, age=1.0) for number in range(1000)]
    events = tuple({"event": kind, "reason": "r", "actor": "a"} for kind in ("failure", "warning") for _ in range(100))
    live = Live(members=members)
    text = paragraph(standing(run(60, lease=new_lease(), events=events), live=live))
    assert len(text.splitlines()) <= 30 and "and 992 more" in text and "1000 of 1000 serve" in text


def test_all_runs_have_a_line_and_what_is_no_run_has_none(run: Callable[..., Path]) -> None:
    folder = run(3, lease=replace(new_lease(), state="stopped", reason="Terminated"))
    (folder.parent / "notes").mkdir()
    [line] = overview(folder.parent)
    assert "runs/x: step 3 of 60" in line and "stopped" in line


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        standing(tmp_path)


def test_a_slow_step_is_told_once_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(lookout.time, "monotonic", lambda: now)
    slow = Slowness()
    heard = []
    for second in range(0, 2000, 5):
        now = float(second)
        if slow.is_due(0 if second < 200 else 1, 30.0 if second >= 200 else None):
            heard.append(second)
    assert heard == [60, 350, 650, 950, 1250, 1550, 1850], "a minute of the start; then five times 30 s after step 1"
