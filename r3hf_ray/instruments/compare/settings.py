"""What `r3hf compare` reads: the arms, their seeds, the models they share, and what is expected of them."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from r3hf_ray.instruments.compare.schedules import parse_schedule
from r3hf_ray.instruments.toy.settings import Overrides, ToySection
from r3hf_ray.sections.fields import NonNegative, Positive, PositiveFloat, RunName, Section
from r3hf_ray.sections.runs import RunSection
from r3hf_ray.settings import Command


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(
            f"each seed once: {', '.join(map(str, twice))} is there again, and would be one run counted twice"
        )
    return seeds


Seeds = Annotated[tuple[NonNegative, ...], AfterValidator(_different)]


class CompareSection(Section):
    """What all arms share, and how they are read."""

    job: Path
    """The job of `r3hf ppo` that every arm is a variant of."""
    overrides: Overrides = ()
    """Fields of that job set for every arm, as on the command line: `["--ppo.steps", "60"]`."""
    seeds: Annotated[Seeds, Field(min_length=1)]
    """Seeds of an arm that names none of its own."""
    baseline: str
    """The arm that samples are counted against, seed by seed."""
    threshold: float
    """Gold reward of the training batches that is to be reached; above where the arms begin, below where they end."""
    judge: str | None = None
    """Name of one of the job's `[[model.rewards]]`, with weight 0, whose score takes the place of gold reward."""
    window: Positive = 5
    """Steps of the mean that must reach it. [steps]"""
    in_process: NonNegative = 0
    """0: runs go through Ray, vLLM and Ray Train, one after another. N: screening, N runs at a time, each in a single
    process with one learner rank, where no failure is survived. [processes]"""
    equal_kl: PositiveFloat = 6.5
    """Gold reward is also told for the steps whose KL is within 20% of this. [nats a response]"""

    @property
    def measured(self) -> str:
        """What the arms are compared by, in words."""
        return "gold" if self.judge is None else f"score of {self.judge}"


class Arm(Section):
    """One way to train."""

    name: RunName
    """Its runs are called `<name>-s<seed>`."""
    overrides: Overrides = ()
    """Fields of the job in which it differs: `["--reward.mode", "terminal"]`. In them `{folder}` is the comparison's
    own, where its models are."""
    schedules: tuple[str, ...] = ()
    """Screening only: fields that move evenly over the run, `["reward.beta_c=1:0"]`."""
    seeds: Seeds = ()
    """Its own seeds; those of the comparison when left out."""
    group: str = "arms"
    """Arms of a group share a chart; the baseline is in all of them."""


class Expectation(Section):
    """A bar: what `arm` should do against `against`."""

    arm: str
    """Name of an arm."""
    against: str
    """Name of another."""
    measure: Literal["samples", "level", "gold"]
    """`samples`: paired ratio of samples to the threshold at most `bound`; `level`: that ratio within `bound` of 1;
    `gold`: final held-out gold at most `bound` below."""
    bound: PositiveFloat
    """A ratio, a share, or gold reward."""


class CompareConfig(Command):
    """Arms x seeds of a job, one after another, into one page and one table."""

    command: ClassVar[str] = "compare"

    run: RunSection
    compare: CompareSection
    toy: ToySection | None = None
    """Left out: `compare.job` names models and data that exist."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    bars: tuple[Expectation, ...] = ()

    @property
    def root(self) -> Path:
        """The comparison's folder, absolute."""
        return (self.run.folder / self.run.name).resolve()

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The arm's own seeds, or those of the comparison."""
        return arm.seeds or self.compare.seeds

    @model_validator(mode="after")
    def _schedules_are_screened(self) -> "CompareConfig":
        for arm in self.arms:
            if arm.schedules and not self.compare.in_process:
                raise ValueError(f"arm {arm.name}: schedules need compare.in_process; the system has none")
            for text in arm.schedules:
                parse_schedule(text)
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> "CompareConfig":
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        used = [self.compare.baseline, *(name for bar in self.bars for name in (bar.arm, bar.against))]
        unknown = sorted(set(used) - set(names))
        if twice:
            raise ValueError(f"two arms are called {', '.join(twice)}")
        if unknown:
            raise ValueError(f"no arm is called {', '.join(unknown)}; there are {', '.join(names)}")
        return self
