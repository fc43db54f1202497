"""The numbers of a comparison on curves small enough to do by hand."""

import math

from r3hf_ray.instruments.compare.statistics import (
    Difference,
    Ratio,
    Reach,
    by_cell,
    mean,
    mean_near,
    mean_ratio,
    paired_difference,
    paired_ratios,
    samples_to,
    shared_points,
    spread,
    trailing_mean,
)


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired_difference({0: 4.0, 1: 5.0, 2: math.nan, 3: 9.0}, {0: 3.0, 1: 3.0, 2: 1.0})
    assert found == Difference(mean=1.5, sem=0.5, above=2, seeds=2)
    assert str(found) == "+1.50 ± 0.50 (2 of 2)"
    assert str(paired_difference({0: 1.0}, {0: 2.0})) == "-1.00 (0 of 1)"
    assert paired_difference({0: 1.0}, {1: 2.0}) is None


def test_trailing_mean_begins_with_the_first_whole_window() -> None:
    assert trailing_mean([1.0, 2.0, 3.0, 6.0], 2) == [1.5, 2.5, 4.5]
    assert trailing_mean([1.0, 2.0], 2) == [1.5]
    assert trailing_mean([1.0], 2) == []


def test_samples_count_the_step_whose_mean_is_there() -> None:
    samples, golds = [32, 64, 96, 128, 160], [0.0, 9.0, 1.0, 5.0, 5.0]
    assert samples_to(3.0, samples, golds, window=2) == 64
    assert samples_to(5.0, samples, golds, window=2) == 96  # exactly at the threshold
    assert samples_to(4.0, samples, golds, window=5) == 160
    assert samples_to(4.1, samples, golds, window=5) is None
    assert samples_to(0.0, samples[:1], golds[:1], window=2) is None


def test_points_are_those_that_all_seeds_have() -> None:
    curves = [([1.0, 2.0, 3.0], [0.0, 4.0, 8.0]), ([2.0, 3.0, 4.0], [1.0, 2.0, 7.0]), ([3.0, 2.0], [5.0, 1.0])]
    found = shared_points(curves)
    assert list(found.items()) == [(2.0, [4.0, 1.0, 1.0]), (3.0, [8.0, 2.0, 5.0])]
    assert shared_points([]) == {}


def test_cells_mean_what_is_in_them_and_invent_none() -> None:
    x, y = by_cell([4.2, 0.2, 0.4, 1.9], [12.0, 1.0, 3.0, 4.0], width=1.0)
    assert (x, y) == ([0.5, 1.5, 4.5], [2.0, 4.0, 12.0])
    assert by_cell([-0.1, 0.1], [1.0, 2.0], width=0.5) == ([-0.25, 0.25], [1.0, 2.0])
    assert by_cell([], [], width=1.0) == ([], [])


def test_mean_near_takes_both_ends() -> None:
    assert mean_near([8.0, 10.0, 12.0, 12.1], [1.0, 2.0, 6.0, 99.0], at=10.0, within=0.2) == 3.0
    assert math.isnan(mean_near([1.0], [1.0], at=10.0, within=0.2))


def test_spread_needs_two_and_what_is_not_finite_is_left_out() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert spread([1.0, math.nan, 3.0]) == math.sqrt(2.0)
    assert mean([5.0]) == 5.0 and math.isnan(spread([5.0, math.inf]))
    assert math.isnan(mean([]))


def test_the_mean_ratio_does_not_depend_on_who_is_first() -> None:
    ratios = [Ratio(seed=0, value=2.0), Ratio(seed=1, value=0.5)]
    assert mean_ratio(ratios) == 1.0
    assert mean_ratio([Ratio(seed=0, value=2.0, bound=">"), Ratio(seed=1, value=0.5)]) == 1.0
    assert math.isnan(mean_ratio([Ratio(seed=0, value=2.0, bound=">"), Ratio(seed=1, value=0.5, bound="<")]))
    assert math.isnan(mean_ratio([]))


def test_ratios_are_of_the_same_seed_and_say_what_is_a_bound() -> None:
    arm = {0: Reach(at=300, of=1920), 1: Reach(at=None, of=1920), 2: Reach(at=480, of=1920), 3: Reach(at=1, of=1920)}
    base = {0: Reach(at=400, of=1920), 1: Reach(at=640, of=1920), 2: Reach(at=None, of=1920), 9: Reach(at=1, of=1920)}
    assert paired_ratios(arm, base) == [
        Ratio(seed=0, value=0.75),
        Ratio(seed=1, value=3.0, bound=">"),
        Ratio(seed=2, value=0.25, bound="<"),
    ]
    assert paired_ratios({0: Reach(at=None, of=9)}, {0: Reach(at=None, of=9)}) == []
    at_once, later, never = Reach(at=160, of=960, at_once=True), Reach(at=320, of=960), Reach(at=None, of=960)
    assert paired_ratios({0: at_once}, {0: at_once}) == []
    assert paired_ratios({0: at_once}, {0: later}) == [Ratio(seed=0, value=0.5, bound="<")]
    assert paired_ratios({0: later}, {0: at_once}) == [Ratio(seed=0, value=2.0, bound=">")]
    assert paired_ratios({0: never}, {0: at_once}) == [Ratio(seed=0, value=6.0, bound=">")]
    assert str(Ratio(seed=1, value=3.0, bound=">")) == ">3.00"
