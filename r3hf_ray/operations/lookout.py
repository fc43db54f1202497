"""What the driver notes beside the run itself: who is where, what a lost actor wrote, and what a slow step waits for.

(Layer 4.)
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from r3hf_ray.operations.logs import Places
from r3hf_ray.operations.paragraph import paragraph
from r3hf_ray.operations.standing import RECENT, ask, standing, step_seconds, usual_seconds
from r3hf_ray.records.metrics import read_metrics

LOOK_SECONDS = 5.0
SLOW, SLOW_SECONDS, AGAIN_SECONDS = 5.0, 60.0, 300.0
"""A step of so many times the usual seconds, and at least so many, is slow; said again after so many. [s]"""


class Lookout:
    """Looks every few seconds; costs nothing in between."""

    def __init__(self, folder: Path, namespace: str) -> None:
        """Of the run in a folder, whose named actors are in a namespace."""
        self._folder, self._namespace = folder, namespace
        self._places, self._slow, self._next = Places(), Slowness(), 0.0
        self._seconds = deque(step_seconds(read_metrics(folder)), maxlen=RECENT)  # of a resumed run

    def told(self, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Events, a rank's with the place of its output, and a lost actor's with the last lines that it wrote."""
        lost = [event["actor"] for event in events if event["event"] == "failure" and "actor" in event]
        wrote, told = self._places.last_lines(lost), []
        for event in events:
            more: dict[str, Any] = {}
            if event["event"] == "placed":
                place = self._places.note(event["actor"], event["node"], event["pid"])
                more = asdict(place) if place else {}
            elif event.get("actor") in wrote:
                more = {"log": wrote[event["actor"]]}
            told.append(dict(event) | more)
        return told

    def step_done(self, row: Mapping[str, float]) -> None:
        """Take down how long a step took, from its row of metrics."""
        self._seconds.extend(step_seconds([row]))

    def look(self, step: int) -> tuple[list[dict[str, Any]], str]:
        """Events of actors that came, and what to say of a run that is slow after so many steps: mostly nothing."""
        if time.monotonic() < self._next:
            return [], ""
        self._next = time.monotonic() + LOOK_SECONDS
        came = [{"event": "placed", **asdict(place)} for place in self._places.new()]
        if not self._slow.is_due(step, usual_seconds(self._seconds)):
            return came, ""
        live = ask(self._namespace, ray.get_runtime_context().get_job_id())
        return came, paragraph(standing(self._folder, live=live))


class Slowness:
    """Tells when a run takes so long that it should say what it waits for."""

    def __init__(self) -> None:
        """The clock starts now."""
        self._step, self._since, self._said = -1, time.monotonic(), -AGAIN_SECONDS

    def is_due(self, step: int, usual: float | None) -> bool:
        """Whether to say it now: five times the usual time went by, or a minute of the start; then every five minutes.

        Args:
            step: steps done.
            usual: seconds a step, where one was done.
        """
        now = time.monotonic()
        if step != self._step:
            self._step, self._since, self._said = step, now, -AGAIN_SECONDS
        if now - self._since < max(SLOW_SECONDS, SLOW * (usual or 0.0)) or now - self._said < AGAIN_SECONDS:
            return False
        self._said = now
        return True
