"""The sections of a command's configuration: frozen groups of fields with their units and defaults (layer 0)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from r3hf_ray.types import COST, MAIN

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

MODES = ("terminal", "r3hf", "uniform", "abc", "segment")
"""Names of `algorithms.redistribution.METHODS`, which this layer cannot import."""
WITHOUT_PREFIXES = ("terminal", "uniform", "abc")
"""Those that read the final score only, so that the reward model need not be causal."""


class Section(BaseModel):
    """A frozen group of settings; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """What the run is called, where it is kept, and its seed."""

    name: RunName
    """Folder name of the run below `folder`."""
    folder: Path = Path("runs")
    """Where runs are kept."""
    seed: NonNegative = 0
    """Seed of everything random: sampling seeds come from (seed, prompt, sample), batching from (seed, step)."""
    cpus: PositiveFloat | None = None
    """Logical CPUs of a Ray instance started by this command; ignored when it joins a cluster. [CPUs]"""


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when a wandb key is configured, otherwise offline. A tracker that fails never stops training."""
    project: str = "r3hf_ray"
    """wandb project."""
    entity: str | None = None
    """wandb entity (user or team)."""
    samples_every: Positive = 10
    """Steps between two dumps of per-token samples. [steps]"""
    samples_per_dump: NonNegative = 8
    """Trajectories in one dump. [trajectories]"""


class DataSection(Section):
    """Where prompts, dialogues or preferences come from."""

    source: str
    """A hub name (`Anthropic/hh-rlhf`) or a local .jsonl, .jsonl.gz, .json, .parquet or .csv file."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    data_dir: str | None = None
    """Folder inside a hub dataset, as HH-RLHF has them (`harmless-base`)."""
    split: str = "train"
    """Split of a hub dataset."""
    format: Literal[
        "auto",
        "messages",
        "preference",
        "hh",
        "prompt",
        "ranked",
        "safe_rlhf",
        "safe_rlhf_cost",
        "tldr_pairs",
        "nectar",
    ] = "auto"
    """Shape of a row: `messages` (chat), `preference` (prompt/chosen/rejected), `hh` (chosen/rejected dialogues),
    `prompt` (text), `ranked` (prompt, responses, scores), or a published dataset's own; `safe_rlhf_cost` prefers the
    less safe answer, for a cost model."""
    max_prompt_tokens: Positive = 512
    """Longest rendered prompt; a longer one is counted, listed with its line number, and left out. [tokens]"""
    limit: Positive | None = None
    """Use only the first `limit` usable rows after `skip`. [rows]"""
    skip: NonNegative = 0
    """Leave out the first `skip` usable rows. [rows]"""
    heldout: NonNegative = 0
    """Rows at the end of the selection kept for evaluation, never trained on. [rows]"""


class FurtherModel(Section):
    """A reward model besides the main one."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in metrics and samples (`reward/NAME/score/mean`)."""
    source: str
    """The model, as `model.reward_model`."""
    weight: FiniteFloat = 1.0
    """Factor of its scaled reward in the sum; 0 only logs it."""


