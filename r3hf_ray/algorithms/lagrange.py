"""PPO-Lagrangian: the price of a cost, which rises while the cost is above its limit and falls below it.

``max E[R]`` subject to ``E[C] <= d`` is ``max_pi min_lambda E[R] - lambda (E[C] - d)`` over lambda >= 0. PPO takes
steps in pi on ``R - lambda C``, and `next_multiplier` one in lambda after each (Ray, Achiam and Amodei, Benchmarking
Safe Exploration in Deep Reinforcement Learning, 2019; for language models Dai et al., Safe RLHF, 2023).
"""


def next_multiplier(multiplier: float, *, cost: float, limit: float, scale: float, lr: float, maximum: float) -> float:
    """Projected ascent: ``clip(lambda + lr (cost - limit) / scale, 0, maximum)``.

    Safe RLHF ascends in log lambda; here lambda can reach 0, so that a cost within its limit costs nothing.

    Example: ``next_multiplier(1.0, cost=3.0, limit=1.0, scale=2.0, lr=0.1, maximum=10.0) == 1.1``

    Args:
        multiplier: lambda at present. [scaled reward per scaled cost]
        cost: mean cost of the batch, in the cost model's units.
        limit: d, in the same.
        scale: standard deviation of the cost under the initial policy, > 0: steps then do not depend on the units.
        lr: step size; 0 keeps lambda, if it is at most ``maximum``.
        maximum: largest lambda.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if not scale > 0.0:
        raise ValueError(f"the cost's scale must be positive, got {scale}; does the cost model tell responses apart?")
    return min(max(multiplier + lr * (cost - limit) / scale, 0.0), maximum)
