"""The Ray instance of a command: joined, or started for it and ended with it (floor 4)."""

import json
import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import AuthenticationError

from r3hf_ray.errors import ConfigError, RunFailed, Terminated, sentence_of

ENV_FILE = "R3HF_ENV_FILE"
"""Variable that names a file of `NAME=VALUE` lines on every node: keys, which are thus in nothing that Ray stores."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's variable: how long a submitted job may take to end before it is killed, 3 s where it is not set."""
TOKEN_HINT = "; if it asks for a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
REACH_SECONDS = 10.0
"""How long a cluster may take to accept a connection. [s]"""


@contextmanager
def ray_session(cpus: float | None, address: str | None = None) -> Iterator[None]:
    """Join a cluster, the one that RAY_ADDRESS names (`ray job submit` sets it), or start a Ray for this command.

    An instance that is already initialised is used as it is, so several commands' work can share one.

    Raises:
        ConfigError: the cluster cannot be joined.
        RunFailed: no instance of its own came up.
    """
    if ray.is_initialized():
        yield
        return
    if not read_env_file():
        raise ConfigError(
            f"--env-file: {os.environ[ENV_FILE]} cannot be read on host {platform.node()}: it is read there"
        )
    told = f"live.json: the run's cluster at {address} cannot be joined: " if address else ""
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        if address is not None:
            require_answer(address)
            options = {"address": address}
            logging.getLogger("ray").setLevel(logging.ERROR)
            # A Ray that was started here has a token in the home folder; without this, Ray sends none.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True, **options)
    except (OSError, AuthenticationError) as error:  # Ray's own is a ConnectionError
        where = told or ("" if address is None else f"RAY_ADDRESS: cannot join the cluster at {address}: ")
        hint = "" if address is None or os.environ.get("RAY_AUTH_MODE") == "token" else TOKEN_HINT
        raise ConfigError(f"{where}{sentence_of(error)}{hint}") from error
    except Exception as error:  # the start of a local one that takes too long is a bare Exception
        raise RunFailed(
            f"Ray did not start: {sentence_of(error)}; is the machine overloaded, or its disk or memory full?"
        ) from error
    previous = _on_sigterm()  # after Ray's start, which installs a handler of its own
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def read_env_file() -> bool:
    """Take the variables of R3HF_ENV_FILE that are not set yet; False where it cannot be read.

    Ray calls it in each worker process of a job that was submitted with `--env-file`.
    """
    if not (name := os.environ.get(ENV_FILE)):
        return True
    try:
        lines = Path(name).read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not key.startswith("#"):
            os.environ.setdefault(key.strip(), value.strip().strip("\"'"))
    return True


def driver_facts() -> dict[str, str]:
    """What a lease says of this driver: Ray's job id, session and address, and the name it was submitted under."""
    context = ray.get_runtime_context()
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("metadata", {})
    return {
        "job": context.get_job_id(),
        "session": context.get_session_name(),
        "address": context.gcs_address,
        "submission": submitted.get("job_submission_id", ""),
    }


def job_ended(job: str, session: str) -> bool:
    """Whether this cluster knows that a driver's job is over."""
    if session != ray.get_runtime_context().get_session_name():
        return False
    return all(entry["IsDead"] for entry in state.jobs() if entry["JobID"] == job)


def _on_sigterm() -> Any:
    """Let SIGTERM end the command as Ctrl-C does; returns the handler before, None outside the main thread."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, end)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """While inside, the first SIGTERM is only noted (ask the function that is given); the second one ends at once."""
    noted = threading.Event()

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise Terminated
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def seconds_to_end(wished: float) -> float:
    """How long this process may take to end after SIGTERM: as wished, or less where `ray job stop` kills sooner. [s]"""
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:
        return wished
    return min(wished, float(os.environ.get(STOP_WAIT, 3)) - 5.0)


def require_answer(address: str) -> None:
    """See that something listens at ``host:port``: Ray would wait for a cluster that is gone for ten minutes, silently.

    Raises:
        OSError: nothing does within 10 s.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
