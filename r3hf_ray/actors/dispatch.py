"""From requests to scored samples, whatever dies on the way: a straight line of refs, retried, then quarantined.

A failure is never data. A sample whose generation or scoring failed is tried again on other actors; after
`rollout.max_attempts` it is quarantined and counted. The death of an actor is not the sample's fault and does not count
as an attempt; the actor is watched until Ray has restarted it, gets the latest weights, and works again.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ray.exceptions import RayActorError, RayError, RayTaskError

from r3hf_ray.actors.rollout import StaleWeightsError
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.types import ChunkReport, Failure, Request, TrajectoryInfo
from r3hf_ray.weights.contract import Loaded, Publication, objection

RECOVERY_SECONDS = 300.0
"""How long a dead actor may take to come back before the run gives up. [s]"""
LOST_ACTORS_A_CHUNK = 5
"""Actors that one chunk may lose before the run gives up: deaths are not the data's fault, but not endless either."""


class Verdict:
    """Whether the run has failed. Whoever waits, waits for this too, so that nobody hangs on a run that is over."""

    def __init__(self, events: "Events") -> None:
        self.sentence: str | None = None
        self._happened = asyncio.Event()
        self._events = events

    def fail(self, sentence: str) -> NoReturn:
        """End the run; the first reason stands."""
        if self.sentence is None:
            self.sentence = sentence
            self._events.add("failed", reason=sentence)
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


class Events:
    """What happened, and what each stage does now: for the driver to write and show."""

    def __init__(self) -> None:
        self.list: list[dict[str, Any]] = []
        self._stages: dict[str, tuple[str, float]] = {}

    def add(self, kind: str, **fields: Any) -> None:
        """Record an event."""
        self.list.append({"time": time.time(), "event": kind, **fields})

    def stage(self, name: str, text: str) -> None:
        """What a stage does from now on."""
        if self._stages.get(name, ("", 0.0))[0] != text:
            self._stages[name] = (text, time.time())

    def stages(self) -> dict[str, str]:
        """Each stage's words, with the seconds since it began."""
        now = time.time()
        return {name: f"{text} ({now - since:.0f} s)" for name, (text, since) in self._stages.items()}


