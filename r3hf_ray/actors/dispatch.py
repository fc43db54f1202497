"""From requests to scored samples, whatever dies on the way: a straight line of refs, retried, then quarantined.

A failure is never data. A sample whose generation or scoring failed is tried again on other actors; after
`rollout.max_attempts` it is quarantined and counted. The death of an actor is not the sample's fault and does not count
as an attempt.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from r3hf_ray.actors.fleet import Fleet
from r3hf_ray.actors.ledger import UNTRAINED, Ledger
from r3hf_ray.errors import sentence_of
from r3hf_ray.types import ChunkReport, Failure, Request, TrajectoryInfo

LOST_ACTORS_A_CHUNK = 5
"""Actors that may die over one chunk before its prompts go one by one, and over one prompt alone before it is given up:
a death is the prompt's fault only where it was alone with the actor every time."""


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


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The only place that submits work to rollout and reward actors."""

    fleet: Fleet
    max_attempts: int
    ledger: Ledger

    async def scored(
        self, tally: Tally, number: int, requests: list[Request], label: str, step: int = UNTRAINED
    ) -> AsyncIterator[ScoredRef]:
        """Yield the samples of one chunk as they are scored; those that are quarantined never come.

        Args:
            tally: counts retries, quarantines and seconds.
            number: of the chunk; it starts at rollout actor ``number mod N`` and reward actor ``number mod M``.
            requests: of the chunk.
            label: of the work, for people.
            step: which the samples are for, from 1; left out for samples that are not trained on.
        """
        queue, deaths = [requests], Counter[tuple[int, int, int]]()
        while queue:
            group = queue.pop(0)
            samples, failures, died = await self._once(
                tally, number + group[0].attempt + deaths.total(), group, label, step
            )
            for sample in samples:
                yield sample
            if not died:
                queue += self._again(tally, group, failures, step)
                continue
            tally.retried += len(group)  # not the prompts' fault, so the group goes again as it is
            key = (group[0].prompt_id, group[0].sample, len(group))
            deaths[key] += 1
            if deaths[key] <= LOST_ACTORS_A_CHUNK:
                queue.append(group)
            elif len(group) > 1:
                queue += [[request] for request in group]
            else:
                last = [replace(failure, reason=f"{deaths[key]} actors died over it") for failure in failures]
                queue += self._again(tally, [replace(group[0], attempt=self.max_attempts)], last, step)

    async def _once(
        self, tally: Tally, number: int, requests: list[Request], label: str, step: int
    ) -> tuple[list[ScoredRef], list[Failure], int]:
        """Generate on one actor, score on another. Returns (samples, failures, actors lost)."""
        fleet, keys = self.fleet, [(request.prompt_id, request.sample) for request in requests]
        rollout = await fleet.pick(fleet.rollouts, number)
        life = rollout.lives
        self.ledger.dispatched(step, requests)
        trajectories, generated = rollout.handle.generate.options(num_returns=2).remote(requests)
        fleet.timeline.now("rollout", f"generating {len(requests)} responses of {label}")
        try:
            made: ChunkReport = await generated
            tally.rollout_seconds += made.seconds
            self.ledger.generated(step, made.infos)
        except RayError as error:
            return [], _failures(keys, "generate", error), fleet.lost(rollout, error, life)
        # Only now: in the queue of a reward actor it would keep every later call, `ping` too, from being answered.
        reward = await fleet.pick(fleet.rewards, number)
        life = reward.lives
        *refs, scored = reward.handle.score.options(num_returns=len(keys) + 1).remote(trajectories, keys)
        fleet.timeline.now("reward", f"scoring {len(made.infos)} responses of {label}")
        try:
            judged: ChunkReport = await scored
            tally.reward_seconds += judged.seconds
            self.ledger.scored(step, judged.infos)
        except RayError as error:
            return [], _failures(keys, "score", error), fleet.lost(reward, error, life)
        by_key = dict(zip(keys, refs, strict=True))
        samples = [ScoredRef(info, by_key[(info.prompt_id, info.sample)]) for info in judged.infos]
        return samples, made.failures + judged.failures, 0

    def _again(self, tally: Tally, group: list[Request], failures: list[Failure], step: int) -> Iterable[list[Request]]:
        """The groups to try again; what has failed for good is quarantined."""
        reasons = {(failure.prompt_id, failure.sample): failure for failure in failures}
        failed = [request for request in group if (request.prompt_id, request.sample) in reasons]
        again = [request for request in failed if request.attempt + 1 < self.max_attempts]
        for request in failed:
            if request not in again:
                failure = reasons[(request.prompt_id, request.sample)]
                facts = {"row": request.row, "sample": request.sample, "call": failure.call, "reason": failure.reason}
                self.fleet.timeline.add("quarantined", prompt_id=request.prompt_id, **facts)
        self.ledger.quarantined(step, [request for request in failed if request not in again])
        tally.quarantined += len(failed) - len(again)
        tally.retried += len(again)
        retries = [replace(request, attempt=request.attempt + 1) for request in again]
        if len(retries) == len(group) > 1 and group[0].attempt == 0 and self.max_attempts > 2:
            return [retries]  # the whole call failed: once more elsewhere, then one by one to find the poison
        return [[request] for request in retries]


def _failures(keys: list[tuple[int, int]], call: str, error: Exception) -> list[Failure]:
    reason = sentence_of(error)
    return [Failure(prompt_id=prompt_id, sample=sample, call=call, reason=reason) for prompt_id, sample in keys]
