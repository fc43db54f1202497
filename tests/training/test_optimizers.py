"""What Adam's epsilon takes from an update, and a state that is there from the start."""

from typing import get_args

import pytest
import torch
from torch import nn

from r3hf_ray.sections.ppo import LRSchedule, OptimizerSection
from r3hf_ray.training.optimizers import adamw, eps_share, lr_share


@pytest.mark.parametrize(("eps", "gradient"), [(1e-5, 1e-5), (1e-5, 1e-3), (1e-8, 1e-5), (1e-5, 1e-9)])
def test_epsilon_takes_its_part_of_a_first_step(eps: float, gradient: float) -> None:
    """After one step m / sqrt(v) is 1 for every parameter; epsilon leaves g / (g + eps) of it."""
    layer = nn.Linear(7, 3)
    optimizer = adamw(layer, OptimizerSection(eps=eps), lr=1.0)
    assert eps_share(optimizer) == 0.0
    before = layer.weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    taken = eps_share(optimizer)
    assert taken == pytest.approx(eps / (eps + gradient), rel=1e-4)
    moved = (before - layer.weight.detach()).abs().mean().item()
    assert moved == pytest.approx(1.0 - taken, rel=1e-3, abs=1e-6)


def test_parameters_without_a_gradient_count_for_nothing() -> None:
    """An embedding of a token that never came does not move with any epsilon."""
    table = nn.Embedding(100, 4)
    optimizer = adamw(table, OptimizerSection(eps=1e-5), lr=1.0)
    table.weight.grad = torch.zeros_like(table.weight)
    table.weight.grad[3] = 1e-5
    optimizer.step()
    assert eps_share(optimizer) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "warmup", "shares"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.5, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0, [1.0, 0.853553, 0.5, 0.146447]),
        ("inverse_sqrt", 2, [0.5, 1.0, 1.0, 0.816497]),
    ],
)
def test_schedules_are_transformers_own_behind_our_warm_up(name: str, warmup: int, shares: list[float]) -> None:
    settings = OptimizerSection(lr_schedule=name, warmup_steps=warmup)
    assert [lr_share(settings, step, 4) for step in range(4)] == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("name", get_args(LRSchedule))
def test_no_schedule_takes_a_step_of_nothing(name: str) -> None:
    for warmup in (0, 3):
        shares = [lr_share(OptimizerSection(lr_schedule=name, warmup_steps=warmup), step, 20) for step in range(20)]
        assert all(0.0 < share <= 1.0 for share in shares)
