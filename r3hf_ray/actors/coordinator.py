"""The coordinator: one loop that moves refs from prompts to learner ranks, with a bound on staleness.

It holds refs, ids and lengths; it never touches a tensor and does not import torch.

| who                | waits for                                 | is released by                                     |
|--------------------|-------------------------------------------|----------------------------------------------------|
| the loop (`_run`)  | a slot, one for each chunk                | `publish`: the next weights are queued             |
| a learner rank     | all samples of its step (`next_share`)    | the last chunk of the step, scored or quarantined  |
| a rollout actor    | its mailbox, in the order of submission   | nobody else submits to it, so that order is a lock |

Slots: ``(max_lag + 1) * rollout.chunks``. With max_lag = 0 the chunks of step k start only once version k is queued:
synchronous PPO. With max_lag = L a sample is at most L versions behind the step that trains on it.
"""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import numpy as np
from ray.exceptions import RayError

from r3hf_ray.actors.dispatch import Dispatch, Tally
from r3hf_ray.actors.ending import Ending
from r3hf_ray.actors.fleet import Fleet, Member
from r3hf_ray.actors.ledger import Ledger, StepLedger
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.actors.shares import (
    FillingBatch,
    MetricsRow,
    RankShare,
    Snapshot,
    calibration_of,
    evaluation_metrics,
    unlike_units,
)
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import split_evenly, step_requests, stream_requests
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.types import Request, TrajectoryInfo
from r3hf_ray.weights.contract import Publication, TransferStep


