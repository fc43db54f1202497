"""The coordinator against fake actors: real processes with the real methods that keep a log and fail as they are told.

The coordinator itself lives in this process, so that its parts can be watched; the learner is a few lines below.
Behaviour and log are files, so they survive the death of the process that wrote them.
"""

import asyncio
import inspect
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError

from r3hf_ray.actors import dispatch, fleet
from r3hf_ray.actors.coordinator import Coordinator
from r3hf_ray.actors.ledger import State
from r3hf_ray.actors.pulse import Pulse, pulse
from r3hf_ray.actors.rollout import GROUPS, RolloutActor
from r3hf_ray.actors.sampler import Made, StaleWeightsError, broken
from r3hf_ray.actors.shares import RankShare, Snapshot, evaluation_metrics
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import seed_of
from r3hf_ray.errors import RunFailed
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.types import MAIN, Failure, Finish, GroupReport, SampleGroup, TrajectoryInfo
from r3hf_ray.weights.contract import Loaded, Publication

pytestmark = pytest.mark.ray

PROMPTS = [np.arange(3 + row % 3, dtype=np.int32) for row in range(50)]
HELDOUT = PROMPTS[:3]
PATIENCE = 40.0  # seconds before a test counts as hanging


class Fake:
    """Keeps a log and obeys `behaviour.json`, both in one folder for all actors of a test."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def enter(self, call: str, **facts: Any) -> dict[str, Any]:
        """Log a call; die, wait or raise as told. Returns the behaviour."""
        line = {"actor": self.name, "call": call, "pid": os.getpid(), **facts}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        behaviour = json.loads((self.folder / "behaviour.json").read_text())
        key = f"{self.name} {call}"
        lines = [json.loads(text) for text in (self.folder / "log.jsonl").read_text().splitlines()]
        count = sum(line["actor"] == self.name and line["call"] == call for line in lines)
        deadly = {tuple(each) for each in behaviour.get("deadly", [])}
        if count in behaviour.get("die", {}).get(key, []) or deadly & {tuple(each) for each in facts.get("keys", [])}:
            os.kill(os.getpid(), signal.SIGKILL)
        if count in behaviour.get("stop", {}).get(key, []):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(behaviour.get("seconds", {}).get(call, 0.0))
        return behaviour

    def poisoned(self, behaviour: dict[str, Any], call: str, keys: list[tuple[int, int]]) -> None:
        if not set(keys).isdisjoint(map(tuple, behaviour.get(f"poison {call}", []))):
            raise ValueError("this prompt breaks the whole call")

    def failures(self, behaviour: dict[str, Any], call: str, made: list[tuple[int, int, int]]) -> list[Failure]:
        """Of (prompt_id, sample, attempt): those told to fail in more attempts than they have had."""
        times = {tuple(key): count for *key, count in behaviour.get(f"fail {call}", [])}
        return [
            Failure(prompt_id=p, sample=s, call=call, reason="told to fail")
            for p, s, attempt in made
            if attempt < times.get((p, s), 0)
        ]


class FakeSampler(Fake):
    """An engine of a real rollout actor; it makes one `TrajectoryInfo` where the real one makes a trajectory."""

    def __init__(self, folder: Path, name: str, section: RolloutSection, facts: EngineFacts) -> None:
        super().__init__(folder, name)
        self.version: int | None = None
        self.open: list[SampleGroup] = []

    @property
    def idle(self) -> bool:
        return not self.open

    def load_weights(self, publication: Publication) -> Loaded:
        behaviour = self.enter("load", version=publication.version)
        if publication.version in behaviour.get("refuse", []):
            raise OSError("the bucket is gone")
        self.version = publication.version
        honest = {"version": publication.version, "fingerprint": publication.fingerprint, "probe_gap": 1e-7}
        lie = behaviour.get("answer", {}).get(f"{self.name} {publication.version}", {})
        return Loaded(**(honest | lie), seconds=0.25)

    def transfer(self, step: Any, payload: Any) -> None:
        pass

    def add(self, group: SampleGroup) -> None:
        if self.version is None:
            raise StaleWeightsError("no published weights yet")
        keys, seeds = [r.key for r in group.requests], [r.seed for r in group.requests]
        others = [r.key for other in self.open for r in other.requests]
        self.enter("generate", version=self.version, keys=keys, seeds=seeds, others=others)
        self.open.append(group)

    def abort(self, number: int) -> bool:
        before = len(self.open)
        self.open = [group for group in self.open if group.number != number]
        return len(self.open) < before

    def drop(self, reason: str) -> list[Made]:
        groups, self.open = self.open, []
        return [broken(group.number, reason) for group in groups]

    def step(self) -> list[Made]:
        """A step ends the group that came first, unless it is told to hold it."""
        behaviour = json.loads((self.folder / "behaviour.json").read_text())
        self.poisoned(behaviour, "generate", [r.key for group in self.open for r in group.requests])
        held = {tuple(each) for each in behaviour.get("hold", [])}
        free = [group for group in self.open if held.isdisjoint(r.key for r in group.requests)]
        if not free:
            time.sleep(0.02)
            return []
        self.open.remove(free[0])
        requests = free[0].requests
        failures = self.failures(behaviour, "generate", [(r.prompt_id, r.sample, r.attempt) for r in requests])
        failed = {(failure.prompt_id, failure.sample) for failure in failures}
        infos = [
            TrajectoryInfo(
                prompt_id=r.prompt_id,
                sample=r.sample,
                attempt=r.attempt,
                policy_version=self.version if self.version is not None else -1,
                prompt_len=len(r.token_ids),
                length=len(r.token_ids) + 1 + r.seed % 9,
                finish=Finish.EOS if r.seed % 3 else Finish.LENGTH,
            )
            for r in requests
            if r.key not in failed
        ]
        return [(infos, GroupReport(infos=infos, failures=failures, seconds=0.5, number=free[0].number))]


class FakeReward(Fake):
    """Scores a prompt with its own id; the scored object is its `TrajectoryInfo`."""

    @ray.method(concurrency_group="health")
    def ping(self) -> Pulse:
        return pulse(0)

    def score(self, trajectories: list[TrajectoryInfo], keys: list[tuple[int, int]]) -> list[Any]:
        behaviour = self.enter("score", keys=keys)
        self.poisoned(behaviour, "score", keys)
        trajectories = [t for t in trajectories if (t.prompt_id, t.sample) in set(keys)]
        lines = [json.loads(text) for text in (self.folder / "log.jsonl").read_text().splitlines()]
        tried = Counter(tuple(key) for line in lines if line["call"] == "score" for key in line["keys"])
        failures = self.failures(
            behaviour, "score", [(t.prompt_id, t.sample, tried[(t.prompt_id, t.sample)] - 1) for t in trajectories]
        )
        failed = {(failure.prompt_id, failure.sample) for failure in failures}
        infos = {
            (t.prompt_id, t.sample): replace(
                t,
                scores={
                    name: factor * t.prompt_id for name, factor in ({MAIN: 1.0} | behaviour.get("models", {})).items()
                },
                gold=t.prompt_id / 2,
            )
            for t in trajectories
            if (t.prompt_id, t.sample) not in failed
        }
        report = GroupReport(infos=list(infos.values()), failures=failures, seconds=0.125)
        return [*(infos.get(key) for key in keys), report]


for checked in vars(RolloutActor).values():
    if inspect.isfunction(checked):  # Ray looks behind the type checks of these tests, where the groups are not said
        groups = {name: value for name, value in vars(checked).items() if name.startswith("__ray_")}
        vars(inspect.unwrap(checked)).update(groups)


@dataclass
class Actors:
    """What makes rollout and reward actors, the folder of their log, and what they are told.

    The same processes serve every test: one that was made under a name is given out again.
    """

    folder: Path
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, kind: str) -> Callable[[str], Any]:
        return partial(self._make, kind)

    def _make(self, kind: str, name: str) -> Any:
        if name not in self.made:
            options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
            if kind == "rollout":
                facts = EngineFacts(model="", max_model_len=8, eos_ids=(2,), medium="object_ref")
                rollout = ray.remote(concurrency_groups=GROUPS)(RolloutActor).options(**options)
                self.made[name] = rollout.remote(RolloutSection(), facts, partial(FakeSampler, self.folder, name))
            else:
                reward = ray.remote(concurrency_groups={"health": 1})(FakeReward).options(**options)
                self.made[name] = reward.remote(self.folder, name)
        return self.made[name]

    def behave(self, **behaviour: Any) -> None:
        (self.folder / "new.json").write_text(json.dumps({name.replace("_", " "): v for name, v in behaviour.items()}))
        (self.folder / "new.json").replace(self.folder / "behaviour.json")

    def log(self, *calls: str, actor: str | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(text) for text in (self.folder / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["call"] in calls and actor in (None, line["actor"])]


@pytest.fixture(scope="module")
def all_actors(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actors]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actors = Actors(tmp_path_factory.mktemp("fakes"))
    actors.behave()
    yield actors
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def actors(all_actors: Actors) -> Actors:
    """The same processes for every test, idle, obedient, and with an empty log."""
    all_actors.behave()
    usual = {f"{kind} {number}": kind for kind in ("rollout", "reward") for number in (0, 1)}
    for name in [name for name in all_actors.made if name not in usual]:
        ray.kill(all_actors.made.pop(name))
    for actor, name in [(all_actors.make(kind)(name), name) for name, kind in usual.items()]:
        wait_for(actor, name)
    (all_actors.folder / "log.jsonl").write_text("")
    return all_actors


def wait_for(actor: Any, name: str) -> None:
    """Until it has done whatever the last test left in its mailbox, restarts included."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ray.get(actor.transfer.remote(None, None) if name.startswith("rollout") else actor.ping.remote())
        except RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def configuration(**sections: dict[str, Any]) -> PPOConfig:
    """4 prompts a step in 2 groups, one rank, one minibatch, no calibration, no evaluation; unless told otherwise."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"name": "fake", "seed": 5},
        "model": {"policy": "p", "reward_model": "r"},
        "data": {"source": "d"},
        "rollout": {"actors": 2, "prompts_per_step": 4, "group_size": 2},
        "reward": {"calibration_samples": 0},
        "ppo": {"steps": 3, "epochs": 2, "minibatches": 1},
        "learner": {"ranks": 1},
        "evaluation": {"prompts": 0},
    }
    names = defaults.keys() | sections.keys()
    return PPOConfig(**{name: defaults.get(name, {}) | sections.get(name, {}) for name in names})


def publication(version: int) -> Publication:
    return Publication(version=version, parts=[], fingerprint=f"weights {version}", num_bytes=4096, probe=None)


@dataclass
class Learner:
    """What the ranks of a learner group do, as far as the coordinator can tell."""

    coordinator: Coordinator
    config: PPOConfig
    before_publish: Callable[[int], Awaitable[None]] | None = None
    shares: dict[int, list[RankShare]] = field(default_factory=dict)
    samples: dict[int, list[TrajectoryInfo]] = field(default_factory=dict)
    """Of each step, over all ranks, rank after rank."""
    calibration: dict[str, tuple[float, float]] | None = None

    async def run(self, start: int = 0, stop: int | None = None) -> None:
        await self.coordinator.begin(start)
        await self.coordinator.publish(publication(start))
        if start == 0:
            self.calibration = await self.coordinator.calibration()
        reports: list[asyncio.Task[None]] = []
        for step in range(start, self.config.ppo.steps if stop is None else stop):
            ranks = range(self.config.learner.ranks)
            shares = await asyncio.gather(*(self.coordinator.next_share(step, rank) for rank in ranks))
            await asyncio.gather(*(self.coordinator.agree(step, rank, []) for rank in ranks))
            self.shares[step] = list(shares)
            self.samples[step] = [await ref for share in shares for ref in share.refs]
            if self.before_publish:
                await self.before_publish(step)
            await self.coordinator.publish(publication(step + 1))
            report = self.coordinator.report(step + 1, {"own": 1.0, **shares[0].metrics})
            reports.append(asyncio.create_task(report))
        await asyncio.gather(*reports)

    def keys(self, step: int) -> list[tuple[int, int]]:
        return sorted((s.prompt_id, s.sample) for s in self.samples[step])


def coordinator_of(
    actors: Actors, config: PPOConfig, prompts: list[np.ndarray] = PROMPTS, *, attempt: int = 0
) -> Coordinator:
    makers = {kind: actors.make(kind) for kind in ("rollout", "reward")}
    return Coordinator(config, makers, prompts=prompts, heldout=HELDOUT, attempt=attempt)


def run(
    actors: Actors,
    config: PPOConfig,
    play: Callable[[Coordinator, Learner], Coroutine[Any, Any, None]] | None = None,
    *,
    prompts: list[np.ndarray] = PROMPTS,
) -> tuple[Learner, Snapshot]:
    """A whole run in an event loop of its own: `play`, or the learner from step 0 and then `finish`."""

    async def whole(coordinator: Coordinator, learner: Learner) -> None:
        await learner.run()
        await coordinator.finish()

    async def main() -> tuple[Learner, Snapshot]:
        coordinator = coordinator_of(actors, config, prompts)
        learner = Learner(coordinator, config)
        try:
            await asyncio.wait_for((play or whole)(coordinator, learner), PATIENCE)
        except TimeoutError:
            snapshot, members = await coordinator.poll(0, 0), await coordinator.members()
            lines = [str(line) for line in (snapshot.doing, *members, *snapshot.events[-12:])]
            pytest.fail("\n".join(["it hangs:", *lines]))
        return learner, await coordinator.poll(0, 0)

    return asyncio.run(main())


def failing_run(actors: Actors, config: PPOConfig, **options: Any) -> tuple[str, Snapshot]:
    """The sentence with which a run ends, as the learner hears it and as the driver polls it."""
    snapshots: list[Snapshot] = []

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        try:
            await learner.run()
            await coordinator.finish()
        finally:
            snapshots.append(await coordinator.poll(0, 0))

    with pytest.raises(RunFailed) as error:
        run(actors, config, play, **options)
    sentence = str(error.value)
    assert snapshots[0].failed == sentence
    assert [event["reason"] for event in events(snapshots[0], "failed")] == [sentence]
    assert "\n" not in sentence
    return sentence, snapshots[0]


def events(snapshot: Snapshot, kind: str) -> list[dict[str, Any]]:
    return [event for event in snapshot.events if event["event"] == kind]


def expected_keys(config: PPOConfig, step: int) -> list[tuple[int, int]]:
    count = config.rollout.prompts_per_step
    return [(p, s) for p in range(step * count, (step + 1) * count) for s in range(config.rollout.samples_per_prompt)]


# ---------------------------------------------------------------------- lag and order


@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_generation_is_ahead_by_the_lag_and_not_a_group_more(actors: Actors, max_lag: int) -> None:
    config = configuration(rollout={"max_lag": max_lag}, ppo={"steps": 5})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def hold(step: int) -> None:
            allowed = 2 * min(step + 1 + max_lag, 5)
            while len(actors.log("generate")) < allowed:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            assert len(actors.log("generate")) == allowed

        learner.before_publish = hold
        await learner.run()

    learner, _ = run(actors, config, play)
    for step, samples in learner.samples.items():
        assert {sample.policy_version for sample in samples} == {max(0, step - max_lag)}


def test_a_sampler_loads_each_version_before_it_generates_with_it(actors: Actors) -> None:
    run(actors, configuration())
    for name in ("rollout 0", "rollout 1"):
        calls = [(line["call"], line["version"]) for line in actors.log("load", "generate", actor=name)]
        assert calls == [
            ("load", 0),
            ("generate", 0),
            ("load", 1),
            ("generate", 1),
            ("load", 2),
            ("generate", 2),
            ("load", 3),
        ]


def test_with_fixed_dispatch_groups_go_to_the_same_samplers_in_every_run(actors: Actors) -> None:
    config = configuration(rollout={"prompts_per_step": 6, "dispatch": "fixed"}, ppo={"steps": 2})
    run(actors, config)
    groups = [[(p, 0), (p + 1, 0)] for p in range(0, 12, 2)]
    went_to = {tuple(map(tuple, line["keys"])): line["actor"] for line in actors.log("generate")}
    assert went_to == {tuple(group): f"rollout {number % 2}" for number, group in enumerate(groups)}


def test_a_group_is_scored_in_one_call_whoever_generates_and_scores(actors: Actors) -> None:
    """What one forward pass holds never depends on arrival."""
    for samplers, scorers in ((1, 1), (2, 1), (2, 2)):
        (actors.folder / "log.jsonl").write_text("")
        config = configuration(rollout={"actors": samplers, "prompts_per_step": 5}, reward={"actors": scorers})
        run(actors, config)
        scored = sorted([tuple(key) for key in line["keys"]] for line in actors.log("score"))
        ids = [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9], [10, 11], [12, 13], [14]]
        assert scored == [[(p, 0) for p in group] for group in ids]


def test_seeds_are_those_of_the_prompt_and_sample(actors: Actors) -> None:
    config = configuration(rollout={"prompts_per_step": 2, "group_size": 6, "samples_per_prompt": 3})
    run(actors, config)
    seen = {
        tuple(key): seed
        for line in actors.log("generate")
        for key, seed in zip(line["keys"], line["seeds"], strict=True)
    }
    assert seen == {(p, s): seed_of(5, "sample", p, s) for p in range(6) for s in range(3)}


# ---------------------------------------------------------------------- shares


def test_every_sample_is_in_one_share_and_minibatches_do_not_know_the_ranks(actors: Actors) -> None:
    minibatches: dict[int, dict[Any, int]] = {}
    for ranks in (1, 2, 3):
        config = configuration(
            rollout={"prompts_per_step": 8, "group_size": 8, "samples_per_prompt": 2},
            ppo={"steps": 2, "epochs": 2, "minibatches": 2},
            learner={"ranks": ranks},
        )
        learner, _ = run(actors, config)
        minibatches[ranks] = {}
        for step, shares in learner.shares.items():
            assert learner.keys(step) == expected_keys(config, step)
            remaining = iter(learner.samples[step])
            for share in shares:
                keys = [(s.prompt_id, s.sample) for s in islice(remaining, len(share.refs))]
                assert keys == sorted(keys)
                assert len(share.refs) > 0
                assert share.responses == 16
                assert share.golds == {(p, s): p / 2 for p, s in keys}
                assert [len(epoch) for epoch in share.minibatch_of] == [len(keys)] * 2
                for epoch, assignment in enumerate(share.minibatch_of):
                    minibatches[ranks] |= {(epoch, *key): m for key, m in zip(keys, assignment, strict=True)}
                assert share.metrics == shares[0].metrics
    assert minibatches[1] == minibatches[2] == minibatches[3]
    assert set(Counter(minibatches[1].values()).values()) == {32}


def test_a_row_tells_what_its_step_took_and_that_its_weights_are_proven(actors: Actors) -> None:
    _, snapshot = run(actors, configuration())
    assert [row["train/global_step"] for row in snapshot.rows] == [1, 2, 3]
    row = snapshot.rows[0]
    assert row.items() >= {"attempt": 0, "own": 1.0, "reward/gold/mean": (0 + 1 + 2 + 3) / 4 / 2}.items()
    assert row.items() >= {"rollout/failed": 0, "rollout/retried": 0, "time/rollout": 1.0, "time/reward": 0.25}.items()
    synced = {"version": 1, "seconds": 0.25, "bytes": 4096, "probe_gap": 1e-7, "mismatch": 0}
    assert row.items() >= {f"sync/{name}": value for name, value in synced.items()}.items()
    assert row["rollout/workers"] == 2


# ---------------------------------------------------------------------- deaths


@pytest.mark.parametrize("names", [["rollout 1"], ["rollout 0", "rollout 1"]])
def test_a_sampler_killed_while_it_generates_loses_and_doubles_nothing(actors: Actors, names: list[str]) -> None:
    actors.behave(die={f"{name} generate": [2] for name in names})
    config = configuration(ppo={"steps": 4})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def wait_for_recovery(step: int) -> None:
            while step == 1 and len(events(await coordinator.poll(0, 0), "recovered")) < len(names):
                await asyncio.sleep(0.02)

        learner.before_publish = wait_for_recovery
        await learner.run()
        await coordinator.finish()

    learner, snapshot = run(actors, config, play)
    for step in range(4):
        assert learner.keys(step) == expected_keys(config, step)
        assert {(sample.policy_version, sample.attempt) for sample in learner.samples[step]} == {(step, 0)}
    assert sorted(event["actor"] for event in events(snapshot, "failure")) == names
    assert sorted(event["actor"] for event in events(snapshot, "recovered")) == names
    first, second, *later = [row["rollout/retried"] for row in snapshot.rows]
    assert (first, later) == (0, [0, 0])
    assert second >= 2 * len(names), "a chunk may meet both deaths"
    for name in names:
        by_process: dict[int, list[str]] = {}
        for line in actors.log("load", "generate", actor=name):
            by_process.setdefault(line["pid"], []).append(line["call"])
        assert len(by_process) == 2
        assert [calls[0] for calls in by_process.values()] == ["load", "load"], "weights come before the first prompt"


def test_a_sampler_killed_while_idle_gets_the_latest_weights_before_it_works(actors: Actors) -> None:
    config = configuration(ppo={"steps": 4})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def kill(step: int) -> None:
            if step == 1:
                ray.kill(actors.made["rollout 0"], no_restart=False)

        learner.before_publish = kill
        await learner.run()
        await coordinator.finish()

    learner, snapshot = run(actors, config, play)
    assert [learner.keys(step) for step in range(4)] == [expected_keys(config, step) for step in range(4)]
    versions = {step: {s.policy_version for s in samples} for step, samples in learner.samples.items()}
    assert versions == {step: {step} for step in range(4)}
    assert snapshot.failed is None


def test_what_was_generated_survives_the_scorer_that_dies(actors: Actors) -> None:
    actors.behave(die={"reward 0 score": [2]})
    config = configuration()
    learner, snapshot = run(actors, config)
    assert [learner.keys(step) for step in range(3)] == [expected_keys(config, step) for step in range(3)]
    assert sum(row["rollout/retried"] for row in snapshot.rows) == 2
    assert [event["actor"] for event in events(snapshot, "failure")] == ["reward 0"]
    assert len(actors.log("generate")) == 6, "nothing is generated twice"


def test_weights_sent_again_after_a_death_must_be_proven_too(actors: Actors) -> None:
    """The sampler that comes back tells another fingerprint at its second load of version 1."""
    actors.behave(die={"rollout 0 generate": [2], "rollout 1 generate": [2]})
    config = configuration()

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def lie(step: int) -> None:
            if step == 0:
                asyncio.get_running_loop().create_task(lie_after_death())

        async def lie_after_death() -> None:
            while len(actors.log("generate")) < 4:
                await asyncio.sleep(0.02)
            wrong = {"fingerprint": "other weights"}
            actors.behave(answer={"rollout 0 1": wrong, "rollout 1 1": wrong})

        learner.before_publish = lie
        await learner.run()
        await coordinator.finish()

    with pytest.raises(RunFailed, match="another fingerprint than the learner published for version 1"):
        run(actors, config, play)


def test_a_prompt_that_kills_whoever_reads_it_is_found_and_given_up(
    actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaths are nobody's fault until one prompt was alone with the actor every time."""
    monkeypatch.setattr(dispatch, "LOST_ACTORS", 1)
    actors.behave(deadly=[[1, 0]])
    config = configuration(rollout={"group_size": 4}, ppo={"steps": 1}, evaluation={"prompts": 0})
    learner, snapshot = run(actors, config)
    assert learner.keys(0) == [key for key in expected_keys(config, 0) if key != (1, 0)]
    (given_up,) = events(snapshot, "quarantined")
    assert (given_up["prompt_id"], given_up["sample"]) == (1, 0) and "actors died over it" in given_up["reason"]


