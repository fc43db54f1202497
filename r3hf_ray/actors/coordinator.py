"""The coordinator: one loop that moves refs from prompts to learner ranks, with a bound on staleness.

It holds refs, ids and lengths; it never touches a tensor and does not import torch.

| who                | waits for                                 | is released by                                     |
|--------------------|-------------------------------------------|----------------------------------------------------|
| the loop (`_run`)  | a slot, one for each group                | `publish`: the next weights are queued             |
| a learner rank     | all samples of its step (`next_share`)    | the last group of the step, scored or quarantined  |
| a learner rank     | all ranks to have theirs (`agree`)        | the last rank, and what was lost is made again     |
| a group            | a member with room (`members.Pool`)       | a group that ends, a member that comes             |
| a rollout actor    | its queue, in the order of submission     | nobody else submits to it, so that order is a lock |

Slots: ``(max_lag + 1) * rollout.groups_per_step``. With max_lag = 0 the groups of step k start once version k is
queued: synchronous PPO. With max_lag = L a sample is at most L versions behind the step that trains on it.
"""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import numpy as np
from ray.exceptions import RayError

from r3hf_ray.actors.dispatch import Dispatch, Job
from r3hf_ray.actors.ending import Ending
from r3hf_ray.actors.fleet import QUEUED_GROUPS, Fleet, Maker
from r3hf_ray.actors.judging import Judging
from r3hf_ray.actors.ledger import Ledger, StepLedger
from r3hf_ray.actors.members import MemberInfo, Pool
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.actors.scaling import rescale
from r3hf_ray.actors.shares import Agreement, FillingBatch, MetricsRow, RankShare, Snapshot
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import groups_of, step_requests
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.types import Request
from r3hf_ray.weights.contract import Publication, TransferStep


