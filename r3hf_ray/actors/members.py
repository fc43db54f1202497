"""Members of the fleet, and who of them gets the next piece of work: the least loaded one that has room.

No Ray call is made here: a pool keeps the books.
"""

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush
from itertools import count
from typing import Any

from r3hf_ray.actors.pulse import Pulse


class MemberState(StrEnum):
    """How a member stands."""

    STARTING = "starting"
    """Its node, its process or its first weights are still to come."""
    READY = "ready"
    BUSY = "busy"
    SLOW = "slow"
    """It answers and gets on, and holds work for longer than its deadline."""
    DRAINING = "draining"
    """It gets no new work: `r3hf scale` lets it go, or its node is about to be taken away."""
    LOST = "lost"
    """It died or gave no answer, and is asked for until it is back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """A member, for people.

    Example: ``MemberInfo(name="rollout 1", kind="rollout", state=MemberState.BUSY, node="5f3a...", pid=4711, version=7,
    groups=2, requests=32, age=3.4, restarts=1, reason="no answer for 120 s (run.patience): it is started anew")``
    """

    name: str
    kind: str
    """`rollout` or `reward`."""
    state: MemberState
    node: str
    """Ray's id of its node; empty until it has answered."""
    pid: int
    version: int
    """Of the weights it has proven last; -1 where there are none, as for a reward actor."""
    groups: int
    """Groups that it holds."""
    requests: int
    """Responses in them."""
    age: float
    """Of the oldest of them. [s]"""
    restarts: int
    reason: str
    """Why it was lost last."""


class MemberLost(RuntimeError):
    """The member that held a piece of work is gone, or has handed it back."""


@dataclass(slots=True, eq=False)
class Work:
    """A group that a member holds."""

    number: int
    member: "Member"
    life: int
    size: int
    """Responses in it."""
    since: float
    answer: "asyncio.Future[Any]"


@dataclass(slots=True, eq=False)
class Member:
    """A rollout or reward actor as the coordinator sees it.

    Example: ``Member("rollout 0", "rollout", handle)``
    """

    name: str
    kind: str
    handle: Any
    serves: bool = False
    """It gets work: it has answered, and a sampler has proven the latest weights."""
    leaves: bool = False
    """It was asked to go, and gets no new work."""
    drained: bool = False
    """Its node is about to be taken away, and it gets no new work."""
    lost: bool = False
    slow: bool = False
    lives: int = 0
    """How often it has come; a call to an earlier life that fails late says nothing of this one."""
    failures: int = 0
    """Calls that failed in a row."""
    version: int = -1
    reason: str = ""
    held: dict[int, Work] = field(default_factory=dict)
    load: int = 0
    """Responses it holds."""
    taken: bool = False
    """It holds something that must be alone."""
    reserved: "Waiting | None" = None
    """Who gets it once it holds nothing."""
    pulse: Pulse | None = None
    moved: float = 0.0
    """When its progress was last seen to move, on the monotonic clock. [s]"""

    @property
    def age(self) -> float:
        """Of its oldest work. [s]"""
        return time.monotonic() - min((work.since for work in self.held.values()), default=time.monotonic())

    @property
    def info(self) -> MemberInfo:
        """For people."""
        states = [
            (self.lost, MemberState.LOST),
            (self.leaves or self.drained, MemberState.DRAINING),
            (not self.serves, MemberState.STARTING),
            (self.slow, MemberState.SLOW),
            (bool(self.held), MemberState.BUSY),
        ]
        return MemberInfo(
            name=self.name,
            kind=self.kind,
            state=next((state for holds, state in states if holds), MemberState.READY),
            node=self.pulse.node if self.pulse else "",
            pid=self.pulse.pid if self.pulse else 0,
            version=self.version,
            groups=len(self.held),
            requests=self.load,
            age=self.age,
            restarts=max(0, self.lives - (not self.lost)),
            reason=self.reason,
        )


@dataclass(slots=True, order=True)
class Waiting:
    """Somebody who waits for a member; the lowest order is served first."""

    order: tuple[int, int]
    size: int = field(compare=False)
    alone: bool = field(compare=False)
    at_once: bool = field(compare=False)
    avoid: Member | None = field(compare=False)
    work: "asyncio.Future[Work]" = field(compare=False)


