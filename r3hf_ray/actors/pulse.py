"""What an actor answers when it is asked whether it lives."""

import os
from dataclasses import dataclass

import ray


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What an actor answers when it is asked whether it lives.

    Example: ``Pulse(node="5f3a...", pid=4711, progress=9032)``
    """

    node: str
    pid: int
    progress: int
    """Counts what it does: steps of the engine and commands, or scored groups. It stands where nothing moves."""


def pulse(progress: int) -> Pulse:
    """Of this process."""
    return Pulse(node=ray.get_runtime_context().get_node_id(), pid=os.getpid(), progress=progress)
