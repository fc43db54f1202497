"""`[toy]`: how large the toy world is, and the models that are trained in it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, field_validator

from r3hf_ray.sections.fields import NonNegative, Positive, RunName, Section


def _without_run(overrides: tuple[str, ...]) -> tuple[str, ...]:
    if any(word.startswith("--run.") for word in overrides):
        raise ValueError("overrides cannot set run.*: name, folder and seed of a run come from the comparison")
    return overrides


Overrides = Annotated[tuple[str, ...], AfterValidator(_without_run)]
"""Fields of a job as on its command line, `["--ppo.steps", "60"]`; none of its `run` section."""


class FurtherRewardModel(Section):
    """A reward model besides the one that pays, trained on the same preferences in another way."""

    name: RunName
    """Of its folder: arms call the model `{folder}/<name>/model`."""
    overrides: Overrides = ()
    """Fields of `toy.reward_job` in which it differs: `["--reward_training.head", "running_sum"]`."""
    seed: NonNegative = 0
    """Of its training."""


class ToySection(Section):
    """Make the toy world, the initial policy and the reward model once, for all arms."""

    seed: NonNegative = 0
    """Of the world and both models; the seeds of the arms vary PPO only."""
    sft_job: Path = Path("jobs/toy_sft.toml")
    """The job of `r3hf sft`."""
    reward_job: Path = Path("jobs/toy_reward.toml")
    """The job of `r3hf reward`."""
    max_response_tokens: Literal[24, 48, 96] = 48
    """Longest response; it decides how many facts a topic has. [tokens]"""
    sft_rows: Positive = 20_000
    """Answers of the noisy author to imitate. [rows]"""
    train_prompts: Positive = 1920
    """Prompts to train on. [prompts]"""
    heldout_prompts: Positive = 512
    """Prompts of the evaluations. [prompts]"""
    groups: Positive = 2_000
    """Prompts with 8 ranked responses. [groups]"""
    heldout_pairs: Positive = 1_000
    """Pairs on which the reward model is measured. [pairs]"""
    reward_models: tuple[FurtherRewardModel, ...] = ()
    """Further ones, for arms that read several."""

    @field_validator("reward_models")
    @classmethod
    def _own_folders(cls, models: tuple[FurtherRewardModel, ...]) -> tuple[FurtherRewardModel, ...]:
        names = [model.name for model in models]
        taken = sorted({name for name in names if name in ("world", "sft", "reward") or names.count(name) > 1})
        if taken:
            raise ValueError(f"each needs a folder of its own, not world, sft or reward; change {', '.join(taken)}")
        return models
