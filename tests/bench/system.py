"""The system as a user runs it: `r3hf ppo` in a process of its own, its CPU time summed over all its processes.

A run starts everything anew, Ray too, so no run finds the other's caches in memory, and the time from the command to
the first step is the user's.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import psutil

from bench.results import LEARNER_STAGES, REST, WORKER_STAGES, SystemRun
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import RunFailed
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.run_folder import to_toml

SAMPLE_SECONDS = 0.5
"""Between two looks at the process tree; a look costs about 10 ms."""
STOP_SECONDS = 60.0


class CpuMeter:
    """CPU seconds of a process and all it started, Ray's workers too (they are the raylet's children)."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seconds: dict[tuple[int, float], float] = {}
        self.samples: list[tuple[float, float]] = []
        """(unix time, CPU seconds so far of every process ever seen)."""

    def look(self) -> None:
        """Take one sample. What a process used after its last look is lost, so look often."""
        with suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._seconds[(process.pid, process.create_time())] = times.user + times.system
        self.samples.append((time.time(), sum(self._seconds.values())))


def run_system(config: PPOConfig, *, environment: Mapping[str, str], cores: int) -> SystemRun:
    """One `r3hf ppo`; its folder keeps the records and loses the models.

    Raises:
        RunFailed: it did not exit with 0; the message names its log.
    """
    folder = (config.run.folder / config.run.name).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    job, log = folder.with_suffix(".toml"), folder.with_suffix(".txt")
    job.write_text(to_toml(config))
    command = [sys.executable, "-m", "r3hf_ray.cli", "ppo", str(job)]
    started = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
        meter = CpuMeter(process.pid)
        try:
            while process.poll() is None:
                meter.look()
                time.sleep(SAMPLE_SECONDS)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # it then ends its Ray itself
                process.wait(STOP_SECONDS)
    if process.returncode:
        raise RunFailed(f"r3hf ppo {job} exited with {process.returncode}; see {log}")
    for heavy in ("checkpoints", "model"):
        shutil.rmtree(folder / heavy, ignore_errors=True)
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "time/step" in row]
    return measure(rows, meter.samples, started=started, cores=cores)


def measure(
    rows: Sequence[Mapping[str, Any]], samples: Sequence[tuple[float, float]], *, started: float, cores: int
) -> SystemRun:
    """From the rows of a run and its CPU samples to its numbers.

    The first step warms up. The last has nothing to overlap with at lag 1; it is left out when two others remain.

    Args:
        rows: of `metrics.jsonl`, in order, at least two.
        samples: (unix time, CPU seconds so far), between which is interpolated.
        started: unix time of the command.
        cores: that the run could use.
    """
    steady = rows[:-1] if len(rows) > 3 else rows
    times = [row["time"] for row in steady]
    seconds = np.diff(times).tolist()
    moments, used = np.array(samples).T
    begin, end = np.interp([times[0], times[-1]], moments, used).tolist()
    window = times[-1] - times[0]
    counted = steady[1:]
    return SystemRun(
        steps=seconds,
        cpu=(end - begin) / len(seconds),
        idle=1.0 - (end - begin) / (cores * window),
        first_step=rows[0]["time"] - started,
        stages=_stages(counted),
        tokens=statistics.fmean(row["rollout/response_length/mean"] for row in counted),
        staleness=statistics.fmean(row["async/staleness/mean"] for row in counted),
    )


def clean_environment() -> dict[str, str]:
    """The user's environment, without what would make a run join a cluster or bind its threads."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}


def _stages(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rest = [row["time/step"] - sum(row[name] for name in LEARNER_STAGES) for row in rows]
    parts = {name: statistics.median(row[name] for row in rows) for name in (*LEARNER_STAGES, *WORKER_STAGES)}
    return parts | {REST: statistics.median(rest)}
