"""The actors of a run: the only place that makes them, knows which live, and proves what weights they hold.

The death of an actor is nobody's fault: it is asked for until Ray has restarted it, however long that takes, gets the
latest weights, and works again. What ends a run is an actor that cannot show the weights it was sent.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r3hf_ray.actors.environment import ACTORS, of_threads
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.actors.reward import RewardActor
from r3hf_ray.actors.rollout import RolloutActor, StaleWeightsError, engine_environment
from r3hf_ray.errors import sentence_of
from r3hf_ray.sections.actors import EngineFacts, LearnerSection, RolloutSection, TrainerSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.weights.contract import Loaded, Publication, objection

SOON_SECONDS = 1.0
"""How long the first dispatch waits for members that are about to stand; those that come later join. [s]"""
AWAY_SECONDS = 60.0
"""How often it is said again that an actor is still away. [s]"""
RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2 s by default: each save, and a tiny stage, would wait for a poll
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # 600 s by default before a stopped rank is given up
}
"""Environment of the process that starts a group; Ray hands it on to the group's controller."""


def rollout_actors(section: RolloutSection, facts: EngineFacts, *, namespace: str) -> dict[str, Any]:
    """Start `rollout.actors` samplers, by a name for people: `rollout 0`."""
    environment = engine_environment(section) | of_threads(
        section.threads, cpus=section.cpus_per_actor, overlap=section.max_lag > 0
    )
    # A repeated generate after a restart would sample from the wrong weights, so Ray repeats none.
    start = _starter(RolloutActor, section, environment, repeats=0, namespace=namespace)
    return {name: start(name).remote(section, facts) for name in _names("rollout", section.actors)}


def reward_actors(settings: Any, *, namespace: str, overlap: bool) -> dict[str, Any]:
    """Start `reward.actors` scorers from `ScoringSettings`; ``overlap``: they work while the learner does."""
    section = settings.reward
    environment = of_threads(section.threads, cpus=section.cpus_per_actor, overlap=overlap)
    # Scoring is deterministic, so Ray may repeat it.
    start = _starter(RewardActor, section, environment, repeats=2, namespace=namespace)
    return {name: start(name).remote(settings) for name in _names("reward", section.actors)}


def named_actor(kind: type, name: str, *arguments: Any, namespace: str, **options: Any) -> Any:
    """Start an actor without resources of its own on the driver's node, which others look up by its name.

    Without resources Ray would place it anywhere, also on a node that can be taken away.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    start = ray.remote(kind).options(name=name, namespace=namespace, num_cpus=0, scheduling_strategy=here)
    return start.remote(*arguments, **options)


def _names(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}" for number in range(count)]


def _starter(
    kind: type, section: RolloutSection | RewardSection, environment: dict[str, str], *, repeats: int, namespace: str
) -> Callable[[str], Any]:
    def named(name: str) -> Any:
        # `ping` has a thread of its own, so that it answers while a call runs.
        return ray.remote(concurrency_groups={"health": 1})(kind).options(
            name=name,
            namespace=namespace,
            num_cpus=section.cpus_per_actor,
            num_gpus=section.gpus_per_actor,
            max_restarts=-1,
            max_task_retries=repeats,
            runtime_env={"env_vars": ACTORS | environment},
        )

    return named


class TrainGroup(threading.Thread):
    """A Ray Train group in a thread, since `fit` owns the ranks and blocks; it begins with `start`."""

    def __init__(self, fit: Callable[[], object]) -> None:
        """``fit``: of a trainer."""
        super().__init__(daemon=True, name="train group")
        self.error: BaseException | None = None
        """What ended it, whatever it was; None while it runs, and where it came to its end."""
        self._fit = fit

    def run(self) -> None:
        """Fit; not only Ray Train's own errors are kept: what is not would pass for success."""
        with ExitStack() as stack:
            stack.push(self._keep)
            self._fit()

    def _keep(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.error = error
        return True


def train_group(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    section: LearnerSection | TrainerSection,
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> TrainGroup:
    """A group whose ranks each run ``loop(settings)``, with checkpoints below ``folder``; not yet started."""
    from ray.train.torch import TorchTrainer

    from r3hf_ray.actors.meeting import MeetingConfig

    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    gpu = section.gpus_per_rank > 0
    resources = {"CPU": section.cpus_per_rank} | ({"GPU": section.gpus_per_rank} if gpu else {})
    restarts, keep = 0, None
    if isinstance(section, LearnerSection):  # how many restarts without progress are too many, the coordinator says
        restarts, keep = -1, section.keep_checkpoints
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=MeetingConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=section.ranks, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=keep),
            worker_runtime_env={"env_vars": ACTORS | (environment or {})},
            callbacks=list(callbacks),
        ),
    )
    return TrainGroup(trainer.fit)