def test_an_actor_that_never_comes_back_is_said_again_and_again_and_ends_nothing(
    actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "AWAY_SECONDS", 0.0)
    actors.behave(die={"rollout 9 generate": [1]})
    facts = EngineFacts(model="", max_model_len=8, eos_ids=(2,), medium="object_ref")
    start = ray.remote(concurrency_groups=GROUPS)(RolloutActor).options(num_cpus=0, max_task_retries=0)
    mortal = start.remote(RolloutSection(), facts, partial(FakeSampler, actors.folder, "rollout 9"))
    ray.get(mortal.ping.remote())
    others = Actors(actors.folder, actors.made | {"rollout 0": mortal})
    config = configuration(ppo={"steps": 3})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def until_said_twice(step: int) -> None:
            while step == 1 and len(events(await coordinator.poll(0, 0), "away")) < 2:
                await asyncio.sleep(0.05)

        learner.before_publish = until_said_twice
        await learner.run()

    learner, snapshot = run(others, config, play)
    assert [learner.keys(step) for step in range(3)] == [expected_keys(config, step) for step in range(3)]
    assert {event["actor"] for event in events(snapshot, "away")} == {"rollout 0"}


def test_a_sampler_that_is_stopped_is_named_and_started_anew(actors: Actors) -> None:
    """A stopped process gives no error and no answer."""
    actors.behave(stop={"rollout 0 generate": [2]})
    config = configuration(run={"name": "x", "patience": 8.0}, ppo={"steps": 3})
    learner, snapshot = run(actors, config)
    assert [learner.keys(step) for step in range(3)] == [expected_keys(config, step) for step in range(3)]
    reasons = [event["reason"] for event in events(snapshot, "failure") if event["actor"] == "rollout 0"]
    assert any("no answer for 8 s (run.patience)" in reason for reason in reasons), (
        reasons
    )  # a busy machine adds others


