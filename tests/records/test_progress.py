import io

import pytest
from rich.console import Console

from r3hf_ray.records import progress
from r3hf_ray.records.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def snapshot(step, stages=None, **metrics):
    return {"step": step, "steps": 60, "metrics": metrics, "doing": stages or {}}


def plain(clock):
    out = io.StringIO()
    return out, Progress(Console(file=out, width=80), clock=clock)


def test_without_a_terminal_each_step_is_one_line(clock):
    out, progress = plain(clock)
    metrics = {"reward/score/mean": 1.234, "kl/ref/mean": 0.5, "perf/tokens_per_sec": 812.4}
    with progress:
        progress.update(snapshot(0))
        progress.update(snapshot(1, **metrics))
        progress.update(snapshot(1, **metrics))
        progress.update(snapshot(2, **metrics))
    lines = out.getvalue().splitlines()
    assert lines == [f"step {k}/60  reward 1.23  KL 0.50 nats  speed 812 tok/s" for k in (1, 2)]


def test_a_quiet_run_says_every_20_seconds_what_it_waits_for(clock):
    out, progress = plain(clock)
    stages = {"rollout": "generating chunk 3 (12 s)", "learner": "waiting for the batch of step 1"}
    with progress:
        progress.update(snapshot(0, stages))
        clock.now += 19
        progress.update(snapshot(0, stages))
        assert out.getvalue() == ""
        clock.now += 2
        progress.update(snapshot(0, stages))
        progress.update(snapshot(0, stages))
    assert out.getvalue().splitlines() == [
        "step 1/60 still running, quiet for 21 s  "
        "rollout: generating chunk 3 (12 s) | learner: waiting for the batch of step 1 (21 s)"
    ]


def test_the_clock_of_a_stage_starts_again_when_its_text_changes(clock):
    out, progress = plain(clock)
    with progress:
        progress.update(snapshot(0, {"reward": "scoring"}))
        clock.now += 15
        progress.update(snapshot(0, {"reward": "idle"}))
        clock.now += 6
        progress.update(snapshot(0, {"reward": "idle"}))
    assert "reward: idle (6 s)" in out.getvalue()


def test_on_a_terminal_the_display_names_step_metrics_and_stages(clock):
    out = io.StringIO()
    console = Console(file=out, width=90, height=30, force_terminal=True, color_system=None)
    with Progress(console, clock=clock) as progress:
        stages = {"weights": "version 3 loaded by 1/1", "odd": "[red]not markup[/red]"}
        progress.update(snapshot(3, stages, **{"reward/score/mean": 1.5}))
        progress.note("restart [1]")
    shown = out.getvalue()
    for text in ("3/60", "reward 1.50", "version 3 loaded by 1/1", "[red]not markup", "restart [1]"):
        assert text in shown


def test_rows_of_a_stage_are_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(record=True, width=200)
    show = progress.row_printer(console, seconds=5.0)
    for number, moment in enumerate((100.0, 104.0, 105.0)):
        now[0] = moment
        show({"train/global_step": number, "train/loss": 0.25 + number, "time": 1e9})
    assert console.export_text().splitlines() == ["step 0  train/loss 0.25", "step 2  train/loss 2.25"]
