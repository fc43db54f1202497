"""Training before PPO: fine-tuning and reward models."""

from typing import Literal

from r3hf_ray.sections.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class SFTSection(Section):
    """Supervised fine-tuning."""

    epochs: PositiveFloat = 1.0
    """Passes over the data. [epochs]"""
    batch_size: Positive = 32
    """Sequences of one optimizer step over all ranks. [sequences]"""
    microbatch_size: Positive = 32
    """Sequences of one forward on one rank, at most its share of a step. [sequences]"""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    max_tokens: Positive = 1024
    """Longest prompt + answer; a longer one is counted, listed and left out. [tokens]"""
    warmup_steps: NonNegative = 0
    """Linear warm-up. [optimizer steps]"""


class RewardTrainingSection(SFTSection):
    """Bradley-Terry training of a reward model."""

    groups_per_step: Positive = 8
    """Ranked data only: prompts of one optimizer step. [groups]"""
    steps: Positive | None = None
    """Ranked data only: optimizer steps; all groups once when left out. [steps]"""
    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores (TRL's `center_rewards_coefficient`)."""
    prefix_weight: NonNegativeFloat = 0.0
    """Weight of the same loss for both answers cut at one random fraction of their lengths, which teaches the model
    about unfinished answers at no extra forward; 0: off, 0.5 is usual."""
    head: Literal["last_token", "running_sum"] = "last_token"
    """Score of an answer: the head at its last token, or the sum of the head over all tokens, where a token's reward is
    what the head says there. A running-sum model is a class of its own (`docs/method.md`)."""
