"""What the loop itself costs: the real coordinator and fleet on a real Ray, with actors that make and score at once.

    PYTHONPATH=tests python -m bench.loop [SAMPLES]

A few processes stand for all members, since an actor of its own costs 41 MB and a third of a second. Each row is a step
that was measured after one that was not: `step`: from new weights to the last sample; `shares`: all ranks have theirs.
"""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from r3hf_ray.actors.coordinator import Coordinator
from r3hf_ray.actors.pulse import Pulse, pulse
from r3hf_ray.config import PPOConfig
from r3hf_ray.session import ray_session
from r3hf_ray.types import MAIN, Finish, GroupReport, SampleGroup, TrajectoryInfo
from r3hf_ray.weights.contract import Loaded, Publication

HOSTS, RANKS, SCORERS, PARTS = 4, 64, 64, 64
SAMPLERS = (8, 64, 512)


class Host:
    """Serves many members."""

    def __init__(self) -> None:
        self._made: dict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)

    async def ping(self, name: str) -> Pulse:
        return pulse(0)

    async def load_weights(self, name: str, publication: Publication) -> Loaded:
        return Loaded(version=publication.version, fingerprint=publication.fingerprint, probe_gap=0.0, seconds=0.0)

    async def add(self, name: str, group: SampleGroup) -> None:
        infos = [
            TrajectoryInfo(
                prompt_id=request.prompt_id,
                sample=request.sample,
                attempt=0,
                policy_version=0,
                prompt_len=len(request.token_ids),
                length=len(request.token_ids) + 1 + request.seed % 99,
                finish=Finish.EOS,
            )
            for request in group.requests
        ]
        self._made[name].put_nowait((infos, GroupReport(infos=infos, failures=[], seconds=0.0, number=group.number)))

    async def stream(self, name: str) -> AsyncIterator[Any]:
        while True:
            infos, report = await self._made[name].get()
            yield infos
            yield report

    async def score(self, name: str, infos: list[TrajectoryInfo], keys: list[tuple[int, int]]) -> list[Any]:
        scored = [replace(info, scores={MAIN: 1.0}) for info in infos]
        return [*scored, GroupReport(infos=scored, failures=[], seconds=0.0)]


@dataclass(frozen=True)
class Call:
    """A method of a host, for one member; looks like a method of an actor."""

    method: Any
    name: str

    def options(self, **options: Any) -> "Call":
        return Call(self.method.options(**options), self.name)

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.name, *arguments)


class Seat:
    """A member's handle."""

    def __init__(self, host: Any, name: str) -> None:
        self.ping, self.add, self.stream = Call(host.ping, name), Call(host.add, name), Call(host.stream, name)
        self.load_weights, self.score = Call(host.load_weights, name), Call(host.score, name)


@dataclass(frozen=True)
class Seats:
    """Gives members seats at the hosts, in turn."""

    hosts: list[Any]

    def __call__(self, name: str) -> Seat:
        return Seat(self.hosts[int(name.split()[1]) % len(self.hosts)], name)


def measure(samplers: int, samples: int) -> dict[str, float]:
    """Seconds of one step."""
    hosts = [ray.remote(Host).options(num_cpus=0, max_concurrency=4096).remote() for _ in range(HOSTS)]
    config = PPOConfig(
        run={"name": "loop"},
        model={"policy": "p", "reward_model": "r"},
        data={"source": "d"},
        rollout={"actors": samplers, "prompts_per_step": samples, "group_size": 16},
        reward={"actors": SCORERS, "calibration_samples": 0},
        ppo={"steps": 2, "minibatches": 4},
        learner={"ranks": RANKS},
        evaluation={"prompts": 0},
    )
    prompts = [np.arange(100, dtype=np.int32)] * 1000
    makers = {"rollout": Seats(hosts), "reward": Seats(hosts)}
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(config, makers, prompts=prompts, heldout=[])
    ray.get(coordinator.begin.remote(0))
    parts = [ray.put(np.zeros(1000)) for _ in range(PARTS)]
    took: dict[str, float] = {}
    for step in range(2):
        start = time.perf_counter()
        publication = Publication(version=step, parts=parts, fingerprint=f"{step}", num_bytes=1, probe=None)
        ray.get(coordinator.publish.remote(publication))
        took["publish"] = time.perf_counter() - start
        ray.get(coordinator.next_share.remote(step, 0))
        took["step"] = time.perf_counter() - start
        shares = ray.get([coordinator.next_share.remote(step, rank) for rank in range(RANKS)])
        took["shares"] = time.perf_counter() - start - took["step"]
        assert sum(len(share.refs) for share in shares) == samples
        del shares
        start = time.perf_counter()
        ray.get([coordinator.agree.remote(step, rank, []) for rank in range(RANKS)])
        took["agree"] = time.perf_counter() - start
    for actor in (coordinator, *hosts):
        ray.kill(actor)
    return took


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 16_384
    sys.stdout.write(
        "| samplers | publish [s] | step [s] | samples/s | shares [s] | agree [s] |\n|---|---|---|---|---|---|\n"
    )
    with ray_session(4.0):
        for samplers in SAMPLERS:
            took = measure(samplers, samples)
            rate = samples / took["step"]
            line = [f"{took[name]:.2f}" for name in ("publish", "step")] + [f"{rate:,.0f}"]
            line += [f"{took[name]:.2f}" for name in ("shares", "agree")]
            sys.stdout.write(f"| {samplers} | {' | '.join(line)} |\n")
            sys.stdout.flush()
