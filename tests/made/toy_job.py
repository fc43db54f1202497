"""A job of PPO on the toy world, small enough for tests of machines and not of learning."""

from pathlib import Path

JOB = """
[run]
name = "{name}"
folder = "{runs}"
[model]
policy = "{world}/base"
reward_model = "{world}/reward"
[data]
source = "{world}/prompts.jsonl"
[rollout]
prompts_per_step = 8
max_response_tokens = 16
[reward]
calibration_samples = 8
[ppo]
steps = {steps}
[learner]
ranks = 1
checkpoint_every = {checkpoint_every}
[evaluation]
prompts = 0
[tracking]
wandb = "{wandb}"
"""


def toy_job(
    world: Path, runs: Path, *, steps: int, name: str = "run", checkpoint_every: int = 1, wandb: str = "disabled"
) -> str:
    """The text of its TOML file; ``world`` holds base, reward and prompts.jsonl, ``runs`` gets the run's folder."""
    fields = {"world": world, "runs": runs, "steps": steps, "name": name}
    return JOB.format(**fields, checkpoint_every=checkpoint_every, wandb=wandb)