@dataclass(slots=True)
class Member:
    """A rollout or reward actor as the coordinator sees it.

    Example: ``Member("rollout 0", handle)``
    """

    name: str
    handle: Any
    alive: bool = False
    """It has answered since it was started, and its death is not known."""
    needs_weights: bool = False
    lives: int = 0
    """How often it has come; a call to an earlier life that fails late says nothing of this one."""


async def _answer(member: Member) -> None:
    await member.handle.ping.remote()


@dataclass(slots=True)
class Fleet:
    """Rollout and reward actors: who is alive, and what weights they hold."""

    rollouts: list[Member]
    rewards: list[Member]
    max_gap: float
    """Largest mean difference of the probe's logprobs that proves a load. [nats]"""
    timeline: Timeline
    outcome: Outcome
    patience: float = 120.0
    """How long a member may leave a question unanswered. [s]"""
    loads: list[dict[str, Any]] = field(default_factory=list)
    """Every load that was proven, for the ledger."""
    latest: Publication | None = None
    """What a rollout actor that restarts must load."""
    came_back: asyncio.Event = field(default_factory=asyncio.Event)
    watches: set[asyncio.Task[Any]] = field(default_factory=set)
    """Recoveries of dead actors, and proofs of the loads that follow."""

    async def enlist(self) -> None:
        """Wait for every member in its own time and watch it from then on; returns soon, whoever has come by then."""
        members = (*self.rollouts, *self.rewards)
        arrivals = [self._watch(self._arrive(member, "joined")) for member in members]
        for member in members:
            self._watch(self._question(member))
        if arrivals:
            await asyncio.wait(arrivals, timeout=SOON_SECONDS)

    async def pick(self, members: list[Member], number: int) -> Member:
        """Member `number` in turn, or the next one that is alive; a sampler gets the weights it lacks first."""
        while True:
            for offset in range(len(members)):
                member = members[(number + offset) % len(members)]
                if member.alive:
                    if member.needs_weights and self.latest:
                        self._watch(self.proven(member, self.latest, self.load(member)))
                    return member
            self.came_back.clear()
            await self.outcome.or_failure(self.came_back.wait())

    def load(self, member: Member) -> Any:
        """Submit the latest weights to a rollout actor; whatever is submitted to it later runs after them."""
        member.needs_weights = False
        return member.handle.load_weights.remote(self.latest)

    async def proven(self, member: Member, publication: Publication, load: Any) -> Loaded | None:
        """The answer to a load: it must show what was published, else the run ends. None if the actor died of it."""
        life = member.lives
        try:
            loaded: Loaded = await load
        except RayActorError as error:
            self.lost(member, error, life)
            return None
        except RayTaskError as error:
            version = publication.version
            self.outcome.fail(f"{member.name} could not load weights version {version}: {sentence_of(error)}")
        if wrong := objection(publication, loaded, max_gap=self.max_gap):
            self.outcome.fail(f"{member.name} {wrong}")
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

    def lost(self, member: Member, error: RayError, life: int) -> int:
        """1 if the actor is gone (it is then watched until it is back) or has no weights, 0 for an ordinary failure."""
        if isinstance(error, StaleWeightsError):
            member.needs_weights = True
            return 1
        if not isinstance(error, RayActorError):
            return 0
        if life == member.lives:
            self._gone(member, sentence_of(error))
        return 1

    def _gone(self, member: Member, reason: str) -> None:
        if member.alive:
            member.alive = False
            self.timeline.add("failure", actor=member.name, reason=reason)
            self._watch(self._arrive(member, "recovered"))

    def _watch(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(self.outcome.guard(work))
        self.watches.add(task)
        task.add_done_callback(self.watches.discard)
        return task

    async def _question(self, member: Member) -> None:
        """Ask a member again and again; one that does not answer is killed, and Ray starts it anew.

        A stopped process and a cut cable look alike from here: no answer, and no error either.
        """
        while True:
            await asyncio.sleep(self.patience / 10)
            if not member.alive:
                continue
            life = member.lives
            try:
                await asyncio.wait_for(_answer(member), self.patience)
            except RayError as error:
                self.lost(member, error, life)
            except TimeoutError:
                self._gone(member, f"no answer for {self.patience:g} s (run.patience): it is started anew")
                ray.kill(member.handle, no_restart=False)

    async def _arrive(self, member: Member, how: str) -> None:
        """Ask for an actor until Ray has (re)started it: its node may have to come; the others work on meanwhile."""
        left = said = time.monotonic()
        while True:
            try:
                await _answer(member)
                break
            except RayActorError as error:
                now = time.monotonic()
                if now - said > AWAY_SECONDS:
                    said = now
                    self.timeline.add("away", actor=member.name, seconds=round(now - left), reason=sentence_of(error))
                await asyncio.sleep(1.0)
        member.alive, member.needs_weights, member.lives = True, member in self.rollouts, member.lives + 1
        if how == "recovered" or time.monotonic() - left > SOON_SECONDS:
            self.timeline.add(how, actor=member.name, seconds=round(time.monotonic() - left))
        self.came_back.set()
