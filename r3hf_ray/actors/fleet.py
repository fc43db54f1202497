"""The actors of a run: the only place that makes them, knows which live, and proves what weights they hold.

The coordinator makes them and so owns them: they end with it. The death of an actor is nobody's fault: it is asked for
until Ray has restarted it, however long that takes, gets the latest weights, and works again. What ends a run is an
actor that cannot show the weights it was sent.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayActorError, RayError, RayTaskError

from r3hf_ray.actors.members import Member, MemberInfo, Pool, Work
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.errors import sentence_of
from r3hf_ray.types import GroupReport
from r3hf_ray.weights.contract import Loaded, Publication, objection

SOON_SECONDS = 1.0
"""How long the first dispatch waits for members that are about to stand; those that come later join. [s]"""
AWAY_SECONDS = 60.0
"""How often it is said again that an actor is still away. [s]"""
NODES_SECONDS = 5.0
"""How often Ray is asked which nodes are about to be taken away. [s]"""
FAILURES_IN_A_ROW = 3
"""Calls that fail in a row before a member is started anew: whoever is tried alone `rollout.max_attempts` (3) times is
then tried on a new engine before it is given up."""
QUEUED_GROUPS = 2
"""Groups that a reward actor holds: one that it scores, and one whose data arrives meanwhile."""

Maker = Callable[[str], Any]
"""Starts an actor of that name and returns its handle."""


@dataclass(slots=True, kw_only=True)
class Fleet:
    """Rollout and reward actors: who is alive, and what weights they hold."""

    pools: dict[str, Pool]
    """By kind: `rollout`, `reward`."""
    makers: dict[str, Maker]
    max_gap: float
    """Largest mean difference of the probe's logprobs that proves a load. [nats]"""
    timeline: Timeline
    outcome: Outcome
    patience: float = 120.0
    """How long a member may leave a question unanswered, and one that leaves may go on with what it holds. [s]"""
    deadlines: dict[str, float] = field(default_factory=dict)
    """By kind: how long a group may take before its member is looked at. [s]"""
    loads: list[dict[str, Any]] = field(default_factory=list)
    """Every load that was proven, for the ledger."""
    latest: Publication | None = None
    """What a rollout actor that restarts must load."""
    watches: set[asyncio.Task[Any]] = field(default_factory=set)
    """Everything that goes on about members: arrivals, streams, questions, proofs of loads."""
    _sent: Any = None
    _made: dict[str, int] = field(default_factory=dict)

    @property
    def rollouts(self) -> Pool:
        """The samplers."""
        return self.pools["rollout"]

    @property
    def rewards(self) -> Pool:
        """The scorers."""
        return self.pools["reward"]

    @property
    def starting(self) -> list[str]:
        """Names of those that have never come yet."""
        return [member.name for pool in self.pools.values() for member in pool.members if not member.lives]

    def members(self) -> list[MemberInfo]:
        """All of them, for people."""
        return [member.info for pool in self.pools.values() for member in pool.members]

    # ------------------------------------------------------------------ who comes and goes

    def grow(self, kind: str, actors: int) -> None:
        """Start so many more actors of a kind; each works once it stands and has the latest weights."""
        for _ in range(actors):
            number = self._made[kind] = self._made.get(kind, -1) + 1
            member = Member(f"{kind} {number}", kind, self.makers[kind](f"{kind} {number}"))
            self.pools[kind].members.append(member)
            if self.watches:
                self._care(member)

    def shrink(self, kind: str, actors: int) -> None:
        """Let so many actors of a kind go: those that do not work yet first, then the last ones."""
        staying = [member for member in self.pools[kind].members if not member.leaves]
        for member in sorted(staying, key=lambda member: member.serves, reverse=True)[len(staying) - actors :]:
            member.leaves = True
            self.timeline.add("leaving", actor=member.name, requests=member.load)
            self._watch(self._leave(member))
        self.pools[kind].serve()

    def watch(self) -> None:
        """Begin to ask for the members and to look after them; again is nothing."""
        if not self.watches:
            self._watch(self._nodes())
            for pool in self.pools.values():
                for member in pool.members:
                    self._care(member)

    async def soon(self) -> None:
        """Wait a moment for members that are about to stand, so that the first groups are dealt to all of them."""
        deadline = time.monotonic() + SOON_SECONDS
        waiting = [member for pool in self.pools.values() for member in pool.members]
        while not all(member.serves for member in waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _care(self, member: Member) -> None:
        self._watch(self._arrive(member, "joined"))
        self._watch(self._question(member))

    async def _arrive(self, member: Member, how: str) -> None:
        """Ask for an actor until Ray has (re)started it: its node may have to come; the others work on meanwhile."""
        left = said = time.monotonic()
        while member in self.pools[member.kind].members:  # it may have been let go meanwhile
            try:
                member.pulse = await member.handle.ping.remote()
                break
            except RayActorError as error:
                now = time.monotonic()
                if error.actor_init_failed:
                    self._constructor_failed(member, sentence_of(error))
                elif now - said > AWAY_SECONDS:
                    said = now
                    self.timeline.add("away", actor=member.name, seconds=round(now - left), reason=sentence_of(error))
                await asyncio.sleep(1.0)
        else:
            return
        member.lives, member.lost, member.failures, member.moved = member.lives + 1, False, 0, time.monotonic()
        life = member.lives
        if member.kind == "rollout":
            self._watch(self._listen(member))
            if self.latest and not await self.proven(member, life, self.latest, self.load(member)):
                return
        if member.lives != life or member.lost:
            return
        member.serves = True
        if how == "recovered" or time.monotonic() - left > SOON_SECONDS:
            self.timeline.add(how, actor=member.name, seconds=round(time.monotonic() - left))
        self.pools[member.kind].serve()

    def _constructor_failed(self, member: Member, why: str) -> None:
        """At the start it would fail everywhere, so the run ends; later another is made, since the others work."""
        if not member.lives and not self.latest:
            self.outcome.fail(f"{member.name} could not start: {why}")
        self.timeline.add("failure", actor=member.name, reason=f"could not start: {why}")
        member.handle = self.makers[member.kind](member.name)

    async def _leave(self, member: Member) -> None:
        """End a member once it has finished what it holds; what takes longer than `patience` goes elsewhere."""
        deadline = time.monotonic() + self.patience
        while member.held and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        pool = self.pools[member.kind]
        pool.members.remove(member)
        member.lives += 1  # nothing that fails from here on means anything
        pool.lose(member, "it leaves")
        ray.kill(member.handle)
        self.timeline.add("left", actor=member.name)

    async def _nodes(self) -> None:
        """A node that is about to be taken away gets no new work; once it is gone, Ray starts its actors elsewhere."""
        while True:
            await asyncio.sleep(NODES_SECONDS)
            draining = await asyncio.to_thread(ray_state.get_draining_nodes)
            for pool in self.pools.values():
                for member in pool.serving:
                    if member.pulse and member.pulse.node in draining:
                        member.drained = True
                        self.timeline.add("draining", actor=member.name, node=member.pulse.node)

    # ------------------------------------------------------------------ who lives

    async def _listen(self, member: Member) -> None:
        """Hand on what a sampler makes, until its stream breaks: then it is lost."""
        life = member.lives
        try:
            stream = member.handle.stream.options(num_returns="streaming").remote()
            async for trajectories, report in _pairs(stream):
                made: GroupReport = await report
                work = member.held.get(made.number)
                member.failures = member.failures + 1 if made.broken else 0
                if work and not work.answer.done():
                    work.answer.set_result((trajectories, made))
                if member.failures >= FAILURES_IN_A_ROW:
                    self.restart(member, f"{member.failures} failures in a row, the last: {made.broken}")
        except RayError as error:
            self.lost(member, sentence_of(error), life)

    def lost(self, member: Member, reason: str, life: int) -> None:
        """The actor is gone: what it held goes elsewhere, and it is watched until it is back."""
        if life != member.lives or member.lost:
            return
        member.lost, member.drained, member.reason = True, False, reason
        self.timeline.add("failure", actor=member.name, reason=reason)
        self.pools[member.kind].lose(member, reason)
        self._watch(self._arrive(member, "recovered"))

    def restart(self, member: Member, reason: str) -> None:
        """Kill a member that does not do its work; Ray starts it anew."""
        self.lost(member, reason, member.lives)
        ray.kill(member.handle, no_restart=False)

    def failed(self, work: Work, reason: str) -> None:
        """A call raised at a member, which lives; too many in a row, and it is started anew."""
        member = work.member
        if work.life == member.lives and not member.lost:
            member.failures += 1
            if member.failures >= FAILURES_IN_A_ROW:
                self.restart(member, f"{member.failures} failures in a row, the last: {reason}")

    async def _question(self, member: Member) -> None:
        """Ask a member again and again whether it lives and gets on; one that does not is killed and started anew.

        A stopped process and a cut cable look alike from here: no answer, and no error either.
        """
        while member in self.pools[member.kind].members:
            await asyncio.sleep(min(self.patience, self.deadlines.get(member.kind, self.patience)) / 10)
            if member.lost or not member.lives:
                continue
            life = member.lives
            try:
                pulse = await asyncio.wait_for(_answer(member), self.patience)
            except RayError as error:
                self.lost(member, sentence_of(error), life)
            except TimeoutError:
                if life == member.lives and not member.lost:
                    self.restart(member, f"no answer for {self.patience:g} s (run.patience): it is started anew")
            else:
                self._judge(member, pulse)

    def _judge(self, member: Member, pulse: Any) -> None:
        """Whether a member that answers gets on."""
        now, deadline = time.monotonic(), self.deadlines.get(member.kind, float("inf"))
        if member.pulse is None or pulse.progress != member.pulse.progress or not member.held:
            member.moved = now
        member.pulse = pulse
        if member.age < deadline:
            return
        where = f"{member.kind}.deadline"
        if now - member.moved > deadline:
            self.restart(member, f"it answers and has not got on for {deadline:g} s ({where}): it is started anew")
        elif not member.slow:
            member.slow = True
            self.timeline.add("slow", actor=member.name, reason=f"a group takes longer than {deadline:g} s ({where})")

    # ------------------------------------------------------------------ weights

    def publish(self, publication: Publication) -> list[tuple[Member, int, Any]]:
        """Queue new weights at every sampler that lives; (member, its life, answer to come) of each."""
        self.latest, self._sent = publication, ray.put(publication)  # once for all of them
        members = [member for member in self.rollouts.members if member.lives and not member.lost]
        return [(member, member.lives, self.load(member)) for member in members]

    async def confirmed(self, publication: Publication, loads: list[tuple[Member, int, Any]]) -> dict[str, int | float]:
        """Every sampler must show that it runs what was published; otherwise the run ends."""
        proofs = [await self.proven(member, life, publication, ref) for member, life, ref in loads]
        answers = [loaded for loaded in proofs if loaded]
        serving = {kind: len(pool.serving) for kind, pool in self.pools.items()}
        proven = f"version {publication.version} proven at {len(answers)} of {len(loads)} samplers"
        self.timeline.now("weights", proven)
        return {
            "sync/version": publication.version,
            "sync/seconds": max((loaded.seconds for loaded in answers), default=0.0),
            "sync/bytes": publication.num_bytes,
            "sync/probe_gap": max((loaded.probe_gap for loaded in answers), default=0.0),
            "sync/mismatch": 0,
            "rollout/workers": len(answers),
            "fleet/rollout_actors": serving["rollout"],
            "fleet/reward_actors": serving["reward"],
        }

    def load(self, member: Member) -> Any:
        """Submit the latest weights to a sampler; whatever is submitted to it later runs after them."""
        return member.handle.load_weights.remote(self._sent)

    async def proven(self, member: Member, life: int, publication: Publication, load: Any) -> Loaded | None:
        """The answer to a load: it must show what was published, else the run ends. None if the actor died of it."""
        try:
            loaded: Loaded = await load
        except RayActorError as error:
            self.lost(member, sentence_of(error), life)
            return None
        except RayTaskError as error:
            version = publication.version
            self.outcome.fail(f"{member.name} could not load weights version {version}: {sentence_of(error)}")
        if wrong := objection(publication, loaded, max_gap=self.max_gap):
            self.outcome.fail(f"{member.name} {wrong}")
        member.version = loaded.version
        self.loads.append(
            {
                "member": member.name,
                "version": loaded.version,
                "fingerprint": loaded.fingerprint,
                "matched": True if publication.fingerprint else None,
                "gap": loaded.probe_gap if publication.probe else None,
                "bound": self.max_gap,
            }
        )
        return loaded

    def _watch(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(self.outcome.guard(work))
        self.watches.add(task)
        task.add_done_callback(self.watches.discard)


async def _answer(member: Member) -> Any:
    return await member.handle.ping.remote()


async def _pairs(stream: AsyncIterator[Any]) -> AsyncIterator[tuple[Any, Any]]:
    """Refs of a stream, two by two."""
    first = None
    async for ref in stream:
        if first is None:
            first = ref
        else:
            yield first, ref
            first = None
    if first is not None:
        await first  # what has ended a stream comes as its last item
