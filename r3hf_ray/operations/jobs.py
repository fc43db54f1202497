"""Jobs on a cluster through Ray's job server: submitted, followed, listed, ended; and commands sent there (layer 4).

A job is called after its run. The machine that submits needs nothing but the address of the job server (port 8265) and
the token: `r3hf status NAME` from there runs as a small job of its own on the cluster, beside the run's folder.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobInfo, JobStatus, JobSubmissionClient

from r3hf_ray.errors import ConfigError, RunFailed, sentence_of
from r3hf_ray.operations.package import KEYS
from r3hf_ray.session import ENV_FILE, STOP_WAIT, require_answer

Show = Callable[[str], None]
STOPPED = 143
"""Exit code of what was ended by SIGTERM."""
POLL_SECONDS, START_SECONDS, STOP_SECONDS = 0.5, 600.0, 150
"""Between two looks; until a driver starts (packages are made ready first); until one that is ended is killed. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is sent to a cluster.

    Example: ``Submission(run="hh", command="ppo", words=("jobs/hh.toml", "--resume"), root="/runs/hh", folder=Path())``
    """

    run: str
    """Name of the run, and of the job as far as it is free."""
    command: str
    words: tuple[str, ...]
    """What stands behind `r3hf COMMAND`."""
    root: str = ""
    """The run's folder on the cluster."""
    folder: Path
    """What is packed and sent along."""
    env_file: str = ""
    """A file on the nodes with keys."""

    @property
    def entrypoint(self) -> str:
        """What runs on the cluster."""
        return shlex.join(["python", "-m", "r3hf_ray.cli", self.command, *self.words])

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's, without the packing: no key is in it, since whoever reaches the cluster can read it."""
        variables = {STOP_WAIT: str(STOP_SECONDS)}
        hook = {}
        if self.env_file:
            variables[ENV_FILE] = self.env_file
            hook = {"worker_process_setup_hook": "r3hf_ray.session.read_env_file"}
        return {"env_vars": variables, "excludes": KEYS, **hook}