class Coordinator:
    """The only submitter to rollout and reward actors; a named actor that learner ranks pull from."""

    def __init__(
        self,
        config: PPOConfig,
        rollouts: dict[str, Any],
        rewards: dict[str, Any],
        *,
        prompts: list[np.ndarray],
        heldout: list[np.ndarray],
        attempt: int = 0,
    ) -> None:
        """Know the actors and the token ids of the prompts; nothing starts before a learner begins.

        Args:
            config: of the run.
            rollouts: handles of the rollout actors, by a name for people.
            rewards: handles of the reward actors, likewise.
            prompts: token ids of the prompts to train on.
            heldout: token ids of the held-out prompts.
            attempt: number of the first learner group's attempt: 0, or more in a resumed run.
        """
        self._config = config
        self._prompts, self._heldout = prompts, heldout
        self._rows: list[MetricsRow] = []
        self._timeline = Timeline()
        self._outcome = Outcome(self._timeline)
        self._fleet = Fleet(
            [Member(name, handle) for name, handle in rollouts.items()],
            [Member(name, handle) for name, handle in rewards.items()],
            max_gap=config.weights.max_logprob_gap or (1e-3 if config.rollout.dtype == "float32" else 0.1),
            timeline=self._timeline,
            outcome=self._outcome,
            patience=config.run.patience,
        )
        self._ledger = Ledger()
        self._dispatch = Dispatch(self._fleet, config.rollout.max_attempts, self._ledger)
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
        if not self._fleet.watches:
            await self._fleet.enlist()
        self._spawn(self._run(step))

    async def publish(self, publication: Publication) -> None:
        """Queue new weights at every sampler, then let the next chunks go.

        Only rank 0 calls it, so it never says that the run has failed: a rank that left alone would leave the others
        in a collective. All ranks hear of it in `next_share`.
        """
        version = publication.version
        self._fleet.latest = publication
        loads = [(member, self._fleet.load(member)) for member in self._fleet.rollouts if member.alive]
        self._confirmed[version] = self._spawn(self._confirm(publication, loads))
        self._steps = {step: batch for step, batch in self._steps.items() if step >= version}
        if self._evaluation_due(version):
            self._spawn(self._evaluate(version))
        lag = self._config.rollout.max_lag if version == self._first_version else 0
        for _ in range(self._config.rollout.chunks * (lag + 1)):
            self._slots.release()

    async def transfer(self, step: TransferStep, payload: dict[str, Any] | None) -> None:
        """One call of vLLM's weight-sync client at every sampler; each gets its own place in the transfer group."""
        self._outcome.check()

        def place(number: int) -> dict[str, Any] | None:
            return {**payload, "rank_offset": 1 + number} if step is TransferStep.INIT and payload else payload

        rollouts = enumerate(self._fleet.rollouts)
        try:
            await asyncio.gather(*(member.handle.transfer.remote(step, place(number)) for number, member in rollouts))
        except RayError as error:
            self._outcome.fail(f"weight transfer failed at a sampler ({step.value}): {sentence_of(error)}")

    async def calibration(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of each model's sequence reward over samples of the policy as it was published first.

        By name, the main model's as ``reward``; nothing without calibration samples.
        """
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

    async def report(self, step: int, metrics: MetricsRow) -> None:
        """Close the metrics row of `step` (PPO steps done) once its weights are confirmed at the samplers."""
        row = {"train/global_step": step, "attempt": self._attempt, "time": time.time(), **metrics}
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
        ledgers, self._closed = self._closed, []
        return Snapshot(
            ledgers=ledgers,
            rows=self._rows[rows_seen:],
            events=self._timeline.events[events_seen:],
            doing=self._timeline.doing(),
            failed=self._outcome.sentence,
        )

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
        rollout = self._config.rollout
        for step in range(first_step, self._config.ppo.steps):
            requests = step_requests(self._prompts, rollout, seed=self._config.run.seed, step=step)
            for number, chunk in enumerate(split_evenly(requests, rollout.chunks)):
                await self._slots.acquire()
                self._spawn(self._fill(step, step * rollout.chunks + number, chunk))

    async def _fill(self, step: int, number: int, requests: list[Request]) -> None:
        """Generate and score one chunk, whatever it takes, and add it to the batch of its step."""
        batch = self._step(step)
        async for sample in self._dispatch.scored(batch.tally, number, requests, f"step {step + 1}", step + 1):
            batch.samples.append(sample)
        batch.resolved += len(requests)
        if batch.resolved < batch.expected:
            return
        work = self._config.ppo.minibatches * self._config.learner.ranks  # fewer would leave a rank without any
        if len(batch.samples) < (needed := max((batch.expected + 1) // 2, work)):
            self._outcome.fail(
                f"{batch.tally.quarantined} of {batch.expected} samples of step {step + 1} failed "
                f"{self._config.rollout.max_attempts} times and {needed} are needed; {self._last_quarantine()}"
            )
        batch.samples.sort(key=lambda sample: (sample.info.prompt_id, sample.info.sample))
        self._trained[step + 1] = [(sample.info.prompt_id, sample.info.sample) for sample in batch.samples]
        batch.full.set()
        self._timeline.now("rollout", f"waiting for weights version {step + 1 - self._config.rollout.max_lag}")
        self._timeline.now("reward", "idle")

    async def _calibrate(self) -> None:
        await self._outcome.or_failure(self._published.wait())
        count = self._config.reward.calibration_samples
        infos = await self._judge("calibration", self._prompts, count, "calibration")
        if len(infos) < 2:
            self._outcome.fail(f"calibration scored fewer than 2 responses; {self._last_quarantine()}")
        try:
            self._calibration = calibration_of(infos, self._config)
        except RunFailed as error:
            self._outcome.fail(str(error))
        for name, (mean, std) in self._calibration.items():
            self._timeline.add("calibrated", model=name, mean=mean, std=std, responses=len(infos))
        lender = self._config.reward.prefixes_from
        if lender is not None and (sentence := unlike_units(self._calibration, lender)):
            self._timeline.add("warning", step=0, reason=sentence)
        self._calibrated.set()

    def _evaluation_due(self, version: int) -> bool:
        settings = self._config.evaluation
        if not settings.prompts or not self._heldout:
            return False
        return version in (0, self._config.ppo.steps) or bool(settings.every and version % settings.every == 0)

    async def _evaluate(self, version: int) -> None:
        count = min(self._config.evaluation.prompts, len(self._heldout))
        infos = await self._judge("heldout", self._heldout, count, f"evaluation of version {version}")
        if infos:
            row = {"train/global_step": version, "attempt": self._attempt, "time": time.time()}
            self._rows.append(row | evaluation_metrics(infos))

    async def _judge(self, stream: str, prompts: list[np.ndarray], count: int, label: str) -> list[TrajectoryInfo]:
        """Generate and score outside the training stream; failures are retried and quarantined there too."""
        requests, tally = stream_requests(prompts, count, seed=self._config.run.seed, stream=stream), Tally()

        async def part(number: int, chunk: list[Request]) -> list[TrajectoryInfo]:
            return [sample.info async for sample in self._dispatch.scored(tally, number, chunk, label)]

        workers = max(len(self._fleet.rollouts), len(self._fleet.rewards))
        chunks = split_evenly(requests, min(len(requests), workers))
        parts = await asyncio.gather(*(part(number, chunk) for number, chunk in enumerate(chunks)))
        return sorted((info for infos in parts for info in infos), key=lambda info: info.prompt_id)

    # ------------------------------------------------------------------ weights

    async def _confirm(self, publication: Publication, loads: list[tuple[Member, Any]]) -> MetricsRow:
        """Every sampler must show that it runs what was published; otherwise the run ends."""
        self._published.set()
        proofs = [await self._fleet.proven(member, publication, ref) for member, ref in loads]
        answers = [loaded for loaded in proofs if loaded]
        proven = f"version {publication.version} proven at {len(answers)} of {len(self._fleet.rollouts)} samplers"
        self._timeline.now("weights", proven)
        return {
            "sync/version": publication.version,
            "sync/seconds": max((loaded.seconds for loaded in answers), default=0.0),
            "sync/bytes": publication.num_bytes,
            "sync/probe_gap": max((loaded.probe_gap for loaded in answers), default=0.0),
            "sync/mismatch": 0,
            "rollout/workers": len(answers),
        }

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

    def _last_quarantine(self) -> str:
        reasons = [event["reason"] for event in self._timeline.events if event["event"] == "quarantined"]
        return f"the last reason: {reasons[-1]}" if reasons else "see events.jsonl"

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(self._outcome.guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
