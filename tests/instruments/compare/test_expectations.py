"""Expectations when a run never reaches the threshold, or has not finished."""

import math
from pathlib import Path

import pytest

from r3hf_ray.instruments.compare.arm_runs import MeasuredRun, RunStatus
from r3hf_ray.instruments.compare.expectations import results_of
from r3hf_ray.instruments.compare.settings import Arm, CompareConfig, CompareSection, Expectation
from r3hf_ray.instruments.compare.statistics import Reach
from r3hf_ray.sections.runs import RunSection


def config(measure: str, bound: float) -> CompareConfig:
    return CompareConfig(
        run=RunSection(name="small"),
        compare=CompareSection(job=Path("job.toml"), seeds=(0, 1), baseline="sparse", threshold=3.5),
        arms=(Arm(name="sparse"), Arm(name="dense")),
        bars=(Expectation(arm="dense", against="sparse", measure=measure, bound=bound),),
    )


def record(arm: str, seed: int, at: int | None, *, gold: float = 4.0, status: RunStatus = "finished") -> MeasuredRun:
    return MeasuredRun(
        arm=arm, seed=seed, status=status, reason="", samples=(), gold=(), kl=(), reached=Reach(at=at, of=1000),
        final_gold=gold, final_sem=0.1, final_kl=1.0, final_length=9.0, final_eos=1.0, mean_gold=1.0,
        gold_at_kl=math.nan,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "bound", "sparse", "dense", "verdict"),
    [
        ("samples", 0.75, [400, 800], [300, 600], "met"),  # exactly at the bar
        ("samples", 0.75, [400, 800], [304, 600], "missed"),
        ("samples", 9.0, [400, 800], [100, None], "missed"),  # one seed never got there: its ratio has no upper end
        ("samples", 0.75, [None, None], [300, 600], "met"),  # at most 0.3 and 0.6
        ("samples", 0.75, [None, None], [None, None], "missed"),
        ("samples", 0.75, [None, 800], [None, 400], "missed"),  # one seed tells nothing
        ("level", 0.15, [400, 800], [440, 800], "met"),
        ("level", 0.15, [400, 800], [200, 400], "missed"),  # too fast is not level
        ("level", 0.15, [400, 800], [200, 1600], "met"),  # twice and half cancel, whoever is named first
        ("level", 0.15, [100, 100], [115, 115], "met"),
        ("level", 0.15, [115, 115], [100, 100], "met"),
        ("level", 0.15, [100, 100], [116, 116], "missed"),
        ("level", 0.15, [116, 116], [100, 100], "missed"),
        ("level", 0.15, [None, 800], [1000, 800], "missed"),
    ],
)
def test_ratio_bars(
    measure: str, bound: float, sparse: list[int | None], dense: list[int | None], verdict: str
) -> None:
    settings = config(measure, bound)
    records = [record("sparse", seed, at) for seed, at in enumerate(sparse)]
    records += [record("dense", seed, at) for seed, at in enumerate(dense)]
    (bar,) = results_of(settings, records).expectations
    assert bar.verdict == verdict, bar.found


def test_gold_is_compared_over_the_seeds_that_both_have() -> None:
    settings = config("gold", 0.2)
    records = [
        record("sparse", 0, 100, gold=4.0),
        record("sparse", 1, 100, gold=9.0),
        record("dense", 0, 100, gold=3.75),
    ]
    (bar,) = results_of(settings, records).expectations
    assert (bar.verdict, bar.found) == ("missed", "3.75 against 4.00, seeds 0")


@pytest.mark.parametrize("measure", ["samples", "level", "gold"])
def test_a_seed_that_only_one_has_finished_judges_nothing(measure: str) -> None:
    settings = config(measure, 0.5)
    records = [record("sparse", 0, 100), record("dense", 0, 100, status="unfinished"), record("dense", 1, 100)]
    (bar,) = results_of(settings, records).expectations
    assert bar.verdict == "not run"
