"""Settings that change over a run, for candidates that are being screened; the system itself has none."""

from dataclasses import dataclass, replace

import numpy as np

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.methods import methods_that
from r3hf_ray.types import MAIN, ScoredTrajectory

SCHEDULED = ("reward.beta_c", "ppo.gae_lambda", "ppo.kl_coef")
"""Fields that may change from step to step without anything being made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A field that moves evenly from ``first`` at the first step to ``last`` at the last.

    Example: ``Schedule(field="ppo.gae_lambda", first=0.95, last=1.0)``
    """

    field: str
    first: float
    last: float

    def __str__(self) -> str:
        return f"{self.field}={self.first:g}:{self.last:g}"

    def value(self, step: int, steps: int) -> float:
        """At ``step``, from 0."""
        return self.first + (self.last - self.first) * step / max(1, steps - 1)


def parse_schedule(text: str) -> Schedule:
    """Read ``reward.beta_c=1:0``.

    Raises:
        ConfigError: it is not of that form, or the field cannot change.
    """
    field, _, values = text.partition("=")
    first, _, last = values.partition(":")
    if field not in SCHEDULED:
        raise ConfigError(f"schedules: {field!r} cannot change during a run; choose {', '.join(SCHEDULED)}")
    try:
        return Schedule(field=field, first=float(first), last=float(last))
    except ValueError:
        raise ConfigError(f"schedules: {text!r} is not of the form {field}=FIRST:LAST") from None


def check_schedules(config: PPOConfig, schedules: tuple[Schedule, ...]) -> None:
    """See that a run of ``config`` can follow them.

    Raises:
        ConfigError: it could not, or would silently become another method.
    """
    fields, reward = {schedule.field for schedule in schedules}, config.reward
    plain = reward.facts.pays_differences and reward.beta_c == 1.0 and reward.eos_jump == "keep"
    if "reward.beta_c" in fields and not (plain and not any(further.weight for further in config.model.rewards)):
        raise ConfigError(
            "schedules: reward.beta_c is remixed from rewards at 1: it needs reward.mode = "
            f"{methods_that(lambda facts: facts.pays_differences)}, "
            "reward.beta_c = 1, reward.eos_jump = keep, and no further model that is paid"
        )
    if "reward.beta_c" in fields and config.model.cost is not None:
        raise ConfigError("schedules: reward.beta_c cannot move beside a cost model")
    if "ppo.kl_coef" in fields and config.ppo.kl_target is not None:
        raise ConfigError("schedules: ppo.kl_coef cannot move while ppo.kl_target adapts it")


def at_step(config: PPOConfig, schedules: tuple[Schedule, ...], step: int) -> PPOConfig:
    """The configuration as it is at ``step``, from 0."""
    for schedule in schedules:
        section, name = schedule.field.split(".")
        value = schedule.value(step, config.ppo.steps)
        changed = dict(config)[section].model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def remixed(scored: ScoredTrajectory, beta_c: float) -> ScoredTrajectory:
    """What R3HF, scored with beta_c = 1, pays at another ``beta_c`` (arXiv 2411.08302, Eq. 7), by the main model."""
    rewards = beta_c * scored.main.token_rewards
    rewards[-1] += (1.0 - beta_c) * scored.main.score
    main = replace(scored.main, token_rewards=rewards.astype(np.float32))
    return replace(scored, by_model=scored.by_model | {MAIN: main})
