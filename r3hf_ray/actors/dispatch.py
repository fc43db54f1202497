"""From requests to scored samples, whatever dies on the way: a group is generated, then scored, retried, quarantined.

A failure is never data. What failed is tried again elsewhere; an attempt counts against a sample only where it was
alone with the actor, or where the actor names it. After `rollout.max_attempts` it is quarantined and counted. The loss
of an actor or of an object is not the sample's fault.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from r3hf_ray.actors.fleet import Fleet
from r3hf_ray.actors.ledger import UNTRAINED, Ledger
from r3hf_ray.actors.members import Member, MemberLost, Work
from r3hf_ray.actors.sampler import broken
from r3hf_ray.errors import sentence_of
from r3hf_ray.types import GroupReport, Request, SampleGroup, TrajectoryInfo

LOST_ACTORS = 5
"""Actors that may die over a group among others before it goes alone, and over one sample alone before it is given up:
a death is a sample's fault only where it was alone with the actor every time."""


@dataclass(frozen=True, slots=True)
class ScoredRef:
    """One finished sample: what is known of it, and the ref of its `ScoredTrajectory`.

    Example: ``ScoredRef(TrajectoryInfo(prompt_id=130, ...), ObjectRef(...))``
    """

    info: TrajectoryInfo
    ref: Any


