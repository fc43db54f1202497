"""The optimizer of the policy and of the critic."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from transformers import get_scheduler

from r3hf_ray.models.sharding import all_reduce_sum
from r3hf_ray.sections.ppo import OptimizerSection


def adamw(module: nn.Module, settings: OptimizerSection, lr: float) -> AdamW:
    """AdamW whose state exists from the start, at step 0: to write a checkpoint of it then changes nothing."""
    optimizer = AdamW(
        module.parameters(),
        lr=lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,  # one call for all shards: on small models the calls cost more than the arithmetic
    )
    for parameter in module.parameters():
        moment = torch.zeros_like(parameter, requires_grad=False)
        step = torch.tensor(0.0, device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}
    return optimizer


def lr_share(settings: OptimizerSection, step: int, steps: int) -> float:
    """Share of the peak learning rate of the optimizer step ``step`` (from 0) of ``steps``; none of them is 0.

    It depends on the step alone, so a run that goes on needs no state of it.

    Example: warm-up over 2 of 4 steps, then linear: ``1/2, 1, 1, 1/2``.
    """
    warmup = settings.warmup_steps
    if step < warmup:  # transformers' own would leave the first step out
        return (step + 1) / warmup
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(settings.lr_schedule, unit, num_warmup_steps=warmup, num_training_steps=steps)
    return float(schedule.lr_lambdas[0](step))


@torch.no_grad()
def eps_share(optimizer: Optimizer) -> float:
    """Part of the last update's absolute sum that epsilon took away. A collective; 0 before the first update.

    Adam moves a parameter by ``m / (sqrt(v) + eps)``; without epsilon it would move by ``m / sqrt(v)``.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for group in optimizer.param_groups:
        for state in map(optimizer.state.__getitem__, group["params"]):
            first, second = (_local(state[name]) for name in ("exp_avg", "exp_avg_sq"))
            root = (second / (1.0 - group["betas"][1] ** max(float(state["step"]), 1.0))).sqrt()
            free = torch.where(root > 0.0, first.abs() / root, 0.0)
            damped = free * (root / (root + group["eps"]))
            sums = sums.to(first.device) + torch.stack([free.sum(dtype=torch.float64), damped.sum(dtype=torch.float64)])
    free_sum, damped_sum = all_reduce_sum(sums).tolist()
    return 1.0 - damped_sum / free_sum if free_sum else 0.0


def _local(state: torch.Tensor) -> torch.Tensor:
    return state.to_local() if isinstance(state, DTensor) else state
