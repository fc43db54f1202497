import pytest

from r3hf_ray.algorithms.lagrange import next_multiplier


def test_the_example():
    assert next_multiplier(1.0, cost=3.0, limit=1.0, scale=2.0, lr=0.1, maximum=10.0) == 1.1


@pytest.mark.parametrize(
    ("multiplier", "cost", "expected"), [(0.25, -3.0, 0.0), (1.9, 2.0, 2.0), (0.0, 1.0, 0.0), (0.0, 1.5, 0.25)]
)
def test_it_stays_between_0_and_the_maximum(multiplier, cost, expected):
    assert next_multiplier(multiplier, cost=cost, limit=1.0, scale=1.0, lr=0.5, maximum=2.0) == expected


def test_a_step_size_of_0_keeps_it():
    assert next_multiplier(0.5, cost=9.0, limit=0.0, scale=1.0, lr=0.0, maximum=10.0) == 0.5


def test_the_step_does_not_depend_on_the_units():
    one = next_multiplier(1.0, cost=3.0, limit=1.0, scale=2.0, lr=0.125, maximum=10.0)
    assert next_multiplier(1.0, cost=24.0, limit=8.0, scale=16.0, lr=0.125, maximum=10.0) == one


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="cost's scale must be positive"):
        next_multiplier(1.0, cost=1.0, limit=0.0, scale=scale, lr=0.1, maximum=1.0)


def play(limit: float, *, multiplier: float, steps: int = 4000) -> tuple[list[float], list[float]]:
    """A policy x earns x - x^2 / 4 at a cost of x and climbs reward - lambda cost. Costs and lambdas of its steps."""
    x, costs, prices = 1.5, [], []
    for _ in range(steps):
        costs.append(x)
        prices.append(multiplier)
        x += 0.02 * (1.0 - x / 2.0 - multiplier)
        multiplier = next_multiplier(multiplier, cost=costs[-1], limit=limit, scale=1.0, lr=0.02, maximum=10.0)
    return costs, prices


def test_it_rises_while_the_limit_is_broken_and_settles_where_it_holds():
    costs, prices = play(0.5, multiplier=0.0)
    broken = [later > now for now, later, cost in zip(prices, prices[1:], costs, strict=False) if cost > 0.5]
    kept = [later <= now for now, later, cost in zip(prices, prices[1:], costs, strict=False) if cost <= 0.5]
    assert broken and kept and all(broken) and all(kept)
    assert costs[-1] == pytest.approx(0.5, abs=1e-6)  # the limit
    assert prices[-1] == pytest.approx(0.75, abs=1e-6)  # what a unit of cost earns there: 1 - x / 2


def test_it_falls_to_0_where_the_limit_costs_nothing():
    costs, prices = play(5.0, multiplier=1.0)
    assert prices[-1] == 0.0 and sorted(prices, reverse=True) == prices
    assert costs[-1] == pytest.approx(2.0, abs=1e-6)  # the best without a limit