def test_only_losses_without_a_step_between_them_count(actors: Actors) -> None:
    config = configuration(learner={"max_failures": 1}, ppo={"steps": 3})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        await learner.run(0, 1)
        assert await coordinator.group_lost("rank 1: killed on a") == ""
        await learner.run(1, 2)
        assert await coordinator.group_lost("rank 0: killed on b") == ""
        assert "lost 2 times without a step between" in await coordinator.group_lost("rank 0: killed on b")

    _, snapshot = run(actors, config, play)
    assert [(event["step"], event["reason"]) for event in events(snapshot, "restart")] == [(1, "rank 1: killed on a")]


def test_the_ledger_tells_each_samples_life(actors: Actors) -> None:
    """Dispatched, generated, scored, trained; a sample whose actor died is dispatched twice."""
    actors.behave(die={"rollout 0 generate": [2]})
    config = configuration(ppo={"steps": 2})
    _, snapshot = run(actors, config)
    assert [ledger.step for ledger, _ in snapshot.ledgers] == [1, 2]
    for ledger, loads in snapshot.ledgers:
        columns = {name: values.tolist() for name, values in ledger.columns.items()}
        lives = sorted(zip(columns["prompt_id"], columns["sample"], columns["state"], strict=True))
        expected = expected_keys(config, ledger.step - 1)
        for state in (State.GENERATED, State.SCORED, State.TRAINED):
            assert [(p, s) for p, s, its in lives if its == state] == expected
        assert {(p, s) for p, s, its in lives if its == State.DISPATCHED} == set(expected)
        assert {load["version"] for load in loads} >= {ledger.step}
        assert all(load["matched"] for load in loads)


