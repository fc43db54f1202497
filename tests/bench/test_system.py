"""From rows and CPU samples to a run's numbers, and the meter on real processes."""

import subprocess
import sys
from typing import Any

import pytest

from bench.results import LEARNER_STAGES, REST, WORKER_STAGES
from bench.system import CpuMeter, measure


def rows(*times: float) -> list[dict[str, Any]]:
    stages = {name: 0.25 for name in (*LEARNER_STAGES, *WORKER_STAGES)}
    facts = {"rollout/response_length/mean": 60.0, "async/staleness/mean": 1.0, "time/step": 2.0}
    return [{"time": time} | stages | facts for time in times]


def test_steady_steps_leave_out_the_first_and_the_last() -> None:
    samples = [(100.0 + t, 1.5 * t) for t in range(0, 40, 5)]
    run = measure(rows(110.0, 112.0, 114.5, 116.5, 130.0), samples, started=80.0, cores=2)
    assert run.steps == [2.0, 2.5, 2.0]
    assert run.first_step == 30.0
    assert run.cpu == pytest.approx(1.5 * 6.5 / 3), "interpolated between samples"
    assert run.idle == pytest.approx(0.25)
    assert run.stages["time/sync"] == 0.25
    assert run.stages[REST] == pytest.approx(2.0 - 0.25 * len(LEARNER_STAGES))
    assert (run.tokens, run.staleness) == (60.0, 1.0)


def test_three_rows_are_all_used() -> None:
    run = measure(rows(10.0, 12.0, 15.0), [(0.0, 0.0), (20.0, 40.0)], started=0.0, cores=2)
    assert run.steps == [2.0, 3.0]
    assert run.idle == pytest.approx(0.0)


SPIN = """
import sys, time
while time.process_time() < 0.3:
    pass
print(flush=True)
sys.stdin.read()
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"


def test_the_meter_counts_children_and_keeps_the_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    meter = CpuMeter(process.pid)
    process.stdout.readline()
    meter.look()
    used = meter.samples[-1][1]
    assert used >= 0.3
    process.stdin.close()
    process.wait(30)
    meter.look()
    assert meter.samples[-1][1] >= used
