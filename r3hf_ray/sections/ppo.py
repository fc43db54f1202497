"""The objective, the critic and the optimizers of PPO."""

from typing import Annotated, Literal

from pydantic import Field

from r3hf_ray.sections.fields import BelowOne, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

LRSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"]


class PPOSection(Section):
    """The PPO objective."""

    steps: Positive = 60
    """PPO steps; each trains on one batch and publishes one weights version. [steps]"""
    epochs: Positive = 2
    """Passes over a batch. [epochs]"""
    minibatches: Positive = 2
    """Optimizer steps a pass. [minibatches]"""
    gamma: Fraction = 1.0
    """Discount. Redistribution keeps the optimum only at 1."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce_pp", "r3hf_baseline"] = "gae"
    """`gae`: with a critic. Without one, the reward still to come of each token: minus the mean of the prompt's other
    samples (`rloo`), standardised by the prompt's samples (`grpo`), whitened over the batch (`reinforce_pp`), or as it
    is (`r3hf_baseline`: R(x, y) - R(x, y_<t), for which the reward model is the baseline)."""
    gae_lambda: Fraction = 0.95
    """Lambda of GAE. 0.95 for short responses, 1.0 for long ones or a cold critic."""
    clip_range: PositiveFloat = 0.2
    """Clip of the probability ratio."""
    clip_range_high: PositiveFloat | None = None
    """If set, the ratio's upper clip is 1 + this, and clip_range the lower one only."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """If set, a token with a negative advantage loses at most this many times it (Ye et al., 2020; 3 is usual)."""
    loss_aggregation: Literal["token_mean", "sequence_sum"] = "token_mean"
    """What the policy loss is divided by: the tokens of the optimizer step, or its responses. Tokens of one step weigh
    the same in both; with `sequence_sum` a response does not pull less where responses are long."""
    value_clip_range: NonNegativeFloat = 0.2
    """Clip of the value change, in units of the scaled reward; 0: no clip."""
    kl_coef: NonNegativeFloat = 0.05
    """Price of the KL to the reference, in scaled reward per nat."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of a token's KL: the log ratio, half its square, or exp(-log ratio) - 1 + log ratio. Inside the reward
    only k1 has the gradient of the KL."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is paid. In the loss the gradient is k2's, the right one, whichever estimate is logged."""
    log_kl: bool = True
    """Measure the KL to the reference even where it has no price (`kl_coef = 0` without `kl_target`); false: then no
    reference is loaded, and nothing says how far the policy has moved."""
    kl_target: PositiveFloat | None = None
    """If set, kl_coef adapts to hold this KL to the reference. [nats a response]"""
    kl_horizon: PositiveFloat = 10_000.0
    """Adaptation horizon of the KL controller. [responses]"""
    whiten_advantages: bool = True
    """Whiten advantages by moments over all ranks."""
    old_logprobs: Literal["learner", "sampler"] = "learner"
    """Whose logprobs PPO's ratio is taken to: the learner's own before its first update, or those the samples came
    with, which saves a forward of the policy but holds the two programs' rounding, and the lag where there is one
    (`kl/sampler/start`)."""
    importance_cap: PositiveFloat | None = None
    """If set, the policy loss carries min(exp(old - behaviour), cap): for max_lag >= 1."""
    microbatch_tokens: Positive = 8192
    """Padded tokens of one forward and backward on one rank. [tokens]"""


class CriticSection(Section):
    """Where the value function starts."""

    init: Literal["auto", "sft", "reward_trunk", "reward_model"] = "auto"
    """`sft`: policy trunk + zero head; `reward_trunk`: reward model's trunk + zero head (auto with r3hf);
    `reward_model`: trunk + score head (auto with terminal; with r3hf it counts the prefix score twice)."""
    source: str | None = None
    """Folder read in place of `model.reward_model` for the two latter: the same shape of model, such as one trained to
    tell the final score from a prefix, in the reward model's units. Not with `sft`, which would not read it."""


class OptimizerSection(Section):
    """AdamW on the policy and the critic."""

    policy_lr: PositiveFloat = 5e-4
    """Learning rate of the policy."""
    critic_lr: PositiveFloat = 1e-3
    """Learning rate of the critic."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Adam's betas."""
    eps: PositiveFloat = 1e-5
    """Adam's epsilon. It damps parameters whose gradients are not far above it, and after clipping the RMS gradient is
    at most max_grad_norm over the root of the number of parameters: 3e-3 in the toy, where 1e-5 takes 3% of the
    policy's steps and up to 23% of the critic's, but 1e-5 in a model of 8 billion, where it would take half: use 1e-8
    there. `policy/eps_share` says what it takes."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    lr_schedule: LRSchedule = "constant"
    """Of both learning rates behind the warm-up, one of transformers' own, over all optimizer steps of the run."""
    warmup_steps: NonNegative = 0
    """Linear warm-up. [optimizer steps]"""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping norm, policy and critic apart."""
