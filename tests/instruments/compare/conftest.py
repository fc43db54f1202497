"""A small job of `r3hf ppo` whose models and data are never opened."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.settings import load

JOB = """
[run]
name = "run"
[model]
policy = "some/policy"
reward_model = "some/reward"
[data]
source = "prompts.jsonl"
"""
MakeJob = Callable[..., PPOConfig]


@pytest.fixture
def small_job(tmp_path: Path) -> MakeJob:
    """`small_job("--ppo.steps", "5")`: the job with these overrides."""
    (tmp_path / "job.toml").write_text(JOB)
    return lambda *overrides: load(PPOConfig, tmp_path / "job.toml", list(overrides))