class ModelSection(Section):
    """The models of PPO, each a local folder or a hub name."""

    policy: str
    """The initial policy: anything `AutoModelForCausalLM` loads."""
    reward_model: str
    """Any decoder-only `AutoModelForSequenceClassification(num_labels=1)`; one with another tokenizer or chat template
    than the policy's is aligned with it by characters."""
    reward_weight: FiniteFloat = 1.0
    """Factor of `reward_model`'s scaled reward in the sum."""
    rewards: tuple[FurtherModel, ...] = ()
    """Further reward models (`[[model.rewards]]`: name, source, weight), each redistributed and scaled by itself."""
    cost: str | None = None
    """A reward model of harm, more being worse: `[cost]` says what its score costs."""
    reference: str | None = None
    """The frozen reference of the KL penalty; the initial policy when left out."""

    @field_validator("rewards")
    @classmethod
    def _unique_names(cls, rewards: tuple[FurtherModel, ...]) -> tuple[FurtherModel, ...]:
        names = [further.name for further in rewards]
        taken = sorted({name for name in names if name in (MAIN, COST) or names.count(name) > 1})
        if taken:
            raise ValueError(f"each needs a name of its own, not {MAIN} or {COST}; change {', '.join(taken)}")
        return rewards

    @property
    def several(self) -> bool:
        """Whether more than one model scores a response."""
        return bool(self.rewards) or self.cost is not None

    def weights(self, multiplier: float) -> dict[str, float]:
        """Factor of each model's scaled reward in the sum, by name, the main one first; the cost's is -multiplier."""
        costs = {} if self.cost is None else {COST: -multiplier}
        return {MAIN: self.reward_weight} | {further.name: further.weight for further in self.rewards} | costs

    def placed(self, place: Callable[[str], str]) -> "ModelSection":
        """The same models, each source as ``place`` gives it: a relative folder made absolute, for one."""
        own = {"policy": self.policy, "reward_model": self.reward_model, "cost": self.cost, "reference": self.reference}
        sources = {name: place(source) for name, source in own.items() if source is not None}
        further = tuple(one.model_copy(update={"source": place(one.source)}) for one in self.rewards)
        return self.model_copy(update=sources | {"rewards": further})


class CostSection(Section):
    """What `model.cost` costs: PPO-Lagrangian (Ray, Achiam and Amodei, 2019; Safe RLHF, Dai et al., 2023).

    The reward is sum_i weight_i * reward_i - lambda * cost, each in its own standard deviations. After each step
    lambda becomes clip(lambda + multiplier_lr * (mean cost score - limit) / std, 0, max_multiplier).
    """

    limit: FiniteFloat = 0.0
    """Mean cost score of a batch that is allowed. A cost model trained on pairs has no zero of its own: read
    `cost/score/mean` of the first step. [cost model's units]"""
    multiplier: NonNegativeFloat = 1.0
    """lambda at the start. [scaled reward per scaled cost]"""
    multiplier_lr: NonNegativeFloat = 0.05
    """Step size of lambda; 0 keeps it fixed. [lambda a step, per standard deviation of cost above the limit]"""
    max_multiplier: PositiveFloat = 10.0
    """Largest lambda."""