# ---------------------------------------------------------------------- samples that are lost, actors that come and go


def test_lost_samples_are_made_again_and_every_rank_gets_another_share(actors: Actors) -> None:
    config = configuration(learner={"ranks": 2}, ppo={"steps": 1, "minibatches": 2})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        await coordinator.begin(0)
        await coordinator.publish(publication(0))
        await asyncio.gather(*(coordinator.next_share(0, rank) for rank in range(2)))
        agreed = [asyncio.create_task(coordinator.agree(0, rank, [(1, 0)] if rank else [])) for rank in range(2)]
        shares = await asyncio.gather(*agreed)
        assert sorted(key for share in shares if share for key in share.golds) == expected_keys(config, 0)
        assert [len(share.refs) for share in shares if share] == [2, 2]
        assert await asyncio.gather(*(coordinator.agree(0, rank, []) for rank in range(2))) == [None, None]
        await coordinator.publish(publication(1))
        await coordinator.report(1, {})
        await coordinator.finish()

    _, snapshot = run(actors, config, play)
    asked = [tuple(key) for line in actors.log("generate") for key in line["keys"]]
    assert Counter(asked) == {(0, 0): 1, (1, 0): 2, (2, 0): 1, (3, 0): 1}, "nothing else is made again"
    seeds = {
        s for line in actors.log("generate") for k, s in zip(line["keys"], line["seeds"], strict=True) if k[0] == 1
    }
    assert seeds == {seed_of(5, "sample", 1, 0)}
    (event,) = events(snapshot, "lost_samples")
    assert event["reason"] == "1 samples of step 1 were lost with their host: made again"
    (ledger, _) = snapshot.ledgers[0]
    trained = ledger.columns["state"] == State.TRAINED
    assert sorted(ledger.columns["prompt_id"][trained].tolist()) == [0, 1, 2, 3], "each is trained on once"


