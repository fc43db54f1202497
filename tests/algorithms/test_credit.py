import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3hf_ray.algorithms.credit import auc, binomial_interval, bootstrap_interval, pearson, phrase_sums


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_won(pairs):
    scores = np.array([s for s, _ in pairs], dtype=np.float64)
    labels = np.array([label for _, label in pairs])
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels] for n in scores[~labels]]
    if not wins:
        assert math.isnan(auc(scores, labels))
    else:
        assert auc(scores, labels) == pytest.approx(np.mean(wins), abs=1e-12)


def test_auc_of_an_oracle_its_opposite_and_a_constant():
    labels = np.array([True, False, True, False, False])
    assert auc(labels.astype(np.float64), labels) == 1.0
    assert auc(-labels.astype(np.float64), labels) == 0.0
    assert auc(np.ones(5), labels) == 0.5


def test_pearson_equals_the_definition_and_is_nan_without_variation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    expected = np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())
    assert pearson(x, y) == pytest.approx(expected)
    assert pearson(x, -2 * x + 3) == pytest.approx(-1.0)
    assert math.isnan(pearson(x, np.ones(50)))
    assert math.isnan(pearson(np.ones(1), np.ones(1)))


def test_phrase_sums_leave_out_tokens_of_no_phrase():
    sums = phrase_sums(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, -1, 2]))
    np.testing.assert_allclose(sums, [0.3, 0.0, 0.4])
    assert phrase_sums(np.zeros(2), np.array([-1, -1])).shape == (0,)


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(2.0, 1.0, size=60), seed=seed, resamples=500, confidence=0.9)
        covered += low <= 2.0 <= high
    assert 0.83 <= covered / 200 <= 0.96


def test_the_bootstrap_interval_repeats_with_its_seed_and_leaves_out_nan():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(np.append(values, np.nan), seed=3) == bootstrap_interval(values, seed=3)
    assert all(map(math.isnan, bootstrap_interval(np.array([np.nan]), seed=0)))
    assert bootstrap_interval(np.full(5, 2.5), seed=0) == (2.5, 2.5)


def test_wilson_interval() -> None:
    low, high = binomial_interval(60.0, 100)
    assert (low, high) == (pytest.approx(0.5020, abs=1e-4), pytest.approx(0.6906, abs=1e-4))
    assert binomial_interval(10.0, 10)[1] == pytest.approx(1.0, abs=1e-12)
    assert binomial_interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)