@dataclass(slots=True)
class Member:
    """A rollout or reward actor as the coordinator sees it."""

    name: str
    handle: Any
    alive: bool = True
    needs_weights: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample: what is known of it, and the ref of the rest."""

    info: TrajectoryInfo
    ref: Any


@dataclass(slots=True)
class Tally:
    """What it took to make a batch."""

    quarantined: int = 0
    retried: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0


@dataclass(slots=True)
class Pipeline:
    """Rollout and reward actors, and the only place that submits work to them."""

    rollouts: list[Member]
    rewards: list[Member]
    max_attempts: int
    max_gap: float
    """Largest mean difference of the probe's logprobs that proves a load. [nats]"""
    events: Events
    verdict: Verdict
    latest: Publication | None = None
    """What a rollout actor that restarts must load."""
    came_back: asyncio.Event = field(default_factory=asyncio.Event)
    watches: set[asyncio.Task[Any]] = field(default_factory=set)
    """Recoveries of dead actors, and proofs of the loads that follow."""

    def load(self, member: Member) -> Any:
        """Submit the latest weights to a rollout actor; whatever is submitted to it later runs after them."""
        member.needs_weights = False
        return member.handle.load_weights.remote(self.latest)

    async def proven(self, member: Member, publication: Publication, load: Any) -> Loaded | None:
        """The answer to a load: it must show what was published, else the run ends. None if the actor died of it."""
        version = publication.version
        try:
            loaded: Loaded = await load
        except RayActorError as error:
            self.lost(member, error)
            return None
        except RayTaskError as error:
            self.verdict.fail(f"{member.name} could not load weights version {version}: {sentence_of(error)}")
        if wrong := objection(publication, loaded, max_gap=self.max_gap):
            self.verdict.fail(f"{member.name} {wrong}")
        return loaded

    async def scored(self, tally: Tally, number: int, requests: list[Request], label: str) -> AsyncIterator[Sample]:
        """Yield the samples of one chunk as they are scored; those that are quarantined never come.

        Args:
            tally: counts retries, quarantines and seconds.
            number: of the chunk; it starts at rollout actor ``number mod N`` and reward actor ``number mod M``.
            requests: of the chunk.
            label: of the work, for people.
        """
        queue, lost = [requests], 0
        while queue:
            group = queue.pop(0)
            samples, failures, died = await self._once(tally, number + group[0].attempt + lost, group, label)
            for sample in samples:
                yield sample
            lost += died
            if lost > LOST_ACTORS_A_CHUNK:
                self.verdict.fail(f"{lost} actors died while they worked on one chunk of {label}; see events.jsonl")
            if died:  # not the prompts' fault, so the group goes again as it is
                tally.retried += len(group)
                queue.append(group)
            else:
                queue += self._again(tally, group, failures)

    async def _once(
        self, tally: Tally, number: int, requests: list[Request], label: str
    ) -> tuple[list[Sample], list[Failure], int]:
        """Generate on one actor, score on another. Returns (samples, failures, actors lost)."""
        rollout, reward = await self._pick(self.rollouts, number), await self._pick(self.rewards, number)
        if rollout.needs_weights and self.latest:
            self._watch(self.proven(rollout, self.latest, self.load(rollout)))
        keys = [(request.prompt_id, request.sample) for request in requests]
        trajectories, generated = rollout.handle.generate.options(num_returns=2).remote(requests)
        *refs, scored = reward.handle.score.options(num_returns=len(keys) + 1).remote(trajectories, keys)
        self.events.stage("rollout", f"generating {len(requests)} responses of {label}")
        try:
            made: ChunkReport = await generated
            tally.rollout_seconds += made.seconds
        except RayError as error:
            return [], _failures(keys, "generate", error), self.lost(rollout, error)
        self.events.stage("reward", f"scoring {len(made.infos)} responses of {label}")
        try:
            judged: ChunkReport = await scored
            tally.reward_seconds += judged.seconds
        except RayError as error:
            return [], _failures(keys, "score", error), self.lost(reward, error)
        by_key = dict(zip(keys, refs, strict=True))
        samples = [Sample(info, by_key[(info.prompt_id, info.sample)]) for info in judged.infos]
        return samples, made.failures + judged.failures, 0

    def _again(self, tally: Tally, group: list[Request], failures: list[Failure]) -> Iterable[list[Request]]:
        """The groups to try again; what has failed for good is quarantined."""
        reasons = {(failure.prompt_id, failure.sample): failure for failure in failures}
        failed = [request for request in group if (request.prompt_id, request.sample) in reasons]
        again = [request for request in failed if request.attempt + 1 < self.max_attempts]
        for request in failed:
            if request not in again:
                failure = reasons[(request.prompt_id, request.sample)]
                facts = {"row": request.row, "sample": request.sample, "stage": failure.stage, "reason": failure.reason}
                self.events.add("quarantined", prompt_id=request.prompt_id, **facts)
        tally.quarantined += len(failed) - len(again)
        tally.retried += len(again)
        retries = [replace(request, attempt=request.attempt + 1) for request in again]
        if len(retries) == len(group) > 1 and group[0].attempt == 0 and self.max_attempts > 2:
            return [retries]  # the whole call failed: once more elsewhere, then one by one to find the poison
        return [[request] for request in retries]

    async def _pick(self, members: list[Member], number: int) -> Member:
        """Member `number` in turn, or the next one that is alive."""
        while True:
            for offset in range(len(members)):
                member = members[(number + offset) % len(members)]
                if member.alive:
                    return member
            self.came_back.clear()
            await self.verdict.or_failure(self.came_back.wait())

    def lost(self, member: Member, error: RayError) -> int:
        """1 if the actor is gone (it is then watched until it is back) or has no weights, 0 for an ordinary failure."""
        if isinstance(error, StaleWeightsError):
            member.needs_weights = True
            return 1
        if not isinstance(error, RayActorError):
            return 0
        if member.alive:
            member.alive = False
            self.events.add("failure", actor=member.name, reason=sentence_of(error))
            self._watch(self._recover(member))
        return 1

    def _watch(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(self.verdict.guard(work))
        self.watches.add(task)
        task.add_done_callback(self.watches.discard)

    async def _recover(self, member: Member) -> None:
        """Ask a dead actor until Ray has restarted it."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            try:
                await member.handle.ping.remote()
            except RayActorError:
                await asyncio.sleep(1.0)
                continue
            member.alive, member.needs_weights = True, member in self.rollouts
            self.events.add("recovered", actor=member.name)
            self.came_back.set()
            return
        self.verdict.fail(f"{member.name} did not come back within {RECOVERY_SECONDS:.0f} s; see events.jsonl")


def members(kind: str, handles: list[Any]) -> list[Member]:
    """Actors as members, named for people: `rollout 0`."""
    return [Member(f"{kind} {number}", handle) for number, handle in enumerate(handles)]


def _failures(keys: list[tuple[int, int]], stage: str, error: Exception) -> list[Failure]:
    reason = sentence_of(error)
    return [Failure(prompt_id=prompt_id, sample=sample, stage=stage, reason=reason) for prompt_id, sample in keys]