def test_a_live_run_grows_and_shrinks(actors: Actors) -> None:
    config = configuration(rollout={"group_size": 1, "max_actors": 3}, ppo={"steps": 6})

    async def until(coordinator: Coordinator, *names: str) -> None:
        while {m.name for m in await coordinator.members() if m.state in ("ready", "busy")} != set(names):
            await asyncio.sleep(0.02)

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def scale(step: int) -> None:
            if step == 1:
                assert await coordinator.scale(rollout=3, reward=1) == ""
                await until(coordinator, "rollout 0", "rollout 1", "rollout 2", "reward 0")
            if step == 3:
                assert await coordinator.scale(rollout=1) == ""
                await until(coordinator, "rollout 0", "reward 0")

        learner.before_publish = scale
        await learner.run()
        await coordinator.finish()

    learner, snapshot = run(actors, config, play)
    for name in ("rollout 1", "rollout 2", "reward 1"):
        actors.made.pop(name)  # they are gone for good
    assert [learner.keys(step) for step in range(6)] == [expected_keys(config, step) for step in range(6)]
    assert [row["fleet/rollout_actors"] for row in snapshot.rows] == [2, 3, 3, 1, 1, 1]
    assert [row["fleet/reward_actors"] for row in snapshot.rows] == [2, 1, 1, 1, 1, 1]
    assert {line["actor"] for line in actors.log("generate") if line["version"] in (2, 3)} >= {"rollout 2"}
    calls = [line["call"] for line in actors.log("load", "generate", actor="rollout 2")]
    assert calls[0] == "load", "weights come before the first group"
    loads = {(load["member"], load["version"]) for _, step in snapshot.ledgers for load in step if load["matched"]}
    assert ("rollout 2", 3) in loads, "a late joiner proves its weights like the others"
    assert sorted(event["actor"] for event in events(snapshot, "left")) == ["reward 1", "rollout 1", "rollout 2"]
    assert not events(snapshot, "failure")


