import math

import pytest

from r3hf_ray.records.metrics import METRICS
from r3hf_ray.training.guard_rails import BOUNDS, WATCHED, length_drift, warnings_of

LENGTH, EOS = "rollout/response_length/mean", "rollout/eos_frac"
SOUND = {
    LENGTH: 40.0,
    EOS: 0.9,
    "r3hf/eos_jump_mass": 0.5,
    "r3hf/first_token_mass": 0.1,
    "r3hf/sum_abs_over_std": 3.0,
    "r3hf/position_corr": -0.1,
    "r3hf/telescoping_error/max": 1e-7,
    "critic/explained_var": -0.1,
    "policy/eps_share": 0.1,
    "policy/positive_advantages": 0.5,
}


def test_a_sound_step_warns_of_nothing():
    assert warnings_of(SOUND, SOUND) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (LENGTH, 52.5),
        (LENGTH, 27.5),
        (EOS, 0.44),
        ("r3hf/eos_jump_mass", 0.81),
        ("r3hf/first_token_mass", 0.6),
        ("r3hf/sum_abs_over_std", 21.0),
        ("r3hf/position_corr", 0.6),
        ("r3hf/position_corr", -0.6),
        ("r3hf/telescoping_error/max", 2e-5),
        ("critic/explained_var", -0.6),
        ("policy/eps_share", 0.6),
        ("policy/positive_advantages", 0.96),
        ("policy/positive_advantages", 0.04),
    ],
)
def test_each_rule_has_its_own_sentence(name, value):
    found = warnings_of(SOUND | {name: value}, SOUND)
    assert found.keys() == {name}
    assert found[name].startswith(f"{name} is {value:.3g}: ") and "\n" not in found[name]


@pytest.mark.parametrize(("name", "value"), [(LENGTH, 51.0), (LENGTH, 29.0), (EOS, 0.46)])
def test_inside_the_bounds_there_is_none(name, value):
    assert warnings_of(SOUND | {name: value}, SOUND) == {}


def test_responses_that_never_end_are_seen_at_the_first_step():
    never = SOUND | {EOS: 0.0}
    assert warnings_of(never, never).keys() == {EOS}


def test_absent_or_nan_metrics_say_nothing():
    few = {name: SOUND[name] for name in WATCHED}
    assert warnings_of(few, few) == {}
    assert warnings_of(few | dict.fromkeys(BOUNDS, math.nan), few) == {}


def test_length_drift_is_relative():
    assert length_drift({LENGTH: 60.0}, {LENGTH: 48.0}) == 0.25


def test_every_watched_metric_is_explained():
    assert METRICS.keys() >= {*BOUNDS, *WATCHED, "rollout/length_drift"}