class Pool:
    """The members of one kind."""

    def __init__(self, kind: str, room: int, *, fixed: bool = False, single: bool = False) -> None:
        """A pool without members.

        Args:
            kind: `rollout` or `reward`.
            room: what a member holds at most: responses, or groups where ``single``.
            fixed: group number mod members decides, not the load.
            single: groups are counted, not their responses.
        """
        self.kind, self.members, self._room = kind, list[Member](), room
        self._fixed, self._single = fixed, single
        self._queue: list[Waiting] = []
        self._count = count()

    @property
    def serving(self) -> list[Member]:
        """Members that get work."""
        return [member for member in self.members if member.serves and not (member.leaves or member.drained)]

    async def take(
        self, number: int, size: int, *, alone: bool = False, at_once: bool = False, avoid: Member | None = None
    ) -> Work:
        """A place at a member, once one has room.

        Args:
            number: of the group; lower ones are served first.
            size: responses in it.
            alone: the member must hold nothing else, and gets nothing else until the work is done.
            at_once: more than a member has room for is allowed: what is handed on later would meet other weights.
            avoid: who gets it only if there is no other: it has failed at it.
        """
        future: asyncio.Future[Work] = asyncio.get_running_loop().create_future()
        heappush(self._queue, Waiting((number, next(self._count)), size, alone, at_once, avoid, future))
        self.serve()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it was given in the same moment
                self.done(future.result())
            raise

    def done(self, work: Work) -> None:
        """The member no longer holds it."""
        member = work.member
        if member.held.pop(work.number, None):
            member.load -= work.size
            member.taken = member.slow = False
            self.serve()

    def lose(self, member: Member, reason: str) -> None:
        """Whatever a member holds goes back to those who wait for it."""
        member.serves = False
        held, member.held = member.held, {}
        member.load, member.taken, member.slow = 0, False, False
        if member.reserved:
            heappush(self._queue, member.reserved)
            member.reserved = None
        for work in held.values():
            if not work.answer.done():
                work.answer.set_exception(MemberLost(reason))
        self.serve()

    def serve(self) -> None:
        """Give work to whoever has room; called whenever something has changed."""
        for member in self.members:
            if member.reserved and not member.held:
                waiting, member.reserved = member.reserved, None
                self._give(waiting, member)
        left = []
        while self._queue:
            waiting = heappop(self._queue)
            if waiting.work.done():  # it was cancelled
                continue
            if fit := self._fit(waiting):
                self._give(waiting, fit)
            elif waiting.alone and (free := [m for m in self.serving if not m.reserved]):
                min(free, key=lambda m: m.load).reserved = waiting
            else:
                left.append(waiting)
                if not self._fixed:
                    break  # whoever comes behind does not overtake
        for waiting in left:
            heappush(self._queue, waiting)

    def _give(self, waiting: Waiting, member: Member) -> None:
        if waiting.work.done():
            return
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        work = Work(next(self._count), member, member.lives, waiting.size, time.monotonic(), answer)
        member.held[work.number] = work
        member.load += waiting.size
        member.taken = waiting.alone
        waiting.work.set_result(work)

    def _fit(self, waiting: Waiting) -> Member | None:
        free = [member for member in self.serving if self._has_room(member, waiting)]
        if self._fixed and not waiting.alone and self.members:
            chosen = self.members[waiting.order[0] % len(self.members)]
            if not chosen.lost and not chosen.leaves:
                return chosen if chosen in free else None
        best = [member for member in free if member is not waiting.avoid] or free
        return min(best, key=self._used, default=None)

    def _has_room(self, member: Member, waiting: Waiting) -> bool:
        if member.reserved or member.taken:
            return False
        if waiting.alone or not member.held:  # a group that is larger than all the room goes where nothing else is
            return not member.held
        size = 1 if self._single else waiting.size
        return waiting.at_once or self._used(member) + size <= self._room

    def _used(self, member: Member) -> int:
        return len(member.held) if self._single else member.load