@pytest.mark.parametrize(
    ("asked", "sections", "sentence"),
    [
        ({"rollout": 5}, {}, "rollout = 5: more than 4 (rollout.max_actors)"),
        ({"rollout": 1}, {}, "rollout = 1: fewer than 2 (rollout.min_actors)"),
        ({"reward": 0}, {}, "reward = 0: fewer than 1"),
        ({"rollout": 3}, {"weights": {"backend": "nccl"}}, "weights.backend = nccl: its group of samplers is fixed"),
    ],
)
def test_what_a_fleet_cannot_be_is_refused(
    actors: Actors, asked: dict[str, int], sections: dict[str, Any], sentence: str
) -> None:
    config = configuration(rollout={"min_actors": 2, "max_actors": 4}, **sections)

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        assert (await coordinator.scale(**asked)).startswith(sentence)
        assert len(await coordinator.members()) == 4

    _, snapshot = run(actors, config, play)
    assert not events(snapshot, "scaled")


def test_a_long_response_holds_back_its_own_group_only(actors: Actors) -> None:
    actors.behave(hold=[[0, 0]])
    config = configuration(rollout={"actors": 1, "prompts_per_step": 8}, ppo={"steps": 1})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        running = asyncio.create_task(learner.run())
        while len(actors.log("score")) < 3:
            await asyncio.sleep(0.02)
        assert [0, 0] not in [key for line in actors.log("score") for key in line["keys"]]
        actors.behave()
        await running

    learner, _ = run(actors, config, play)
    assert learner.keys(0) == expected_keys(config, 0)


# ---------------------------------------------------------------------- failures that are the data's


@pytest.mark.parametrize("call", ["generate", "score"])
@pytest.mark.parametrize("max_attempts", [1, 2, 3, 4])
def test_a_poison_prompt_is_quarantined_alone(actors: Actors, call: str, max_attempts: int) -> None:
    actors.behave(**{f"poison_{call}": [(5, 0)]})
    config = configuration(
        rollout={"prompts_per_step": 8, "group_size": 4, "max_attempts": max_attempts}, ppo={"steps": 2}
    )
    learner, snapshot = run(actors, config)
    assert [p for p, _ in learner.keys(0)] == [p for p in range(8) if p != 5]
    assert learner.keys(1) == expected_keys(config, 1)
    (quarantined,) = events(snapshot, "quarantined")
    assert (quarantined["prompt_id"], quarantined["sample"], quarantined["call"]) == (5, 0, call)
    assert "breaks the whole call" in quarantined["reason"]
    assert [row["rollout/failed"] for row in snapshot.rows] == [1, 0]
    assert learner.shares[0][0].responses == 7
    calls = [line["keys"] for line in actors.log(call) if [5, 0] in line["keys"]]
    alone = [keys for keys in calls if keys == [[5, 0]]]
    assert len(alone) == max_attempts, "only alone does an attempt count"
    assert len(calls) - len(alone) == (2 if call == "generate" else 1), "with all others, then with its group"
    if call == "score":
        assert sum([5, 0] in line["keys"] for line in actors.log("generate")) == 1, "what is generated is kept"
    assert all(not line["others"] for line in actors.log("generate") if line["keys"] == [[5, 0]])


def test_a_sample_that_fails_is_tried_again_with_the_same_seed_up_to_the_limit(actors: Actors) -> None:
    actors.behave(fail_generate=[(1, 0, 2), (2, 1, 99)], fail_score=[(3, 1, 1)])
    config = configuration(rollout={"samples_per_prompt": 2, "max_attempts": 3}, ppo={"steps": 1})
    learner, snapshot = run(actors, config)
    attempts = {(s.prompt_id, s.sample): s.attempt for s in learner.samples[0]}
    assert attempts == {key: {(1, 0): 2}.get(key, 0) for key in expected_keys(config, 0) if key != (2, 1)}
    (event,) = events(snapshot, "quarantined")
    assert (event["prompt_id"], event["sample"], event["call"], event["reason"]) == (2, 1, "generate", "told to fail")
    assert snapshot.rows[0]["rollout/failed"] == 1
    assert snapshot.rows[0]["rollout/retried"] == 2 + 2 + 1
    seeds: dict[Any, set[int]] = {}
    for line in actors.log("generate"):
        for key, seed in zip(line["keys"], line["seeds"], strict=True):
            seeds.setdefault(tuple(key), set()).add(seed)
    assert all(len(different) == 1 for different in seeds.values())


def test_half_a_step_may_fail_but_not_more(actors: Actors) -> None:
    config = configuration(rollout={"max_attempts": 2}, ppo={"steps": 1})
    actors.behave(fail_generate=[(0, 0, 9), (2, 0, 9)])
    learner, _ = run(actors, config)
    assert learner.keys(0) == [(1, 0), (3, 0)]
    actors.behave(fail_generate=[(0, 0, 9), (2, 0, 9), (3, 0, 9)])
    sentence, _ = failing_run(actors, config)
    assert sentence == "3 of 4 samples of step 1 failed 2 times and 2 are needed; the last reason: told to fail"


def test_too_few_samples_for_every_rank_end_the_run(actors: Actors) -> None:
    """With 2 of 4 samples left, one of two ranks would have nothing to train on."""
    actors.behave(fail_score=[(0, 0, 9), (1, 0, 9)])
    config = configuration(ppo={"steps": 1, "minibatches": 2}, learner={"ranks": 2})
    sentence, _ = failing_run(actors, config)
    assert "2 of 4 samples of step 1 failed 3 times and 4 are needed" in sentence


