"""cluster/slurm: the script runs against stand-ins for Slurm, Ray and r3hf; what it leaves, says and asks for again."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "r3hf.sbatch"
PATIENCE = 60.0
"""For anything here to happen. [s]"""

STAND_INS = {
    # Runs what it is given here, as a step on another node would; its options are noted.
    "srun": """
        echo "$*" >>srun.log
        while [ "$1" != ray ]; do shift; done
        exec "$@"
    """,
    "scontrol": """
        echo "$*" >>scontrol.log
        [ "$1" != show ] || printf 'node1\\nnode2\\n'
    """,
    "hostname": "echo 10.1.2.3 10.9.9.9",
    "ray": """
        [ "$1" = start ] || { [ -e head.pid ]; exit; }
        case "$*" in *--head*) name=head ;; *) name=worker ;; esac
        [ ! -e "no-$name" ] || exit 1
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >token.mode
        echo $$ >$name.pid
        exec sleep 300
    """,
    "sleep": 'case "$1" in 300) exec /bin/sleep 300 ;; *) exec /bin/sleep 0.1 ;; esac',
}
R3HF = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
def stop(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
pathlib.Path("r3hf.json").write_text(json.dumps({{"argv": sys.argv[1:], "address": os.environ["RAY_ADDRESS"]}}))
try:
    while not (end := pathlib.Path("end-with")).exists():
        time.sleep(0.05)
    sys.exit(int(end.read_text()))
except KeyboardInterrupt:
    pathlib.Path("saved").touch()
    sys.exit(0 if pathlib.Path("last-step").exists() else 143)
"""
"""Like the real one as far as the script goes: SIGTERM lets it save, and ends it with 143; it notes how it began."""
FAKE_RAY = """
from pathlib import Path
def init(**options): pass
def nodes(): return [{"Alive": Path(f"{name}.pid").exists()} for name in ("head", "worker")]
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """A running batch script."""

    folder: Path
    process: subprocess.Popen[str]

    def wait_for(self, name: str) -> Path:
        until = time.monotonic() + PATIENCE
        while not (self.folder / name).exists():
            assert time.monotonic() < until and self.process.poll() is None, f"no {name}: {self.process.returncode}"
            time.sleep(0.05)
        return self.folder / name

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output

    def log(self, name: str) -> str:
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def left_over(self) -> list[str]:
        """Steps that still run, and the token if it is still there."""
        pids = {name: int(self.log(f"{name}.pid") or 0) for name in ("head", "worker")}
        until = time.monotonic() + 5
        while (running := [name for name, pid in pids.items() if pid and _runs(pid)]) and time.monotonic() < until:
            time.sleep(0.05)
        return running + [path.name for path in self.folder.glob(".ray_token*")]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def batch(folder: Path, *arguments: str) -> Iterator[Batch]:
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, body in (STAND_INS | {"r3hf": R3HF}).items():
        (tools / name).write_text(body if body.startswith("#!") else "#!/bin/bash\n" + dedent(body))
        (tools / name).chmod(stat.S_IRWXU)
    (tools / "python").symlink_to(sys.executable)
    (tools / "activate").write_text(f"export PATH={tools}:$PATH\n")
    (folder / "ray.py").write_text(FAKE_RAY)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "8"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"SLURMD_NODENAME": "node1", "PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    try:
        yield Batch(folder, process)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if _runs(process.pid) else []
        for pid in [
            process.pid,
            *(child.pid for child in children),
            *(int(path.read_text()) for path in folder.glob("*.pid")),
        ]:
            if _runs(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE)


def test_a_finished_run_ends_everything(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml", "--ppo.steps", "3") as job:
        job.wait_for("r3hf.json")
        (tmp_path / "end-with").write_text("0")
        code, output = job.end()
        assert code == 0, output
        assert job.left_over() == []
        started = job.log("r3hf.json")
        assert '["ppo", "jobs/x.toml", "--resume", "--ppo.steps", "3"]' in started
        assert '"address": "10.1.2.3:6379"' in started
        assert "requeue" not in job.log("scontrol.log")


def test_the_head_runs_beside_the_driver_and_workers_on_the_other_nodes(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        (tmp_path / "end-with").write_text("0")
        job.end()
        head, worker = job.log("srun.log").splitlines()
        assert "-w node1" in head and "--head" in head and "--dashboard-host=127.0.0.1" in head
        assert "-w node2" in worker and "--address=10.1.2.3:6379" in worker
        assert all("--overlap" in step for step in (head, worker))


def test_the_token_is_in_a_file_of_its_owner_and_on_no_command_line(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        token = (tmp_path / ".ray_token_7").read_text().strip()
        assert re.fullmatch("[0-9a-f]{64}", token)
        assert job.log("token.mode") == "600\n"
        (tmp_path / "end-with").write_text("0")
        _, output = job.end()
        assert token not in job.log("srun.log") + job.log("scontrol.log") + job.log("r3hf.json") + output


def test_a_failed_run_fails_the_job_and_is_not_queued_again(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        (tmp_path / "end-with").write_text("2")
        assert job.end()[0] == 2
        assert job.left_over() == []
        assert "requeue" not in job.log("scontrol.log")


def test_before_the_time_limit_it_stops_and_queues_itself_again(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        job.process.send_signal(signal.SIGUSR1)
        code, output = job.end()
        assert code == 0 and "time limit" in output
        assert (tmp_path / "saved").exists(), "the driver saves and closes its records"
        assert job.left_over() == []
        assert "requeue 7" in job.log("scontrol.log").splitlines()


def test_a_run_that_finishes_within_the_last_minutes_is_not_queued_again(tmp_path: Path) -> None:
    (tmp_path / "last-step").touch()
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        job.process.send_signal(signal.SIGUSR1)
        assert job.end()[0] == 0
        assert (tmp_path / "saved").exists() and "requeue" not in job.log("scontrol.log")


def test_a_preempted_job_stops_and_leaves_queueing_to_slurm(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        job.process.send_signal(signal.SIGTERM)
        code, output = job.end()
        assert code == 143 and "preempted" in output
        assert (tmp_path / "saved").exists()
        assert job.left_over() == [] and "requeue" not in job.log("scontrol.log")


def test_a_head_that_is_gone_ends_the_job(tmp_path: Path) -> None:
    with batch(tmp_path, "jobs/x.toml") as job:
        job.wait_for("r3hf.json")
        os.kill(int(job.log("head.pid")), signal.SIGKILL)
        code, output = job.end()
        assert code == 1 and "the head on node1 is gone" in output
        assert job.left_over() == []


def test_a_head_that_does_not_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "no-head").touch()
    with batch(tmp_path, "jobs/x.toml") as job:
        code, output = job.end()
        assert code == 1 and "the head did not start on node1" in output
        assert job.left_over() == []


def test_without_a_job_it_says_how_it_is_called(tmp_path: Path) -> None:
    with batch(tmp_path) as job:
        code, output = job.end()
        assert code != 0 and "usage: sbatch" in output


@pytest.mark.parametrize(
    "option", ["gpus-per-node", "cpus-per-task", "mem", "time", "requeue", "signal=B:USR1@", "open-mode=append"]
)
def test_what_it_asks_slurm_for(option: str) -> None:
    header = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert [line for line in header if line.startswith(f"#SBATCH --{option}")]