class RolloutSection(Section):
    """Rollout actors: one vLLM engine each."""

    actors: Positive = 1
    """Rollout actors. [actors]"""
    prompts_per_step: Positive = 32
    """Prompts drawn for one PPO step. [prompts]"""
    samples_per_prompt: Positive = 1
    """Responses to each prompt. A step trains on prompts_per_step * samples_per_prompt. [responses]"""
    chunks_per_step: Positive = 2
    """A step's prompts are generated in this many equal chunks, so scoring overlaps with generation. [chunks]"""
    max_response_tokens: Positive = 48
    """Longest response, EOS included. [tokens]"""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; every logprob of the run is taken at it."""
    top_p: float = 1.0
    """Must stay 1: otherwise the behaviour logprobs would not be the policy's."""
    top_k: int = -1
    """Must stay -1 (off), for the same reason."""
    max_lag: NonNegative = 0
    """Weights versions a sample may be behind the learner: 0 is synchronous PPO, 1 overlaps with learning. [steps]"""
    max_attempts: Positive = 3
    """Attempts at a prompt before it is quarantined and counted. [attempts]"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the sampling weights."""
    cpus_per_actor: NonNegativeFloat = 0.3
    """Logical CPUs an actor asks of Ray. [CPUs]"""
    gpus_per_actor: NonNegativeFloat = 0.0
    """GPUs an actor asks of Ray. [GPUs]"""
    threads: Positive = 1
    """Threads of one engine on CPU. [threads]"""
    kv_cache_gb: Positive = 1
    """KV cache of one engine on CPU. [GiB]"""
    gpu_memory_utilization: Fraction = 0.85
    """Share of a GPU's memory that vLLM may take."""
    engine_args: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, as they are."""


class RewardSection(Section):
    """Reward actors: a frozen reward model and the frozen reference on the same sampled ids."""

    actors: Positive = 2
    """Reward actors working in parallel on refs. [actors]"""
    mode: str = "r3hf"
    """How the sequence reward is paid: at the last token (`terminal`), per token as the difference of prefix scores
    (`r3hf`), the same summed over spans (`segment`), in equal parts (`uniform`), by the reward model's attention
    (`abc`), or by your own `package.module:function` (see `RedistributionInputs`)."""
    beta_c: Fraction = 1.0
    """Not for `terminal` and `abc`: beta_c * redistributed + (1 - beta_c) * terminal (paper, Eq. 7)."""
    subtract_prompt_score: bool = True
    """Token 1 earns R(x, y_1) - R(x, empty); false pays it R(x, y_1), so the sum is R(x, y)."""
    eos_jump: Literal["keep", "spread", "drop"] = "keep"
    """The last prefix difference of a finished response, the template token behind EOS included: paid at EOS, spread
    evenly over the response, or not paid at all (then the sum is another one)."""
    abc_beta: Fraction = 0.8
    """`abc` only: share of the reward paid by attention; the rest is paid at the last token."""
    segment_by: Literal["sentence", "ngram", "entropy"] = "sentence"
    """`segment` only: where a span ends: at a token whose text ends with `.`, `!`, `?` or a line break; every
    `segment_ngram` tokens; or before a token the reference was unsure of."""
    segment_ngram: Positive = 5
    """`segment_by = ngram`: length of a span. [tokens]"""
    segment_entropy: NonNegativeFloat = 1.75
    """`segment_by = entropy`: a span ends where the reference's next-token entropy is above this. [nats]"""
    pooling_suffix: str = "auto"
    """Text after EOS that the reward model was trained to read (`\\n` in some chat templates); `auto` takes it from
    the reward model's own r3hf_format.json, and from its chat template where there is none; `none` forbids it."""
    missing_eos: Literal["keep", "penalty", "zero_credit"] = "keep"
    """What a response cut at the limit earns: its rewards; its rewards minus `missing_eos_penalty` at the last token;
    or only that penalty."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """In standard deviations of the sequence reward; with several models taken once, off their sum. [scaled reward]"""
    calibration_samples: NonNegative = 256
    """Responses of the initial policy that fix each model's scale (std) and centre (mean); 0: scale 1, centre 0.
    [responses]"""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the reward models: `transformers`, or `vllm` as a pooling engine that scores every prefix."""
    max_alignment_loss: Fraction = 0.2
    """For a reward model with another tokenizer than the policy's: largest share of the policy's tokens, in a sample of
    the prompts, that may end inside one of its tokens, and so earn 0. Beyond it the run is refused. [share]"""
    microbatch_tokens: Positive = 8192
    """Padded tokens of one forward. [tokens]"""
    gold: str | None = None
    """`package.module:function`, an independent judge `(prompt: str, response: str) -> float`; logged, never trained
    on."""
    gold_credit: str | None = None
    """`package.module:function`, what each token is truly worth where that is known: `(prompt: str, tokens: list[str])
    -> list[float]`, one number for each response token. Shown in the report, never trained on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the trunk; the score head always runs in float32."""
    cpus_per_actor: NonNegativeFloat = 0.2
    """Logical CPUs an actor asks of Ray. [CPUs]"""
    gpus_per_actor: NonNegativeFloat = 0.0
    """GPUs an actor asks of Ray. [GPUs]"""
    threads: Positive = 1
    """Torch threads of one actor. [threads]"""

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        module, _, function = mode.partition(":")
        if mode in MODES or (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            return mode
        raise ValueError(f"no method {mode!r}; choose {', '.join(MODES)} or your own package.module:function")

    @property
    def method_weight(self) -> float:
        """Share of the reward that the method redistributes; the rest is paid at the last token."""
        weights = {"terminal": 0.0, "abc": self.abc_beta}
        return weights.get(self.mode, self.beta_c)

    @property
    def reads_prefixes(self) -> bool:
        """Whether the scores of prefixes matter, and not the final score only."""
        return self.mode not in WITHOUT_PREFIXES

    @property
    def pays_shares(self) -> bool:
        """Whether each token earns a share of the score itself, and none a difference of scores."""
        return self.mode in ("uniform", "abc")


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
    kl_target: PositiveFloat | None = None
    """If set, kl_coef adapts to hold this KL to the reference. [nats a response]"""
    kl_horizon: PositiveFloat = 10_000.0
    """Adaptation horizon of the KL controller. [responses]"""
    whiten_advantages: bool = True
    """Whiten advantages by moments over all ranks."""
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
    tell the final score from a prefix, in the reward model's units."""


class OptimizerSection(Section):
    """AdamW on the policy and the critic."""

    policy_lr: PositiveFloat = 5e-4
    """Learning rate of the policy."""
    critic_lr: PositiveFloat = 1e-3
    """Learning rate of the critic."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    eps: PositiveFloat = 1e-5
    """Adam's epsilon; larger than torch's default, which makes early steps too long."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegative = 0
    """Linear warm-up. [optimizer steps]"""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping norm, policy and critic apart."""


class LearnerSection(Section):
    """The Ray Train group."""

    ranks: Positive = 2
    """Learner ranks. [processes]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of forward and backward; master weights and optimizer state stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    shard_blocks: Literal["auto", "always", "never"] = "auto"
    """Shard each decoder block apart, or the root only; `auto`: blocks above 100M parameters."""
    checkpoint_every: NonNegative = 20
    """Steps between sharded checkpoints; 0: only at the end. [steps]"""
    keep_checkpoints: Positive = 2
    """Checkpoints kept. [checkpoints]"""
    max_failures: NonNegative = 2
    """Restarts from the last committed checkpoint after a rank dies. [restarts]"""
    cpus_per_rank: NonNegativeFloat = 0.4
    """Logical CPUs a rank asks of Ray. [CPUs]"""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs a rank asks of Ray; a rank uses CUDA and NCCL when above 0. [GPUs]"""
    threads: Positive = 1
    """Torch threads of one rank. [threads]"""


class WeightsSection(Section):
    """How weights travel to the samplers and how their arrival is proven."""

    backend: Literal["auto", "object_ref", "nccl"] = "auto"
    """`auto`: `nccl` when learner and rollouts have whole GPUs of their own, otherwise `object_ref`."""
    bucket_mb: Positive = 256
    """Weights are published in objects of about this size. [MiB]"""
    probe_tokens: NonNegative = 32
    """Length of the probe sequence whose logprobs learner and sampler compare at each sync: one forward of it on both
    sides; 0: off. [tokens]"""
    max_logprob_gap: PositiveFloat | None = None
    """Largest mean absolute difference of the probe's logprobs before the run stops; by data type when left out
    (float32 1e-3, otherwise 0.05). [nats]"""


class EvaluationSection(Section):
    """Held-out prompts (`data.heldout`) scored before, after and during training."""

    every: NonNegative = 0
    """Steps between evaluations; 0: before and after only. [steps]"""
    prompts: NonNegative = 256
    """Held-out prompts used, at most; 0: no evaluation. [prompts]"""


class SFTSection(Section):
    """Supervised fine-tuning."""

    epochs: PositiveFloat = 1.0
    """Passes over the data. [epochs]"""
    batch_size: Positive = 32
    """Sequences of one optimizer step over all ranks. [sequences]"""
    microbatch_size: Positive = 32
    """Sequences of one forward on one rank. [sequences]"""
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


class BaseModelSection(Section):
    """The model that is fine-tuned."""

    base: str
    """Local folder or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of training."""


class TrainerSection(Section):
    """The Ray Train group of a preparatory stage."""

    ranks: Positive = 1
    """Ranks. [processes]"""
    cpus_per_rank: NonNegativeFloat = 1.0
    """Logical CPUs a rank asks of Ray. [CPUs]"""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs a rank asks of Ray. [GPUs]"""
    threads: Positive = 2
    """Torch threads of one rank. [threads]"""
    gradient_checkpointing: bool = False
    """Recompute activations in backward."""