# ---------------------------------------------------------------------- weights that are not proven


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"fingerprint": "other"}, "rollout 1 answered version 2 with another fingerprint"),
        (
            {"version": 1},
            "rollout 1 answered version 1 with another fingerprint than the learner published for version 2",
        ),
        ({"probe_gap": 2e-3}, r"rollout 1 gives the probe .* version 2 \(mean gap 0.002 nats, allowed 0.001\)"),
        ({"probe_gap": float("nan")}, r"mean gap nan nats"),
    ],
)
def test_a_sampler_that_does_not_hold_the_weights_ends_the_run(
    actors: Actors, answer: dict[str, Any], sentence: str
) -> None:
    actors.behave(answer={"rollout 1 2": answer})
    with pytest.raises(RunFailed, match=sentence):
        raise RunFailed(failing_run(actors, configuration())[0])


def test_a_sampler_that_cannot_load_ends_the_run(actors: Actors) -> None:
    actors.behave(refuse=[1])
    sentence, _ = failing_run(actors, configuration())
    assert sentence.startswith("rollout 0 could not load weights version 1: ")
    assert sentence.endswith("the bucket is gone")


@pytest.mark.parametrize(
    ("sections", "gap", "passes"),
    [
        ({"rollout": {"dtype": "bfloat16"}}, 0.09, True),
        ({"rollout": {"dtype": "bfloat16"}}, 0.11, False),
        ({"weights": {"max_logprob_gap": 0.1}}, 0.06, True),
        ({"weights": {"max_logprob_gap": 1e-6}}, 2e-6, False),
    ],
)
def test_the_allowed_gap_follows_data_type_and_setting(
    actors: Actors, sections: dict[str, Any], gap: float, passes: bool
) -> None:
    actors.behave(answer={"rollout 0 1": {"probe_gap": gap}})
    config = configuration(**{"rollout": {}, **sections}, ppo={"steps": 1})
    if passes:
        _, snapshot = run(actors, config)
        assert snapshot.rows[-1]["sync/probe_gap"] == gap
    else:
        assert f"allowed {config.weights.max_logprob_gap or 0.1:g}" in failing_run(actors, config)[0]


# ---------------------------------------------------------------------- restarts, evaluation, calibration


def test_a_learner_that_begins_again_gets_the_same_batches_with_its_own_weights(actors: Actors) -> None:
    config = configuration(rollout={"max_lag": 1}, ppo={"steps": 4})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        await learner.run(stop=3)
        before = {step: learner.keys(step) for step in range(3)}
        await learner.run(start=1)
        await coordinator.finish()
        assert [learner.keys(step) for step in (1, 2)] == [before[1], before[2]]

    learner, snapshot = run(actors, config, play)
    assert [learner.keys(step) for step in range(4)] == [expected_keys(config, step) for step in range(4)]
    versions = {step: {s.policy_version for s in samples} for step, samples in learner.samples.items()}
    assert versions == {0: {0}, 1: {1}, 2: {1}, 3: {2}}, "lag 1 counts from the weights of the restart"
    assert [(row["train/global_step"], row["attempt"]) for row in snapshot.rows] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (2, 1),
        (3, 1),
        (4, 1),
    ]
    assert [(event["event"], event["step"]) for event in snapshot.events] == [("started", 0), ("restart", 1)]
    seeds = [
        {tuple(key): seed for key, seed in zip(line["keys"], line["seeds"], strict=True)}
        for line in actors.log("generate")
    ]
    assert all(seed == seed_of(5, "sample", *key) for line in seeds for key, seed in line.items())


def test_a_learner_that_dies_in_the_middle_of_a_step_leaves_nothing_behind(actors: Actors) -> None:
    """Generation is under way and a rank waits when the next group begins."""
    actors.behave(seconds={"generate": 0.3})
    config = configuration()

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        await coordinator.begin(0)
        await coordinator.publish(publication(0))
        waiting = asyncio.create_task(coordinator.next_share(0, 0))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await learner.run()
        await coordinator.finish()

    learner, snapshot = run(actors, config, play)
    assert [learner.keys(step) for step in range(3)] == [expected_keys(config, step) for step in range(3)]
    assert {row["attempt"] for row in snapshot.rows} == {1}


def test_a_resumed_run_goes_on_counting_attempts(actors: Actors) -> None:
    config = configuration()

    async def main() -> Snapshot:
        coordinator = coordinator_of(actors, config, PROMPTS, attempt=3)
        await Learner(coordinator, config).run(start=2)
        return await coordinator.poll(0, 0)

    snapshot = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert [(event["event"], event["attempt"]) for event in snapshot.events] == [("started", 3)]
    assert [row["attempt"] for row in snapshot.rows] == [3]


def test_finish_waits_for_the_evaluation_of_the_last_weights(actors: Actors) -> None:
    config = configuration(ppo={"steps": 2}, evaluation={"prompts": 8, "every": 0})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        async def slower(step: int) -> None:
            if step == 1:
                actors.behave(seconds={"generate": 0.3, "score": 0.3})

        learner.before_publish = slower
        await learner.run()
        unfinished = await coordinator.poll(0, 0)
        assert 2 not in [row["train/global_step"] for row in unfinished.rows if "eval/heldout/score/mean" in row]
        await coordinator.finish()

    _, snapshot = run(actors, config, play)
    rows = {row["train/global_step"]: row for row in snapshot.rows if "eval/heldout/score/mean" in row}
    assert sorted(rows) == [0, 2]
    assert rows[2].items() >= {"eval/heldout/prompts": 3, "eval/heldout/score/mean": 1.0}.items(), "all 3 of HELDOUT"
    seeds = {seed_of(5, "heldout", number) for number in range(3)}
    evaluated = [line["version"] for line in actors.log("generate") if seeds & set(line["seeds"])]
    assert sorted(set(evaluated)) == [0, 2], "each evaluation samples with the weights it speaks of"


def test_evaluations_come_as_often_as_asked(actors: Actors) -> None:
    _, snapshot = run(actors, configuration(ppo={"steps": 5}, evaluation={"prompts": 2, "every": 2}))
    evaluated = [row["train/global_step"] for row in snapshot.rows if "eval/heldout/score/mean" in row]
    assert sorted(evaluated) == [0, 2, 4, 5]


