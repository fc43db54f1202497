"""The optimizer of the policy and of the critic."""

import torch
from torch import nn
from torch.optim import AdamW

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