@dataclass(slots=True)
class Tally:
    """What it took to make a batch.

    Example: ``Tally(quarantined=0, retried=3, rollout_seconds=4.1, reward_seconds=1.2)``
    """

    quarantined: int = 0
    retried: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a group is made for.

    Example: ``Job(tally=Tally(), number=12, label="step 7", step=7)``
    """

    tally: Tally
    number: int
    """Of the group: lower ones go first, and `rollout.dispatch = fixed` goes by it."""
    label: str
    """For people."""
    step: int = UNTRAINED
    """Which the samples are for, from 1; left out for samples that are not trained on."""
    at_once: bool = False
    """It must not wait for room: later it would meet other weights."""


@dataclass(slots=True)
class _Unit:
    """Requests that go together, and what has happened to them."""

    requests: list[Request]
    alone: bool = False
    """They are suspected of breaking engines: nothing else may be with them."""
    deaths: int = 0
    avoid: Member | None = None


@dataclass(slots=True)
class _Scoring:
    """How far the scoring of a group has come."""

    asked: dict[tuple[int, int], Request]
    samples: list[ScoredRef] = field(default_factory=list)
    lost: list[Request] = field(default_factory=list)
    deaths: Counter[tuple[tuple[int, int], int]] = field(default_factory=Counter)
    """Actors that died over a part: by its first key, and its size."""
    avoid: Member | None = None


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The only place that submits work to rollout and reward actors."""

    fleet: Fleet
    max_attempts: int
    ledger: Ledger

    async def scored(self, job: Job, requests: list[Request]) -> list[ScoredRef]:
        """The samples of one group, scored; those that are quarantined are not among them."""
        units, samples = [_Unit(requests)], list[ScoredRef]()
        while units:
            unit = units.pop(0)
            made, again = await self._generated(job, unit)
            units += again
            if made:
                trajectories, report = made
                done, lost = await self._scored(job, unit.requests, trajectories, report)
                samples += done
                if lost:
                    units.append(_Unit(lost))
        return samples

    # ------------------------------------------------------------------ generation

    async def _generated(self, job: Job, unit: _Unit) -> tuple[tuple[Any, GroupReport] | None, list[_Unit]]:
        """Generate on one actor: the ref of the trajectories with their report, and what has to go again."""
        pool, requests = self.fleet.rollouts, unit.requests
        work = await pool.take(job.number, len(requests), alone=unit.alone, at_once=job.at_once, avoid=unit.avoid)
        self.ledger.dispatched(job.step, requests)
        self.fleet.timeline.now("rollout", f"generating responses of {job.label}")
        try:
            group = SampleGroup(number=work.number, requests=requests)
            trajectories, report = await self._made(work, work.member.handle.add.remote(group))
        except MemberLost as lost:
            return None, self._after_death(job, unit, str(lost))
        except asyncio.CancelledError:
            work.member.handle.abort.remote(work.number)
            raise
        finally:
            pool.done(work)
        unit.avoid = work.member
        if report.broken:
            return None, self._suspects(job, unit, report.broken)
        job.tally.rollout_seconds += report.seconds
        self.ledger.generated(job.step, report.infos)
        asked = {request.key: request for request in requests}
        failed = [(asked[(f.prompt_id, f.sample)], f.reason) for f in report.failures]
        again = [_Unit([request], avoid=work.member) for request in self._attempted(job, failed, "generate")]
        return ((trajectories, report) if report.infos else None), again

    def _suspects(self, job: Job, unit: _Unit, reason: str) -> list[_Unit]:
        """The engine broke while it held them: they go alone, then one by one, until it is known who breaks it."""
        if unit.alone and len(unit.requests) == 1:
            left = self._attempted(job, [(unit.requests[0], reason)], "generate")
            return [_Unit(left, alone=True, avoid=unit.avoid)] if left else []
        job.tally.retried += len(unit.requests)
        parts = [[request] for request in unit.requests] if unit.alone else [unit.requests]
        return [_Unit(part, alone=True, avoid=unit.avoid) for part in parts]

    def _after_death(self, job: Job, unit: _Unit, reason: str) -> list[_Unit]:
        """Their actor is gone: they go again as they are, and after too many deaths as suspects."""
        unit.deaths += 1
        if unit.alone and len(unit.requests) == 1:
            if unit.deaths > LOST_ACTORS:
                self._give_up(
                    job, unit.requests[0], "generate", f"{unit.deaths} actors died over it, the last: {reason}"
                )
                return []
        elif unit.alone or unit.deaths > LOST_ACTORS:
            return self._suspects(job, unit, reason)
        job.tally.retried += len(unit.requests)
        return [unit]

    # ------------------------------------------------------------------ scoring

    async def _scored(
        self, job: Job, requests: list[Request], trajectories: Any, report: GroupReport
    ) -> tuple[list[ScoredRef], list[Request]]:
        """Score what was generated, on whoever can; what is scored, and what is lost and must be generated again."""
        state = _Scoring({request.key: request for request in requests})
        parts = [[(info.prompt_id, info.sample) for info in report.infos]]
        while parts:
            parts += await self._score(job, state, trajectories, parts.pop(0))
        return state.samples, state.lost

    async def _score(
        self, job: Job, state: "_Scoring", trajectories: Any, keys: list[tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Score once; the parts that have to be scored again."""
        fleet, pool = self.fleet, self.fleet.rewards
        work = await pool.take(job.number, len(keys), avoid=state.avoid)
        state.avoid = work.member
        fleet.timeline.now("reward", f"scoring responses of {job.label}")
        *refs, answer = work.member.handle.score.options(num_returns=len(keys) + 1).remote(trajectories, keys)
        try:
            judged: GroupReport = await self._answered(work, answer)
        except MemberLost as error:
            return self._scorer_died(job, state, keys, str(error))
        except RayError as error:
            if _is_loss(error):
                job.tally.retried += len(keys)
                state.lost += [state.asked[key] for key in keys]
                return []
            fleet.failed(work, sentence_of(error))
            if len(keys) == 1:
                return self._not_scored(job, state, [(keys[0], sentence_of(error))])
            job.tally.retried += len(keys)
            return [[key] for key in keys]
        finally:
            pool.done(work)
        state.avoid, work.member.failures = None, 0
        job.tally.reward_seconds += judged.seconds
        self.ledger.scored(job.step, judged.infos)
        by_key = dict(zip(keys, refs, strict=True))
        state.samples += [ScoredRef(info, by_key[(info.prompt_id, info.sample)]) for info in judged.infos]
        return self._not_scored(job, state, [((f.prompt_id, f.sample), f.reason) for f in judged.failures])

    def _not_scored(
        self, job: Job, state: "_Scoring", failed: list[tuple[tuple[int, int], str]]
    ) -> list[list[tuple[int, int]]]:
        left = self._attempted(job, [(state.asked[key], reason) for key, reason in failed], "score")
        state.asked |= {request.key: request for request in left}
        return [[request.key] for request in left]

    def _scorer_died(
        self, job: Job, state: "_Scoring", keys: list[tuple[int, int]], reason: str
    ) -> list[list[tuple[int, int]]]:
        state.deaths[(keys[0], len(keys))] += 1
        too_many = state.deaths[(keys[0], len(keys))] > LOST_ACTORS
        if too_many and len(keys) == 1:
            self._give_up(
                job, state.asked[keys[0]], "score", f"{LOST_ACTORS + 1} actors died over it, the last: {reason}"
            )
            return []
        job.tally.retried += len(keys)
        return [[key] for key in keys] if too_many else [keys]

    # ------------------------------------------------------------------ answers

    async def _answered(self, work: Work, answer: Any) -> Any:
        """What a member answers to a call.

        Raises:
            MemberLost: the member is gone, or has not answered when it was asked.
            RayError: the call failed, and the member lives.
        """
        waiting = asyncio.ensure_future(answer)
        try:
            await asyncio.wait({waiting, work.answer}, return_when=asyncio.FIRST_COMPLETED)
            return work.answer.result() if work.answer.done() else waiting.result()
        except RayActorError as error:
            self.fleet.lost(work.member, sentence_of(error), work.life)
            raise MemberLost(sentence_of(error)) from error
        finally:
            waiting.cancel()

    async def _made(self, work: Work, sent: Any) -> tuple[Any, GroupReport]:
        """What a sampler makes of a group, once its stream brings it.

        Raises:
            MemberLost: the member is gone, or has handed it back.
        """
        try:
            await self._answered(work, sent)
        except RayTaskError as error:  # the call never reached the engine
            return None, broken(work.number, sentence_of(error))[1]
        made: tuple[Any, GroupReport] = await work.answer
        return made

    # ------------------------------------------------------------------ attempts

    def _attempted(self, job: Job, failed: list[tuple[Request, str]], call: str) -> list[Request]:
        """Count an attempt at each; those that may be tried again, while the others are quarantined."""
        left = []
        for request, reason in failed:
            if request.attempt + 1 < self.max_attempts:
                left.append(replace(request, attempt=request.attempt + 1))
            else:
                self._give_up(job, request, call, reason)
        job.tally.retried += len(left)
        return left

    def _give_up(self, job: Job, request: Request, call: str, reason: str) -> None:
        facts = {"row": request.row, "sample": request.sample, "call": call, "reason": reason}
        self.fleet.timeline.add("quarantined", prompt_id=request.prompt_id, **facts)
        self.ledger.quarantined(job.step, [request])
        job.tally.quarantined += 1


def _is_loss(error: RayError) -> bool:
    """Whether what the call was to read is gone, with the host that held it."""
    return isinstance(error, ObjectLostError) or (
        isinstance(error, RayTaskError) and isinstance(error.cause, ObjectLostError)
    )
