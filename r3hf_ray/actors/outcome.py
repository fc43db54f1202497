"""How a run stands: whether it has failed, what happened, and what each kind of actor does now."""

import asyncio
import time
from typing import Any, NoReturn

from r3hf_ray.errors import RunFailed, sentence_of


class Timeline:
    """What happened, and what each kind of actor does now: for the driver to write and show."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._doing: dict[str, tuple[str, float]] = {}

    def add(self, kind: str, **fields: Any) -> None:
        """Record an event."""
        self.events.append({"time": time.time(), "event": kind, **fields})

    def last_quarantine(self) -> str:
        """Why a sample was given up last, as the end of a sentence."""
        reasons = [event["reason"] for event in self.events if event["event"] == "quarantined"]
        return f"the last reason: {reasons[-1]}" if reasons else "see events.jsonl"

    def now(self, name: str, text: str) -> None:
        """What ``name`` (`rollout`, `learner`) does from now on."""
        if self._doing.get(name, ("", 0.0))[0] != text:
            self._doing[name] = (text, time.time())

    def doing(self) -> dict[str, str]:
        """Each one's words, with the seconds since it began."""
        now = time.time()
        return {name: f"{text} ({now - since:.0f} s)" for name, (text, since) in self._doing.items()}


class Outcome:
    """Whether the run has failed. Whoever waits, waits for this too, so that nobody hangs on a run that is over."""

    def __init__(self, timeline: Timeline) -> None:
        self.sentence: str | None = None
        self._happened = asyncio.Event()
        self._timeline = timeline

    def fail(self, sentence: str) -> NoReturn:
        """End the run; the first reason stands."""
        if self.sentence is None:
            self.sentence = sentence
            self._timeline.add("failed", reason=sentence)
            self._happened.set()
        raise RunFailed(self.sentence)

    def check(self) -> None:
        """Raise `RunFailed` if the run is over."""
        if self.sentence is not None:
            raise RunFailed(self.sentence)

    async def or_failure(self, waiting: Any) -> None:
        """Wait for something, but not past the end of the run."""
        ours, failure = asyncio.ensure_future(waiting), asyncio.ensure_future(self._happened.wait())
        try:
            await asyncio.wait({ours, failure}, return_when=asyncio.FIRST_COMPLETED)
            self.check()
        finally:
            failure.cancel()
            ours.cancel()

    async def guard(self, work: Any) -> Any:
        """A background task that breaks ends the run with its reason, instead of leaving everybody waiting."""
        try:
            return await work
        except (asyncio.CancelledError, RunFailed):
            raise
        except BaseException as error:
            if self.sentence is None:
                self.fail(f"the coordinator broke: {type(error).__name__}: {sentence_of(error)}")
            raise