class Jobs:
    """The jobs of one cluster; every error of the server is a sentence."""

    def __init__(self, address: str | None) -> None:
        """``address`` of the job server; left out: RAY_API_SERVER_ADDRESS, or this machine's.

        Raises:
            ConfigError: nothing answers there, or it wants a token.
        """
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of each file that it leaves out
        how = "name the job server with --address http://HOST:8265 or RAY_API_SERVER_ADDRESS"
        try:
            require_answer(self.address)
            self._client = JobSubmissionClient(self.address)
        except AuthenticationError as error:
            raise ConfigError(
                f"{self.address}: {str(error).split(':')[0].lower()}; export RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) in this shell"
            ) from None
        except (OSError, RuntimeError, ValueError, requests.RequestException) as error:
            raise ConfigError(f"{self.address}: no job server answers ({sentence_of(error)}); {how}") from None

    def submit(self, submission: Submission, *, hidden: bool = False) -> str:
        """Send it and return its name: that of the run, with a number behind it where there was such a job.

        Raises:
            ConfigError: a job of this run is under way, or the server refuses.
        """
        taken = {job.submission_id: job for job in self._client.list_jobs()}
        running = [
            name
            for name, job in taken.items()
            if (job.metadata or {}).get("r3hf_run") == submission.run and not job.status.is_terminal()
        ]
        if running and not hidden:
            raise ConfigError(
                f"{submission.run}: {running[0]} is under way at {self.address}; r3hf status {running[0]} shows it, "
                f"r3hf stop {running[0]} ends it, and another run.name goes beside it"
            )
        numbers = (f"{submission.run}-{number}" for number in range(2, len(taken) + 3))
        name = next(name for name in [submission.run, *numbers] if name not in taken)
        told = {} if hidden else {"r3hf_run": submission.run, "r3hf_folder": submission.root}
        try:
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(submission.folder), **submission.runtime_env},
                metadata={**told, "r3hf_command": submission.command},
            )
        except (RuntimeError, ValueError, requests.RequestException) as error:
            raise ConfigError(f"{self.address}: refuses the job: {sentence_of(error)}") from None

    def list(self) -> list[JobDetails]:
        """Runs that were submitted, newest last."""
        jobs = [job for job in self._client.list_jobs() if "r3hf_run" in (job.metadata or {})]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def find(self, name: str) -> JobDetails:
        """The newest job of this name, or of the run of this name.

        Raises:
            ConfigError: there is none.
        """
        jobs = self.list()
        own = [job for job in jobs if job.submission_id == name or (job.metadata or {})["r3hf_run"] == name]
        if not own:
            there = ", ".join(str(job.submission_id) for job in jobs[-5:]) or "no run at all"
            raise ConfigError(f"{name}: no such run at {self.address}, which has {there}; r3hf jobs lists them")
        return own[-1]

    def follow(self, name: str, show: Show) -> int:
        """Show what a job prints until it ends; its exit code, 143 where it was stopped.

        Raises:
            RunFailed: its driver did not start within ten minutes, or the server is gone.
        """
        deadline, said = time.monotonic() + START_SECONDS, ""
        while (info := self._info(name)).status == JobStatus.PENDING:
            if time.monotonic() > deadline:
                raise RunFailed(f"{name}: did not start within {START_SECONDS:.0f} s: {info.message}")
            if info.message and info.message != said and said:
                show(f"{info.message}\n")
            said = info.message or ""
            time.sleep(POLL_SECONDS)
        shown = 0
        while True:
            shown = asyncio.run(self._tail(name, show, shown))
            info = self._info(name)
            if info.status.is_terminal():
                return _exit_code(info, show)
            time.sleep(POLL_SECONDS)

    def tail(self, name: str, show: Show, *, follow: bool) -> None:
        """Show what a job's driver printed, and go on with it until the job ends."""
        if follow and not self._info(name).status.is_terminal():
            self.follow(name, show)
        else:
            show(self._client.get_job_logs(name))

    def stop(self, name: str, show: Show) -> None:
        """End a job as SIGTERM does, which saves a checkpoint first; returns once it has ended.

        Raises:
            ConfigError: it is not running.
            RunFailed: it does not end.
        """
        if not self._client.stop_job(name):
            raise ConfigError(f"{name}: is not running ({self._info(name).status.value.lower()})")
        deadline = time.monotonic() + STOP_SECONDS + 30.0
        while not self._info(name).status.is_terminal():
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{name}: was told to end and has not within {STOP_SECONDS + 30} s: see r3hf logs {name}"
                )
            time.sleep(POLL_SECONDS)
        said = self._client.get_job_logs(name).splitlines()
        last = next((line for line in reversed(said) if line.startswith("stopped")), "it had not begun, or was killed")
        show(f"{name}: {last}\n")

    def relay(self, command: str, words: Sequence[str], folder: Path, show: Show) -> int:
        """Run a command on the cluster and show what it prints; Ctrl-C ends it there too."""
        submission = Submission(run=f"r3hf-{command}", command=command, words=tuple(words), folder=folder)
        name = self.submit(submission, hidden=True)
        try:
            return self.follow(name, show)
        except KeyboardInterrupt:
            self._client.stop_job(name)
            raise
        finally:
            with suppress(RuntimeError, requests.RequestException):  # one that still ends cannot be deleted yet
                self._client.delete_job(name)

    def _info(self, name: str) -> JobInfo:
        try:
            return self._client.get_job_info(name)
        except (RuntimeError, requests.RequestException) as error:
            raise RunFailed(f"{self.address}: {sentence_of(error)}") from None

    async def _tail(self, name: str, show: Show, shown: int) -> int:
        """Show what was not shown yet; a connection that breaks is made again, and begins at the first character."""
        seen = 0
        with suppress(RuntimeError, aiohttp.ClientError):
            async for text in self._client.tail_job_logs(name):
                seen += len(text)
                if seen > shown:
                    show(text[-(seen - shown) :])
                    shown = seen
        return shown


def described(job: JobDetails) -> Mapping[str, str]:
    """A job as a row of `r3hf jobs`."""
    metadata = job.metadata or {}
    began, ended = job.start_time or 0, job.end_time or time.time() * 1000
    code = "" if job.driver_exit_code is None else f" (exit code {job.driver_exit_code})"
    return {
        "job": str(job.submission_id),
        "command": metadata.get("r3hf_command", ""),
        "state": f"{job.status.value.lower()}{code}",
        "for": f"{(ended - began) / 60000:.1f} min" if began else "",
        "folder": metadata.get("r3hf_folder", ""),
    }


def _exit_code(info: JobInfo, show: Show) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    if info.driver_exit_code is None:
        show(f"failed: {info.message}\n")
    return info.driver_exit_code or 1