class Coordinator:
    """The only submitter to rollout and reward actors; a named actor that learner ranks pull from."""

    def __init__(
        self,
        config: PPOConfig,
        makers: dict[str, Maker],
        *,
        prompts: list[np.ndarray],
        heldout: list[np.ndarray],
        attempt: int = 0,
    ) -> None:
        """Start the actors; nothing else begins before a learner does.

        Args:
            config: of the run.
            makers: what starts an actor of a kind, `rollout` or `reward`, by the actor's name.
            prompts: token ids of the prompts to train on.
            heldout: token ids of the held-out prompts.
            attempt: number of the first learner group's attempt: 0, or more in a resumed run.
        """
        self._config, self._prompts = config, prompts
        rollout = config.rollout
        self._rows: list[MetricsRow] = []
        self._timeline = Timeline()
        self._outcome = Outcome(self._timeline)
        self._fleet = Fleet(
            pools={
                "rollout": Pool("rollout", rollout.room, fixed=rollout.dispatch == "fixed"),
                "reward": Pool("reward", QUEUED_GROUPS, single=True),
            },
            makers=makers,
            max_gap=config.weights.max_logprob_gap or (1e-3 if rollout.dtype == "float32" else 0.1),
            timeline=self._timeline,
            outcome=self._outcome,
            patience=config.run.patience,
            deadlines={"rollout": rollout.deadline, "reward": config.reward.deadline},
        )
        self._fleet.grow("rollout", rollout.actors)
        self._fleet.grow("reward", config.reward.actors)
        self._ledger = Ledger()
        self._dispatch = Dispatch(self._fleet, rollout.max_attempts, self._ledger)
        self._judging = Judging(config, self._dispatch, self._timeline, self._outcome, prompts, heldout)
        self._closed: list[tuple[StepLedger, list[dict[str, Any]]]] = []
        self._trained: dict[int, list[tuple[int, int]]] = {}
        self._first_attempt, self._attempt = attempt, attempt - 1
        self._tasks: set[asyncio.Task[Any]] = set()
        self._steps: dict[int, FillingBatch] = {}
        self._confirmed: dict[int, asyncio.Task[MetricsRow]] = {}
        self._unconfirmed: dict[int, MetricsRow] = {}
        self._calibration: dict[str, tuple[float, float]] = {}
        self._calibrated, self._published = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(0)
        self._first_version = 0
        self._lost_at, self._losses, self._why_lost, self._ending = -1, 0, "", Ending()

    # ------------------------------------------------------------------ the learner's side

    async def begin(self, step: int) -> None:
        """A learner group (re)starts at `step`: drop whatever was under way; generation waits for its first weights."""
        self._outcome.check()
        for task in list(self._tasks):
            task.cancel()
        # A rank may die after its step was checkpointed and before the samplers confirmed: that step is not done again.
        for done, row in self._unconfirmed.items():
            if done <= step:
                self._close(done)
                self._rows.append(row)
        self._reset(step)
        self._attempt += 1
        if self._attempt == self._first_attempt:
            self._timeline.add("started", step=step, attempt=self._attempt)
        else:
            self._timeline.add("restart", step=step, attempt=self._attempt, reason=self._why_lost)
        self._timeline.now("learner", f"started at step {step}")
        self._fleet.watch()
        await self._fleet.soon()
        self._spawn(self._run(step))

    async def publish(self, publication: Publication) -> None:
        """Queue new weights at every sampler, then let the next groups go.

        Only rank 0 calls it, so it never says that the run has failed: a rank that left alone would leave the others
        in a collective. All ranks hear of it in `next_share`.
        """
        version = publication.version
        self._confirmed[version] = self._spawn(self._fleet.confirmed(publication, self._fleet.publish(publication)))
        self._published.set()
        self._steps = {step: batch for step, batch in self._steps.items() if step >= version}
        if self._judging.due(version):
            self._spawn(self._evaluate(version))
        lag = self._config.rollout.max_lag if version == self._first_version else 0
        for _ in range(self._config.rollout.groups_per_step * (lag + 1)):
            self._slots.release()

    async def transfer(self, step: TransferStep, payload: dict[str, Any] | None) -> None:
        """One call of vLLM's weight-sync client at every sampler; each gets its own place in the transfer group."""
        self._outcome.check()

        def place(number: int) -> dict[str, Any] | None:
            return {**payload, "rank_offset": 1 + number} if step is TransferStep.INIT and payload else payload

        rollouts = enumerate(self._fleet.rollouts.members)
        try:
            await asyncio.gather(*(member.handle.transfer.remote(step, place(number)) for number, member in rollouts))
        except RayError as error:
            self._outcome.fail(f"weight transfer failed at a sampler ({step.value}): {sentence_of(error)}")

    async def calibration(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of each model's sequence reward over samples of the first policy, by name."""
        await self._outcome.or_failure(self._calibrated.wait())
        return self._calibration

    async def next_share(self, step: int, rank: int) -> RankShare | None:
        """This rank's part of the batch of `step`, once all samples are scored or quarantined; None: save and leave."""
        if rank == 0:
            self._timeline.now("learner", f"waiting for the batch of step {step + 1}")
        await self._outcome.or_failure(self._ending.or_full(self._step(step).full))
        if not self._ending.gives(step):
            return None
        if rank == 0:
            self._timeline.now("learner", f"training on step {step + 1}")
        return self._step(step).share(self._config, step, rank)

    async def agree(self, step: int, rank: int, missing: list[tuple[int, int]]) -> RankShare | None:
        """A rank says what of its share has not come; None once every rank has all of its own.

        Else what was lost is made again, and every rank gets a new share: a sample that is made again may have another
        length, and with it the whole batch another order. So no rank may go on with the share that it has.
        """
        batch = self._step(step)
        (agreement := batch.agreement).hear(missing)
        if agreement.answers == self._config.learner.ranks:
            batch.agreement = Agreement()
            self._spawn(self._settle(step, batch, agreement))
        await self._outcome.or_failure(agreement.reached.wait())
        return batch.share(self._config, step, rank) if agreement.missing else None

    async def report(self, step: int, metrics: MetricsRow) -> None:
        """Close the metrics row of `step` (PPO steps done) once its weights are confirmed at the samplers."""
        row = self._row(step) | metrics
        self._unconfirmed[step] = row
        loaded = await self._confirmed[step]
        if self._unconfirmed.pop(step, None) is row:
            self._close(step)
            self._rows.append(row | loaded)

    async def group_lost(self, reason: str) -> str:
        """A learner group has died; why it is not to be started again, empty where it is.

        Only losses without a step between them count: a long run on machines that can be taken away loses many.
        """
        done = -1 if self._fleet.latest is None else self._fleet.latest.version
        self._losses = self._losses + 1 if done <= self._lost_at else 1
        self._lost_at, self._why_lost = max(done, self._lost_at), reason
        self._timeline.add("failure", actor="learner", reason=reason)
        if self._losses > (allowed := self._config.learner.max_failures):
            with suppress(RunFailed):
                self._outcome.fail(
                    f"the learner group was lost {self._losses} times without a step between, and "
                    f"learner.max_failures allows {allowed}: {reason}"
                )
        return self._outcome.sentence or ""

    async def event(self, kind: str, **fields: Any) -> None:
        """Record something the driver should write and show."""
        self._timeline.add(kind, **fields)

    async def fail(self, sentence: str) -> None:
        """End the run: raises `RunFailed` here too."""
        self._outcome.fail(sentence)

    # ------------------------------------------------------------------ the driver's side

    async def poll(self, rows_seen: int, events_seen: int) -> Snapshot:
        """Everything since the last poll."""
        self._fleet.watch()  # here too: an actor that cannot start is told before a learner has come
        ledgers, self._closed = self._closed, []
        starting = dict.fromkeys(self._fleet.starting, "starting: loading libraries and models")
        return Snapshot(
            ledgers=ledgers,
            rows=self._rows[rows_seen:],
            events=self._timeline.events[events_seen:],
            doing=self._timeline.doing() | starting,
            failed=self._outcome.sentence,
        )

    async def members(self) -> list[MemberInfo]:
        """Every rollout and reward actor, as it stands."""
        return self._fleet.members()

    async def scale(self, rollout: int | None = None, reward: int | None = None) -> str:
        """Have so many actors from now on; why not, empty where it is done.

        Newcomers load and prove the latest weights before they serve; those that leave finish what they hold.
        """
        return rescale(self._fleet, self._config, {"rollout": rollout, "reward": reward})

    async def pending(self) -> dict[int, list[tuple[int, int]]]:
        """(prompt_id, sample) of what is not yet trained on, by step: for a checkpoint."""
        return self._ledger.pending()

    async def stop(self) -> bool:
        """Let the learner save and leave after the step under way; False: no step was done."""
        return self._ending.ask()

    async def finish(self) -> None:
        """Wait for what is still under way after the last step: the last load and the last evaluation."""
        self._timeline.now("learner", "finished")
        if self._tasks:
            await self._outcome.or_failure(asyncio.wait(set(self._tasks)))

    # ------------------------------------------------------------------ the loop

    async def _run(self, first_step: int) -> None:
        if self._config.reward.calibration_samples and not first_step:
            await self._calibrate()
        else:
            self._calibrated.set()
        for step in range(first_step, self._config.ppo.steps):
            for number, group in self._groups(step):
                await self._slots.acquire()
                self._spawn(self._fill(step, number, group))

    def _groups(self, step: int) -> list[tuple[int, list[Request]]]:
        """The groups of a step, each with its number in the run."""
        rollout = self._config.rollout
        requests = step_requests(self._prompts, rollout, seed=self._config.run.seed, step=step)
        return list(enumerate(groups_of(requests, rollout.group_size), start=step * rollout.groups_per_step))

    async def _fill(self, step: int, number: int, requests: list[Request]) -> None:
        """Generate and score one group, whatever it takes, and add it to the batch of its step."""
        batch = self._step(step)
        batch.samples.extend(await self._dispatch.scored(self._job(step, batch, number), requests))
        batch.resolved += len(requests)
        if batch.resolved < batch.expected:
            return
        self._complete(step, batch)
        batch.full.set()
        self._timeline.now("rollout", f"waiting for weights version {step + 1 - self._config.rollout.max_lag}")
        self._timeline.now("reward", "idle")

    def _job(self, step: int, batch: FillingBatch, number: int) -> Job:
        return Job(tally=batch.tally, number=number, label=f"step {step + 1}", step=step + 1)

    def _complete(self, step: int, batch: FillingBatch) -> None:
        """Nothing more comes for this batch: there must be enough to train on."""
        work = self._config.ppo.minibatches * self._config.learner.ranks  # with fewer a rank would have none
        if len(batch.samples) < (needed := max((batch.expected + 1) // 2, work)):
            self._outcome.fail(
                f"{batch.tally.quarantined} of {batch.expected} samples of step {step + 1} failed "
                f"{self._config.rollout.max_attempts} times and {needed} are needed; {self._timeline.last_quarantine()}"
            )
        batch.settle()
        self._trained[step + 1] = [(sample.info.prompt_id, sample.info.sample) for sample in batch.samples]

    async def _settle(self, step: int, batch: FillingBatch, agreement: Agreement) -> None:
        """All ranks have spoken: make again what was lost, group by group, with the seeds it had."""
        if agreement.missing:
            lost = [(number, [r for r in group if r.key in agreement.missing]) for number, group in self._groups(step)]
            reason = f"{len(agreement.missing)} samples of step {step + 1} were lost with their host: made again"
            self._timeline.add("lost_samples", step=step + 1, samples=len(agreement.missing), reason=reason)
            kept = [s for s in batch.samples if (s.info.prompt_id, s.info.sample) not in agreement.missing]
            jobs = [(self._job(step, batch, number), part) for number, part in lost if part]
            made = await asyncio.gather(*(self._dispatch.scored(*job) for job in jobs))
            batch.samples = kept + [sample for samples in made for sample in samples]
            self._complete(step, batch)
        agreement.reached.set()

    # ------------------------------------------------------------------ calibration and evaluation

    async def _calibrate(self) -> None:
        await self._outcome.or_failure(self._published.wait())
        self._calibration = await self._judging.calibrate()
        self._calibrated.set()

    async def _evaluate(self, version: int) -> None:
        if metrics := await self._judging.evaluate(version):
            self._rows.append(self._row(version) | metrics)

    # ------------------------------------------------------------------ one step to the next

    def _row(self, step: int) -> MetricsRow:
        return {"train/global_step": step, "attempt": self._attempt, "time": time.time()}

    def _close(self, step: int) -> None:
        """The step is taken and its weights are out: its ledger goes to the driver."""
        facts = {"attempt": self._attempt, "began_at": self._first_version}
        loads, self._fleet.loads = self._fleet.loads, []
        self._closed.append((self._ledger.close(step, self._trained.pop(step), **facts), loads))

    def _reset(self, step: int) -> None:
        self._ledger.drop()
        self._trained = {}
        self._first_version = step
        self._ending.begin(step)
        self._slots = asyncio.Semaphore(0)
        self._steps, self._confirmed, self._unconfirmed, self._tasks = {}, {}, {}, set()
        self._published, self._calibrated = asyncio.Event(), asyncio.Event()
        self._calibration = {}

    def _step(self, step: int) -> FillingBatch:
        return self._steps.setdefault(step, FillingBatch(expected=self._config.responses_per_step))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(self._outcome.guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
