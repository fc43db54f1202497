"""A real head with a token, a job server and ports of its own; it and all it started end with the tests."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PORT = 27100
"""First of a hundred; no other test uses them."""
URL, ADDRESS = f"http://127.0.0.1:{PORT + 1}", f"127.0.0.1:{PORT}"
"""Of the job server, and of the cluster itself."""
START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Head:
    """A cluster of one node and how its users reach it."""

    folder: Path
    environment: dict[str, str]
    """Of somebody who has the token."""

    @property
    def stranger(self) -> dict[str, str]:
        """The environment of somebody without a token."""
        return {name: value for name, value in self.environment.items() if not name.startswith("RAY_AUTH")}

    def popen(
        self, *words: str, environment: dict[str, str] | None = None, folder: Path = ROOT
    ) -> "subprocess.Popen[str]":
        """`r3hf WORDS`, as a user types it."""
        return subprocess.Popen(
            [sys.executable, "-m", "r3hf_ray.cli", *words],
            cwd=folder,
            env=environment or self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def r3hf(self, *words: str, environment: dict[str, str] | None = None, timeout: float = 240.0) -> tuple[int, str]:
        """The same to its end: exit code and what it said."""
        process = self.popen(*words, environment=environment)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            raise AssertionError(f"r3hf {' '.join(words)} still runs after {timeout:.0f} s: {said[-2000:]}") from None
        return process.returncode, said

    def ray(self, *words: str) -> str:
        """What `ray WORDS` says."""
        command = [str(Path(sys.executable).with_name("ray")), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of four CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="r3hf-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32) + "\n")
    (folder / "token").chmod(0o600)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_API_SERVER_ADDRESS": URL,
    }
    ports = {
        "port": 0, "dashboard-port": 1, "node-manager-port": 2, "object-manager-port": 3, "metrics-export-port": 4,
        "dashboard-agent-listen-port": 5, "dashboard-agent-grpc-port": 6, "runtime-env-agent-port": 7,
        "ray-client-server-port": 8, "min-worker-port": 20, "max-worker-port": 99,
    }  # fmt: skip
    words = (
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=4", f"--temp-dir={folder}/ray",
        *(f"--{name}={PORT + offset}" for name, offset in ports.items()),
    )  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        started = Head(folder, environment)
        deadline = time.monotonic() + START_SECONDS
        while started.r3hf("jobs")[0] != 0:
            said = (folder / "head.log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, f"the head did not start: {said[-2000:]}"
            time.sleep(0.5)
        yield started
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.terminate()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *family] if family else [], timeout=20.0)
        for each in alive:
            each.kill()
        process.wait(20.0)
        shutil.rmtree(folder, ignore_errors=True)
