"""The Ray instance of a command: joined, or started for it and ended with it (floor 4)."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import state
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import AuthenticationError

from r3hf_ray.errors import ConfigError, RunFailed, Terminated, sentence_of

REACH_SECONDS = 10.0
"""How long a cluster may take to accept a connection. [s]"""


@contextmanager
def ray_session(cpus: float | None) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start a Ray instance for this command.

    An instance that is already initialised is used as it is, so several commands' work can share one.

    Raises:
        ConfigError: the cluster cannot be joined.
        RunFailed: no instance of its own came up.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        if address is not None:
            require_answer(address)
            options = {}
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True, **options)
    except (OSError, AuthenticationError) as error:  # Ray's own is a ConnectionError
        where = "" if address is None else f"RAY_ADDRESS: cannot join the cluster at {address}: "
        raise ConfigError(f"{where}{sentence_of(error)}") from error
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


def require_answer(address: str) -> None:
    """See that something listens at ``host:port``: Ray would wait for a cluster that is gone for ten minutes, silently.

    Raises:
        OSError: nothing does within 10 s.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
