"""The bare loops: the same work as a PPO step, each kind in one process that may use both cores, without Ray.

| loop         | process | work of one step                                                                    |
|--------------|---------|-------------------------------------------------------------------------------------|
| generate     | sampler | vLLM samples the whole batch in one call, with logprobs                             |
| score        | scorer  | `Scorer.score`: reward model and reference forwards, redistribution                 |
| score by abc | scorer  | the same with `abc`, that is with eager attention; not part of a step               |
| learn        | learner | `PPOLearner.update`: old logprobs and values, then policy and value learning        |
| load weights | sampler | all tensors fingerprinted as for a publication, then vLLM's reload; no Ray, no copy |

The processes live for one repeat's passes: starting them is not what is measured, and their memory is free for the
system's runs. Data flows
as in a step: what is sampled is scored, what is scored is learned from. A pass runs on a given number of threads: on
small matrices one thread may be faster than two, and the better of them is the loop to compare with.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.results import BareStep, Cost
from r3hf_ray.actors.environment import ACTORS
from r3hf_ray.actors.sampler import Sampler, engine_environment
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import step_requests
from r3hf_ray.errors import RunFailed
from r3hf_ray.preflight import check
from r3hf_ray.scoring.scorer import ScoringSettings
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.types import Request, ScoredTrajectory, Trajectory
from r3hf_ray.weights.contract import objection

ABC = "score by abc"
"""Not part of a step: what eager attention, which `abc` alone needs, costs on the same responses."""
START_SECONDS = 300.0
STOP_SECONDS = 10.0

Calls = dict[str, Callable[..., Any]]
"""What a process can be asked to do."""


class BareLoops:
    """The three processes; `step` runs one PPO step's work through them, one loop at a time."""

    def __init__(self, config: PPOConfig, *, cores: int, logs: Path) -> None:
        """Start them, and wait until each has loaded its models.

        Raises:
            RunFailed: one could not.
        """
        plan = check(config)
        self._config = config = plan.config
        self._prompts, self._step = plan.prompts, count()
        section = config.rollout.model_copy(update={"threads": cores})
        engine = (section, replace(plan.engine, medium="in_process"))
        os.environ |= ACTORS | {"OMP_NUM_THREADS": str(cores)}  # read when a child starts and first imports torch
        self._sampler = _Process(_sampler, engine, log=logs / "sampler.txt")
        self._scorer = _Process(_scorer, plan.scoring, log=logs / "scorer.txt")
        self._learner = _Process(_learner, config, log=logs / "learner.txt")
        self._processes = (self._sampler, self._scorer, self._learner)

    def __enter__(self) -> "BareLoops":
        for process in self._processes:
            process.wait()
        self.step(threads=1)  # kernels and caches warm up
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.stop()

    def step(self, *, threads: int) -> BareStep:
        """Every loop once, each on so many threads."""
        number = next(self._step)
        requests = step_requests(self._prompts, self._config.rollout, seed=self._config.run.seed, step=number)
        load, _ = self._sampler.call(threads, "load weights", number)
        generate, trajectories = self._sampler.call(threads, "generate", requests)
        score, scored = self._scorer.call(threads, "score", trajectories)
        learn, metrics = self._learner.call(threads, "learn", scored, number)
        attention, _ = self._scorer.call(threads, ABC, trajectories)
        costs = {"generate": generate, "score": score, "learn": learn, "load weights": load, ABC: attention}
        stages = {name: value for name, value in metrics.items() if name.startswith("time/")}
        return BareStep(threads=threads, costs=costs, stages=stages, tokens=metrics["rollout/response_length/mean"])


class _Process:
    """One child, which answers calls with their cost and result."""

    def __init__(self, make: Callable[..., Calls], *arguments: Any, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = log
        self._process = context.Process(target=_serve, args=(theirs, log, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready."""
        self._receive(START_SECONDS)

    def call(self, threads: int, name: str, *arguments: Any) -> tuple[Cost, Any]:
        """Run one of its calls."""
        self._pipe.send((threads, name, arguments))
        answer: tuple[Cost, Any] = self._receive(START_SECONDS)
        return answer

    def stop(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self, seconds: float) -> Any:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(STOP_SECONDS)
        raise RunFailed(f"a bare loop ended or did not answer (exit code {self._process.exitcode}); see {self._log}")


def _serve(pipe: Connection, log: Path, make: Callable[..., Calls], arguments: tuple[Any, ...]) -> None:
    """Life of a child. Wall time and CPU time are taken here, around the call alone."""
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    calls = make(*arguments)
    import torch

    pipe.send("ready")
    while True:
        try:
            threads, name, given = pipe.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)  # OpenMP's too, which vLLM's kernels use
        wall, cpu = time.perf_counter(), time.process_time()
        result = calls[name](*given)
        cost = Cost(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        pipe.send((cost, result))


def _sampler(settings: tuple[RolloutSection, EngineFacts]) -> Calls:
    section, facts = settings
    os.environ.update(engine_environment(section))
    import torch

    from r3hf_ray.models.load import load_policy
    from r3hf_ray.models.sharding import full_parameters
    from r3hf_ray.weights.in_process import publication

    actor = Sampler(section, facts)
    policy = load_policy(facts.model, torch.float32)

    def load_weights(version: int) -> None:
        published = publication(partial(full_parameters, policy), version)
        if wrong := objection(published, actor.load_weights(published), max_gap=0.0):
            raise RunFailed(f"the bare loop's engine {wrong}")

    def generate(requests: list[Request]) -> list[Trajectory]:
        return actor.generate(requests)[0]

    return {"load weights": load_weights, "generate": generate}


def _scorer(settings: ScoringSettings) -> Calls:
    from r3hf_ray.scoring.scorer import Scorer

    by_attention = replace(settings, reward=settings.reward.model_copy(update={"mode": "abc"}))
    return {"score": Scorer(settings).score, ABC: Scorer(by_attention).score}


def _learner(config: PPOConfig) -> Calls:
    from r3hf_ray.instruments.compare.single_process import share_of
    from r3hf_ray.training.experience import RewardScale
    from r3hf_ray.training.ppo import PPOLearner

    learner = PPOLearner(config, scale=RewardScale(), device="cpu", mesh=None)

    def learn(scored: list[ScoredTrajectory], step: int) -> dict[str, float]:
        share = share_of(scored, [item.trajectory.info for item in scored], config, step)
        return learner.update(share.refs, minibatch_of=share.minibatch_of)

    return {"learn": learn}
