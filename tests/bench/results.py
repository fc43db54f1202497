"""What was measured, as plain numbers, and what the targets say of it: no process, no torch."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NOISE_FLOOR = 0.03
"""Differences below this share are noise, however close the repeats came."""
FIRST_STEP_SECONDS = 60.0

LEARNER_STAGES = (
    "time/wait_rollout",
    "time/evaluate",
    "time/advantage",
    "time/train_policy",
    "time/train_critic",
    "time/sync",
)
"""Parts of a learner step, one after the other; the rest of a step is moving refs and bookkeeping."""
WORKER_STAGES = ("time/rollout", "time/reward", "sync/seconds")
"""What the learner waits for at lag 0, summed over chunks: parallel actors add up."""
REST = "rest of the step"


STEP_LOOPS = ("generate", "score", "learn", "load weights")
"""The bare loops that make up a step; any other is measured for comparison only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one call.

    Example: ``Cost(wall=0.7, cpu=1.2)``: 0.7 s during which the process used 1.2 CPU seconds
    """

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BareStep:
    """One pass through the bare loops."""

    threads: int
    """Of every loop."""
    costs: dict[str, Cost]
    """Loop -> cost."""
    stages: dict[str, float]
    """The learner's own `time/...`. [s]"""
    tokens: float
    """Mean length of the responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemRun:
    """One `r3hf ppo` of a variant; steady steps are those after the first and before the last."""

    steps: list[float]
    """Seconds between the rows of steady steps."""
    cpu: float
    """CPU seconds of all processes of the run, a steady step."""
    idle: float
    """Share of the cores' time that nobody of the run used in steady steps."""
    first_step: float
    """From the command to the first step's row. [s]"""
    stages: dict[str, float]
    """Median over steady steps of LEARNER_STAGES, REST and WORKER_STAGES. [s]"""
    tokens: float
    """Mean length of the responses."""
    staleness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything of one benchmark."""

    shape: str
    overhead: float
    """Target of the lag 0 step over the sum of the bare loops."""
    bare: list[BareStep]
    systems: dict[str, list[SystemRun]]
    """Variant -> its repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whether one promise holds.

    Example: ``Target(what="lag 0 / bare loops", measured="1.21", wanted="at most 1.3", met=True)``
    """

    what: str
    measured: str
    wanted: str
    met: bool


def bare_costs(bare: Sequence[BareStep]) -> dict[str, Cost]:
    """Each loop's medians, on that number of threads on which its median wall time is the smallest."""
    return {name: min(_by_threads(name, bare).values(), key=lambda cost: cost.wall) for name in bare[0].costs}


def bare_threads(bare: Sequence[BareStep]) -> dict[str, int]:
    """Each loop's number of threads in `bare_costs`."""
    costs = {name: _by_threads(name, bare) for name in bare[0].costs}
    return {name: min(by_threads, key=lambda threads: by_threads[threads].wall) for name, by_threads in costs.items()}


def bare_sum(bare: Sequence[BareStep]) -> Cost:
    """One after the other, as a program without Ray would run them."""
    known = bare_costs(bare)
    costs = [known[name] for name in STEP_LOOPS]
    return Cost(wall=sum(cost.wall for cost in costs), cpu=sum(cost.cpu for cost in costs))


def step_seconds(runs: Sequence[SystemRun]) -> float:
    """Median over repeats of the median steady step."""
    return statistics.median(statistics.median(run.steps) for run in runs)


def spread(runs: Sequence[SystemRun]) -> float:
    """Largest less smallest repeat; 0 for one repeat. [s]"""
    medians = [statistics.median(run.steps) for run in runs]
    return max(medians) - min(medians)


def noise(a: Sequence[SystemRun], b: Sequence[SystemRun]) -> float:
    """How far two variants may lie apart without meaning anything: the larger spread of their repeats. [s]"""
    return max(spread(a), spread(b), NOISE_FLOOR * step_seconds(a))


def median_of(runs: Sequence[SystemRun], value: Callable[[SystemRun], float]) -> float:
    """Median of a number over repeats."""
    return statistics.median(value(run) for run in runs)


def stage_seconds(runs: Sequence[SystemRun]) -> dict[str, float]:
    """Median over repeats of each stage."""
    return {name: statistics.median(run.stages[name] for run in runs) for name in runs[0].stages}


def bare_stages(bare: Sequence[BareStep]) -> dict[str, float]:
    """The same names for the bare loops, where they have the stage."""
    costs, threads = bare_costs(bare), bare_threads(bare)["learn"]
    chosen = [step.stages for step in bare if step.threads == threads]
    learner = {name: statistics.median(stages[name] for stages in chosen) for name in chosen[0]}
    workers = (costs["generate"].wall, costs["score"].wall, costs["load weights"].wall)
    return learner | dict(zip(WORKER_STAGES, workers, strict=True))


def targets(results: Results) -> list[Target]:
    """The promises of the project about its speed."""
    lag0, lag1, terminal = (results.systems[name] for name in ("lag 0", "lag 1", "terminal"))
    step, overlapped, sparse = step_seconds(lag0), step_seconds(lag1), step_seconds(terminal)
    ratio = step / bare_sum(results.bare).wall
    first = max(run.first_step for run in lag0)
    return [
        Target(
            what="step at lag 0 / sum of the bare loops",
            measured=f"{ratio:.2f}",
            wanted=f"at most {results.overhead:g}",
            met=ratio <= results.overhead,
        ),
        Target(
            what="step at lag 1 - step at lag 0",
            measured=f"{overlapped - step:+.2f} s",
            wanted=f"at most {noise(lag0, lag1):.2f} s (noise)",
            met=overlapped - step <= noise(lag0, lag1),
        ),
        Target(
            what="step with r3hf - step with terminal",
            measured=f"{step - sparse:+.2f} s",
            wanted=f"within {noise(lag0, terminal):.2f} s (noise)",
            met=abs(step - sparse) <= noise(lag0, terminal),
        ),
        Target(
            what="command to first step, the slowest at lag 0",
            measured=f"{first:.0f} s",
            wanted=f"below {FIRST_STEP_SECONDS:.0f} s",
            met=first < FIRST_STEP_SECONDS,
        ),
    ]


def _by_threads(loop: str, bare: Sequence[BareStep]) -> dict[int, Cost]:
    return {
        threads: _median_cost(step.costs[loop] for step in bare if step.threads == threads)
        for threads in sorted({step.threads for step in bare})
    }


def _median_cost(costs: Iterable[Cost]) -> Cost:
    known = list(costs)
    return Cost(wall=statistics.median(cost.wall for cost in known), cpu=statistics.median(cost.cpu for cost in known))