def test_calibration_is_the_mean_and_std_of_the_first_policy(actors: Actors) -> None:
    config = configuration(reward={"calibration_samples": 6}, rollout={"max_lag": 1}, ppo={"steps": 2})
    learner, snapshot = run(actors, config)
    scores = np.arange(6.0)
    assert learner.calibration == {"reward": (scores.mean(), pytest.approx(scores.std(), rel=1e-12))}
    (event,) = events(snapshot, "calibrated")
    assert event.items() >= {"model": "reward", "mean": 2.5, "responses": 6}.items()
    seeds = {seed_of(5, "calibration", number) for number in range(6)}
    assert [line["version"] for line in actors.log("generate") if seeds & set(line["seeds"])] == [0, 0, 0]
    assert learner.keys(0) == expected_keys(config, 0)


def test_each_model_is_calibrated_and_evaluated_by_itself(actors: Actors) -> None:
    actors.behave(models={"brevity": 4.0, "cost": -2.0})
    config = configuration(reward={"calibration_samples": 6}, evaluation={"prompts": 3}, ppo={"steps": 1})
    learner, snapshot = run(actors, config)
    std = pytest.approx(np.arange(6.0).std(), rel=1e-12)
    assert learner.calibration is not None and list(learner.calibration) == ["reward", "brevity", "cost"]
    assert {name: (mean, sd / abs(mean / 2.5)) for name, (mean, sd) in learner.calibration.items()} == {
        "reward": (2.5, std),
        "brevity": (10.0, std),
        "cost": (-5.0, std),
    }
    assert [event["model"] for event in events(snapshot, "calibrated")] == ["reward", "brevity", "cost"]
    rows = [row for row in snapshot.rows if "eval/heldout/score/mean" in row]
    assert {(row["eval/heldout/brevity/score/mean"], row["eval/heldout/cost/score/mean"]) for row in rows} == {(4, -2)}


def test_without_samples_there_is_no_calibration(actors: Actors) -> None:
    learner, _ = run(actors, configuration(ppo={"steps": 1}))
    assert learner.calibration == {}


def test_a_calibration_without_scores_ends_the_run(actors: Actors) -> None:
    actors.behave(fail_score=[(number, 0, 9) for number in range(5)])
    sentence, _ = failing_run(actors, configuration(reward={"calibration_samples": 6}))
    assert sentence == "calibration scored fewer than 2 responses; the last reason: told to fail"


def test_a_reward_model_that_tells_nothing_apart_ends_the_run(actors: Actors) -> None:
    """Nobody is left waiting for a scale."""
    actors.behave(models={"helpful": 0.0})
    config = configuration(reward={"calibration_samples": 6}, model={"rewards": [{"name": "helpful", "source": "h"}]})
    sentence, snapshot = failing_run(actors, config)
    assert sentence.startswith("model.rewards helpful gives every sampled response the same score (0)")
    assert not events(snapshot, "calibrated")


def test_borrowed_prefixes_in_another_unit_are_said_once(actors: Actors) -> None:
    actors.behave(models={"early": 2.5})
    models = {"rewards": [{"name": "early", "source": "e", "weight": 0.0}]}
    reward = {"calibration_samples": 6, "prefixes_from": "early"}
    _, snapshot = run(actors, configuration(reward=reward, model=models, ppo={"steps": 2}))
    (warning,) = events(snapshot, "warning")
    assert warning["reason"].startswith("reward.prefixes_from = early: its scores spread by 4.27, those of model")


# ---------------------------------------------------------------------- nobody waits for a run that is over


def test_a_waiting_learner_is_released_when_the_run_fails(actors: Actors) -> None:
    actors.behave(seconds={"generate": 1.0})

    async def play(coordinator: Coordinator, learner: Learner) -> None:
        waiting = asyncio.create_task(learner.run())
        await asyncio.sleep(0.3)
        with pytest.raises(RunFailed, match="loss is not finite"):
            await coordinator.fail("the loss is not finite")
        start = time.monotonic()
        with pytest.raises(RunFailed, match="loss is not finite"):
            await waiting
        assert time.monotonic() - start < 0.5
        for later in (coordinator.next_share(1, 0), coordinator.calibration(), coordinator.fail("a second reason")):
            with pytest.raises(RunFailed, match="loss is not finite"):
                await later

    _, snapshot = run(actors, configuration(), play)
    assert snapshot.failed == "the loss is not finite"


def test_a_broken_loop_ends_the_run_instead_of_hanging(actors: Actors) -> None:
    sentence, _ = failing_run(actors, configuration(), prompts=[])
    assert sentence.startswith("the coordinator broke: ZeroDivisionError: ")


def test_evaluation_metrics_are_means_with_a_standard_error() -> None:
    def scored(length: int, finish: Finish, score: float, gold: float | None) -> TrajectoryInfo:
        return TrajectoryInfo(
            prompt_id=0,
            sample=0,
            attempt=0,
            policy_version=0,
            prompt_len=3,
            length=length,
            finish=finish,
            scores={MAIN: score},
            gold=gold,
        )

    row = evaluation_metrics([scored(5, Finish.EOS, 1.0, 3.0), scored(9, Finish.LENGTH, 2.0, 5.0)])
    assert row == {
        "eval/heldout/score/mean": 1.5,
        "eval/heldout/response_length/mean": 4.0,
        "eval/heldout/eos_frac": 0.5,
        "eval/heldout/prompts": 2,
        "eval/heldout/gold/mean": 4.0,
        "eval/heldout/gold/sem": 1.0 / 2**0.5,
    }
    assert "eval/heldout/gold/mean" not in evaluation_metrics([scored(5, Finish.EOS, 1.0, None)])


@pytest.mark.parametrize(("begins_at", "kept"), [(1, [1]), (0, [])])
def test_a_checkpointed_step_keeps_its_row_when_its_rank_dies_before_the_samplers_answer(
    actors: Actors, begins_at: int, kept: list[int]
) -> None:
    async def main() -> list[float]:
        coordinator = coordinator_of(actors, configuration())
        await coordinator.begin(0)
        coordinator._trained[1] = []
        coordinator._confirmed[1] = asyncio.create_task(asyncio.sleep(PATIENCE))  # type: ignore[arg-type]
        report = asyncio.create_task(coordinator.report(1, {"policy/loss": 0.5}))
        await asyncio.sleep(0)
        await coordinator.begin(begins_at)
        report.cancel()
        return [row["train/global_step"] for row in (await coordinator.poll(0, 0)).rows]

    assert asyncio.run(main()) == kept
