"""The runs of a comparison: each as it is planned, what became of it, and what its folder says about it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray.exceptions import RayError

from r3hf_ray.actors.learner import BROKEN_CODE
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError, RunFailed, sentence_of
from r3hf_ray.instruments.compare.schedules import Schedule
from r3hf_ray.instruments.compare.settings import CompareSection
from r3hf_ray.instruments.compare.statistics import Reach, mean, mean_near, samples_to
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.metrics import STEP, read_metrics

LAST_STEPS = 5
"""A final KL is the mean of this many last steps: one batch of 32 responses is noisy."""
NEAR = 0.2
"""Steps within this share of the KL in question count as at equal KL."""
KL = "kl/ref/mean"
FINAL_LENGTH, FINAL_EOS = "eval/heldout/response_length/mean", "eval/heldout/eos_frac"

RunStatus = Literal["finished", "unfinished", "failed", "not run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of a comparison: an arm with a seed."""

    arm: str
    seed: int
    config: PPOConfig
    schedules: tuple[Schedule, ...] = ()
    """Screening only."""

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.config.run.folder / self.config.run.name


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """What a run came to; NaN is not measured.

    Curves have a value a training step; finals are of the last held-out evaluation, KL apart.
    """

    arm: str
    seed: int
    status: RunStatus
    reason: str
    """Of a failure."""
    samples: tuple[int, ...]
    """Responses trained on, up to and with each step."""
    gold: tuple[float, ...]
    """Of the training batch."""
    kl: tuple[float, ...]
    """To the reference. [nats a response]"""
    reached: Reach
    final_gold: float
    final_sem: float
    final_kl: float
    """Mean of the last `LAST_STEPS` steps."""
    final_length: float
    """[tokens]"""
    final_eos: float
    mean_gold: float
    """Of the whole run."""
    gold_at_kl: float
    """Mean gold of the steps near the KL in question."""


def is_finished(run: PlannedRun) -> bool:
    """Whether its folder says that it ended by itself, at the last step of its configuration or later."""
    events = read_jsonl(run.folder / "events.jsonl")
    return any(e.get("event") == "finished" and int(e.get("step", 0)) >= run.config.ppo.steps for e in events)


def outcome_of(work: Callable[[], object]) -> dict[str, Any]:
    """Do a run: an event `finished`, or `failed` with its reason, and the seconds it took."""
    start = time.monotonic()
    outcome = {"event": "failed"}
    try:
        work()
    except (RunFailed, ConfigError) as error:
        outcome["reason"] = str(error)
    except RayError as error:
        outcome["reason"] = sentence_of(error)
    except BROKEN_CODE as error:
        outcome["reason"] = f"{type(error).__name__}: {error}"
    else:
        outcome = {"event": "finished"}
    return outcome | {"seconds": round(time.monotonic() - start, 1)}


def read_run(run: PlannedRun, settings: CompareSection) -> MeasuredRun:
    """Read a run's folder; a run that is not there has empty curves.

    Raises:
        ConfigError: a damaged line inside its records.
    """
    rows = read_metrics(run.folder)
    name = "gold" if settings.judge is None else f"{settings.judge}/score"
    in_training, at_the_end = f"reward/{name}/mean", f"eval/heldout/{name}"
    steps = [row for row in rows if math.isfinite(row.get(in_training, math.nan))]
    kl = tuple(row.get(KL, math.nan) for row in steps)
    gold = tuple(row[in_training] for row in steps)
    samples = tuple(int(row[STEP]) * run.config.responses_per_step for row in steps)
    at = samples_to(settings.threshold, samples, gold, window=settings.window)
    at_once = at is not None and at == samples[settings.window - 1]
    status, reason = _status(run)
    last = rows[-1] if status == "finished" else {}
    return MeasuredRun(
        arm=run.arm,
        seed=run.seed,
        status=status,
        reason=reason,
        samples=samples,
        gold=gold,
        kl=kl,
        reached=Reach(at=at, of=samples[-1] if samples else 0, at_once=at_once),
        final_gold=last.get(f"{at_the_end}/mean", math.nan),
        final_sem=last.get(f"{at_the_end}/sem", math.nan),
        final_kl=mean(kl[-LAST_STEPS:]) if last else math.nan,
        final_length=last.get(FINAL_LENGTH, math.nan),
        final_eos=last.get(FINAL_EOS, math.nan),
        mean_gold=mean(gold) if last else math.nan,
        gold_at_kl=mean_near(kl, gold, at=settings.equal_kl, within=NEAR) if last else math.nan,
    )


def _status(run: PlannedRun) -> tuple[RunStatus, str]:
    if is_finished(run):
        return "finished", ""
    events = read_jsonl(run.folder / "events.jsonl")
    if events and events[-1].get("event") == "failure":
        return "failed", str(events[-1].get("reason", ""))
    return ("unfinished", "") if run.folder.exists() else ("not run", "")
