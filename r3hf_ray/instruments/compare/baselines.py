"""Which arms a comparison of sparse and redistributed reward must have, so that nobody can call its baseline weak."""

import itertools
from collections.abc import Sequence

from r3hf_ray.config import PPOConfig
from r3hf_ray.instruments.compare.arm_runs import PlannedRun

CRITICS = {
    "sft": "cold critic",
    "reward_trunk": "reward model's trunk, zero head",
    "reward_model": "reward model's trunk and head",
}
LAMBDAS = (0.95, 1.0)


def lacking(plan: Sequence[PlannedRun]) -> str:
    """What of {terminal, r3hf} x {cold, trunk, trunk and head} x lambda {0.95, 1} no arm runs: a sentence, or nothing.

    Example: ``"Not compared here: r3hf, cold critic, lambda 1."``
    """
    there = {_kind(run.config) for run in plan if _is_plain(run)}
    wanted = itertools.product(("terminal", "r3hf"), CRITICS, LAMBDAS)
    names = [f"{mode}, {CRITICS[init]}, lambda {lam:g}" for mode, init, lam in wanted if (mode, init, lam) not in there]
    return f"Not compared here: {'; '.join(names)}." if names else ""


def _kind(config: PPOConfig) -> tuple[str, str, float]:
    return config.reward.mode, config.critic_init, config.ppo.gae_lambda


def _is_plain(run: PlannedRun) -> bool:
    """Whether it is the paper's method or the sparse baseline, and no variant of them."""
    reward, config = run.config.reward, run.config
    return (
        config.has_critic
        and config.critic.source is None
        and reward.prefixes_from is None
        and reward.beta_c == 1.0
        and not run.schedules
    )
