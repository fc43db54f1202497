"""What the coordinator makes of scalars: the scale of each model, and what is wrong with it."""

from typing import Any

import pytest

from r3hf_ray.actors.shares import calibration_of, unlike_units
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import RunFailed
from r3hf_ray.types import MAIN, Finish, TrajectoryInfo


def configuration(price: dict[str, float], **model: Any) -> PPOConfig:
    return PPOConfig(
        run={"name": "test"}, model={"policy": "p", "reward_model": "r"} | model, data={"source": "d"}, cost=price
    )


def scored(score: float, **further: float) -> TrajectoryInfo:
    return TrajectoryInfo(
        prompt_id=0,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=3,
        length=5,
        finish=Finish.EOS,
        scores={MAIN: score} | further,
    )


FIXED = {"multiplier": 0.0, "multiplier_lr": 0.0}


@pytest.mark.parametrize(
    ("price", "model", "field"),
    [
        ({}, {}, "model.reward_model"),
        ({}, {"reward_weight": 0.0}, "model.rewards helpful"),
        ({"multiplier": 0.5, "multiplier_lr": 0.0}, {"reward_weight": 0.0, "helpful": 0.0}, "model.cost"),
        ({"multiplier": 0.0, "limit": 1.0}, {"reward_weight": 0.0, "helpful": 0.0}, "model.cost"),
    ],
)
def test_a_model_without_spread_is_refused_where_it_is_trained_on(
    price: dict[str, float], model: dict[str, Any], field: str
) -> None:
    rewards = [{"name": "helpful", "source": "h", "weight": model.get("helpful", 1.0)}]
    weight = {"reward_weight": model.get("reward_weight", 1.0)}
    config = configuration(price or FIXED, rewards=rewards, cost="c", **weight)
    with pytest.raises(RunFailed, match=rf"^{field} gives every sampled response the same score \(-2\.5\): "):
        calibration_of([scored(-2.5, helpful=-2.5, cost=-2.5)] * 3, config)


def test_a_model_that_is_only_logged_may_say_nothing() -> None:
    config = configuration(FIXED, rewards=[{"name": "helpful", "source": "h", "weight": 0.0}], cost="c")
    infos = [scored(1.0, helpful=4.0, cost=7.0), scored(3.0, helpful=4.0, cost=7.0)]
    assert calibration_of(infos, config) == {"reward": (2.0, 1.0), "helpful": (4.0, 0.0), "cost": (7.0, 0.0)}


@pytest.mark.parametrize(
    ("spread", "warned"), [(1.0, False), (2.0, False), (0.5, False), (2.1, True), (0.4, True), (0.0, True)]
)
def test_prefixes_are_lent_in_one_unit(spread: float, warned: bool) -> None:
    said = unlike_units({"reward": (3.0, 1.0), "early": (-9.0, spread)}, "early")
    assert bool(said) == warned
    assert not said or said.startswith(f"reward.prefixes_from = early: its scores spread by {spread:.3g}, ")
