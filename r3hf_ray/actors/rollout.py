"""Rollout actor: a sampler in a thread of its own, fed by one queue of commands; what it makes leaves by a stream.

The order of that queue is the lock: a `load_weights` submitted before an `add` is finished before it, and waits for the
groups that were added before it, so every trajectory has one `policy_version`. `abort` alone does not queue: it would
wait for what it is to end.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import ray

from r3hf_ray.actors.pulse import Pulse, pulse
from r3hf_ray.actors.sampler import Made, Sampler, broken
from r3hf_ray.errors import Caught, sentence_of
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.types import SampleGroup
from r3hf_ray.weights.contract import Loaded, Publication, TransferStep

GROUPS = {"commands": 1, "stream": 2, "health": 1}
"""Ray's concurrency groups of the actor, with their threads; a stream that is asked for ends the one before it."""


@dataclass(slots=True)
class _Command:
    call: Callable[[Any], Any]
    waits: bool
    """Until nothing is in the engine."""
    group: SampleGroup | None = None
    answer: "Future[Any]" = field(default_factory=Future)


class RolloutActor:
    """One sampler. `add` groups; each comes out of `stream` as two objects: its trajectories, then its report."""

    def __init__(
        self,
        section: RolloutSection,
        facts: EngineFacts,
        make: Callable[[RolloutSection, EngineFacts], Any] = Sampler,
    ) -> None:
        """Start the engine, in the thread that will step it."""
        self._one_by_one = section.dispatch == "fixed"
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._made: SimpleQueue[Made | None] = SimpleQueue()
        self._aborted: set[int] = set()
        self._progress = 0
        started: Future[None] = Future()
        threading.Thread(target=self._work, args=(started, section, facts, make), daemon=True, name="sampler").start()
        started.result()

    @ray.method(concurrency_group="health")
    def ping(self) -> Pulse:
        """Answer, once the engine stands."""
        return pulse(self._progress)

    @ray.method(concurrency_group="health")
    def abort(self, number: int) -> None:
        """Give up a group, whether it is in the engine, waits for it, or has not come yet."""
        self._aborted.add(number)

    @ray.method(concurrency_group="commands")
    def add(self, group: SampleGroup) -> None:
        """Sample a group, behind the commands before it; with ``rollout.dispatch = fixed`` alone in the engine."""
        self._commands.put(_Command(lambda sampler: sampler.add(group), self._one_by_one, group))

    @ray.method(concurrency_group="commands")
    def load_weights(self, publication: Publication) -> Loaded:
        """Load one published version once the groups before it have ended; the answer is what was loaded."""
        loaded: Loaded = self._queue(lambda sampler: sampler.load_weights(publication))
        return loaded

    @ray.method(concurrency_group="commands")
    def transfer(self, step: TransferStep, payload: dict[str, Any] | None) -> None:
        """One call of vLLM's weight-transfer interface, once the groups before it have ended."""
        self._queue(lambda sampler: sampler.transfer(step, payload))

    @ray.method(concurrency_group="stream")
    def stream(self) -> Iterator[Any]:
        """Yield, of every group that ends, its trajectories and then its report; until another stream is asked for."""
        self._aborted.clear()  # whoever gave something up before was another listener
        before, self._made = self._made, SimpleQueue()
        before.put(None)
        mine = self._made
        while made := mine.get():
            trajectories, report = made
            yield trajectories
            yield report

    def _queue(self, call: Callable[[Any], Any]) -> Any:
        command = _Command(call, waits=True)
        self._commands.put(command)
        return command.answer.result()

    # ------------------------------------------------------------------ the sampler's thread

    def _work(
        self,
        started: "Future[None]",
        section: RolloutSection,
        facts: EngineFacts,
        make: Callable[[RolloutSection, EngineFacts], Any],
    ) -> None:
        with Caught() as caught:
            sampler = make(section, facts)
        if caught.error:
            started.set_exception(caught.error)
            return
        started.set_result(None)
        waiting: deque[_Command] = deque()
        while True:
            self._collect(waiting, block=sampler.idle and not waiting)
            while waiting and (sampler.idle or not waiting[0].waits):
                self._do(sampler, waiting.popleft())
            if not sampler.idle:
                with Caught() as caught:
                    for made in sampler.step():
                        self._made.put(made)
                if caught.error:
                    for made in sampler.drop(sentence_of(caught.error)):
                        self._made.put(made)
            self._aborted -= {number for number in self._aborted if sampler.abort(number)}  # or it is still to come
            self._progress += 1

    def _collect(self, waiting: deque[_Command], *, block: bool) -> None:
        """Take what was sent in the meantime."""
        with Caught() as caught:
            if block:
                waiting.append(self._commands.get())
            while True:
                waiting.append(self._commands.get_nowait())
        if caught.error and not isinstance(caught.error, Empty):
            raise caught.error

    def _do(self, sampler: Any, command: _Command) -> None:
        if command.group and command.group.number in self._aborted:
            self._aborted.discard(command.group.number)
            return
        with Caught() as caught:
            answer = command.call(sampler)
        if caught.error is None:
            command.answer.set_result(answer)
        elif command.group:
            self._made.put(broken(command.group.number, sentence_of(caught.error)))
        else:
            command.answer.set_exception(caught.error)
