"""Where every actor of a run is and what it wrote, from anywhere in the cluster (layer 4).

Ray keeps a process's output on its node, in files named after its pid. The driver writes down who is where (`placed` in
events.jsonl); whoever reads sends a small task to that node, since a dashboard need not be there.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r3hf_ray.errors import ConfigError, RunFailed, sentence_of
from r3hf_ray.records.jsonl import read_jsonl

LAST_LINES, READ_SECONDS, STACK_SECONDS, FOLLOW_SECONDS = 50, 10.0, 30.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an actor is, or was.

    Example: ``Place(actor="rollout 0", node="f2fc67...", host="gpu-3", pid=9745, logs="/tmp/ray/session_.../logs")``
    """

    actor: str
    node: str
    """Ray's id of the node."""
    host: str
    pid: int
    logs: str
    """Folder on that node; its files are ``worker-*-PID.out`` and ``.err``."""


class Places:
    """What the driver knows of its actors' places; named actors are in Ray's table, ranks tell their own."""

    def __init__(self) -> None:
        """Nobody is known yet."""
        self._known: dict[str, Place] = {}

    def new(self) -> list[Place]:
        """Named actors that came, or came again, since the last call."""
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        table = state.actors(job_id=job, actor_state_name="ALIVE").values()
        return [
            place
            for actor in sorted(table, key=lambda actor: actor["StartTime"])
            if actor["Name"] and (place := self.note(actor["Name"], actor["Address"]["NodeID"], actor["Pid"]))
        ]

    def note(self, actor: str, node: str, pid: int) -> Place | None:
        """Take down where an actor is; None where that is known."""
        known = self._known.get(actor)
        if known and (known.node, known.pid) == (node, pid):
            return None
        here = next((each for each in ray.nodes() if each["NodeID"] == node), None)
        if here is None:
            return None
        logs = Path(here["ObjectStoreSocketName"]).parent.parent / "logs"
        place = Place(actor=actor, node=node, host=here["NodeManagerHostname"], pid=pid, logs=str(logs))
        self._known[actor] = place
        return place

    def last_lines(self, actors: Sequence[str]) -> dict[str, list[str]]:
        """The end of what actors wrote, as far as their nodes answer within ten seconds."""
        asked = {
            actor: _on(place).remote(place.logs, place.pid) for actor in actors if (place := self._known.get(actor))
        }
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=READ_SECONDS) if asked else ([], [])
        found = {}
        for actor, ref in asked.items():
            try:
                found[actor] = ray.get(ref) if ref in ready else ["(its node does not answer)"]
            except RayError as error:
                found[actor] = [f"(its node is gone: {sentence_of(error)})"]
        return found


def place_of(folder: Path, member: str) -> Place:
    """Where a member of a run was last, by the run's events.

    Args:
        folder: of the run.
        member: `rollout-3`, `rollout 3`, `rank 0`, `coordinator`, ...

    Raises:
        ConfigError: the run never had such a member.
    """
    events = [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == "placed"]
    named = {event["actor"]: event for event in events}
    wanted = member.replace("-", " ").replace("_", " ")
    found = [event for name, event in named.items() if name.replace("_", " ") == wanted]
    if not found:
        raise ConfigError(f"{member}: no such member in {folder}; it has {', '.join(sorted(named)) or 'none so far'}")
    return Place(**{name: found[0][name] for name in ("actor", "node", "host", "pid", "logs")})


def written(place: Place, *, follow: bool) -> Iterator[str]:
    """What a member wrote, line by line; Ray must be initialised where it is on another node.

    Raises:
        RunFailed: its node is gone, or does not answer.
    """
    seen = 0
    while True:
        lines = _ask(_on(place).remote(place.logs, place.pid, None), place)
        yield from lines[seen:]
        seen = len(lines)
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


def stack(place: Place) -> str:
    """What every thread of a member does now, by py-spy on its node.

    Raises:
        RunFailed: its node has no py-spy, or the process may not be looked into.
    """
    return str(_ask(_on(place, _stack).remote(place.pid), place, seconds=STACK_SECONDS))


def read_output(logs: str, pid: int, last: int | None = LAST_LINES) -> list[str]:
    """The lines that a process wrote to stdout and stderr, of each file the last ones where a number is given."""
    lines = []
    for path in sorted(Path(logs).glob(f"worker-*-{pid}.*")):
        own = path.read_text(errors="replace").splitlines()
        lines += [line for line in own if not line.startswith((":actor_name:", ":job_id:"))][-(last or len(own)) :]
    return lines


def _stack(pid: int) -> str:
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        raise RunFailed("py-spy is not installed on its node: pip install py-spy")
    done = subprocess.run([spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=STACK_SECONDS)
    if done.returncode:
        raise RunFailed(f"py-spy cannot look into process {pid}: {done.stderr.strip()}")
    return done.stdout


def _on(place: Place, function: Any = read_output) -> Any:
    """A function as a task on the member's node."""
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)


def _ask(ref: Any, place: Place, *, seconds: float = READ_SECONDS * 3) -> Any:
    try:
        return ray.get(ref, timeout=seconds)
    except RayError as error:
        raise RunFailed(f"{place.actor} on host {place.host} (pid {place.pid}): {sentence_of(error)}") from None
