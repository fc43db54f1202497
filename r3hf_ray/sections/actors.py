"""Ray's processes: samplers, learner ranks, ranks of a preparatory stage, and the way of weights between them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from r3hf_ray.sections.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

SEQUENCES = 256
"""Responses that an engine samples at once unless `rollout.engine_args` says otherwise."""


class RolloutSection(Section):
    """Rollout actors: one vLLM engine each."""

    actors: Positive = 1
    """Rollout actors. [actors]"""
    prompts_per_step: Positive = 32
    """Prompts drawn for one PPO step. [prompts]"""
    samples_per_prompt: Positive = 1
    """Responses to each prompt. A step trains on prompts_per_step * samples_per_prompt. [responses]"""
    group_size: Positive = 16
    """A step's responses, in order, are dealt in groups of this many: a group goes to one rollout actor and is scored
    in one call when all of it has ended, so that a long response holds back no other group. [responses]"""
    max_requests: Positive | None = None
    """Responses an actor holds at once; further groups wait for whoever has room. Left out: as many as its engine
    takes, `engine_args.max_num_seqs`. [responses]"""
    dispatch: Literal["least_loaded", "fixed"] = "least_loaded"
    """Who gets a group: the actor that holds the fewest responses, or `fixed`: group number mod actors, and one group
    at a time in an engine, so that a rerun with the same actors is the same to the bit on any model."""
    min_actors: Positive = 1
    """Fewest rollout actors that `r3hf scale` may leave; a run waits for ever while so many can come back. [actors]"""
    max_actors: Positive | None = None
    """Most rollout actors that `r3hf scale` may ask for; left out: no limit. [actors]"""
    deadline: PositiveFloat = 600.0
    """How long a group may take before its actor is looked at: one that answers and gets on is called slow, any other
    is started anew, and its groups go elsewhere. [s]"""
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
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm.LLM`, as they are."""

    @property
    def responses_per_step(self) -> int:
        """Responses that a step trains on."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def groups_per_step(self) -> int:
        """Groups of a step; the last may be smaller than the others."""
        return -(-self.responses_per_step // self.group_size)

    @property
    def room(self) -> int:
        """Responses an actor holds at once, after `max_requests` is resolved."""
        return self.max_requests or int(self.engine_args.get("max_num_seqs", SEQUENCES))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine must know besides `[rollout]`.

    Example: ``EngineFacts(model="runs/toy_sft/model", max_model_len=96, eos_ids=(2,), medium="object_ref")``
    """

    model: str
    """Local folder or hub name of the policy."""
    max_model_len: int
    """Prompt + response. [tokens]"""
    eos_ids: tuple[int, ...]
    medium: str
    """How weights come: a name of `weights.media.MEDIA`."""
    unknown_ids: tuple[int, ...] = ()
    """Ids that are no token, and so must not be sampled."""


class LearnerSection(Section):
    """The Ray Train group."""

    ranks: Positive = 2
    """Learner ranks. [processes]"""
    replicas: Positive = 1
    """Copies of the sharded models: each is sharded over ranks / replicas ranks, such as the GPUs of one node, and
    gradients are added up over copies. [copies]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of forward and backward; master weights and optimizer state stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    logits_chunk: Annotated[int, Field(ge=64)] = 1024
    """Response tokens whose logits exist at one time, in learner and reference; backward computes them again. A chunk
    takes up to four times chunk x vocabulary x 4 bytes. [tokens]"""
    shard_blocks: Literal["auto", "always", "never"] = "auto"
    """Shard each decoder block apart, or the root only; `auto`: blocks above 100M parameters."""
    reduce_gradients: Literal["auto", "microbatch", "minibatch"] = "auto"
    """When ranks add their gradients up: after each microbatch, or once an optimizer step, for which each rank holds
    the whole gradient in float32; `auto`: once, where that is at most 2 GiB."""
    checkpoint_every: NonNegative = 20
    """Steps between sharded checkpoints; 0: only at the end. [steps]"""
    keep_checkpoints: Positive = 2
    """Checkpoints kept. [checkpoints]"""
    max_failures: NonNegative = 2
    """Losses of the group that the run survives without a step between them; each restarts it at the last committed
    checkpoint. [losses]"""
    fetch_timeout: PositiveFloat = 60.0
    """How long none of a rank's samples may arrive before those that are missing are made again: the host that held
    them may be gone. [s]"""
    cpus_per_rank: NonNegativeFloat = 0.4
    """Logical CPUs a rank asks of Ray. [CPUs]"""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs a rank asks of Ray; a rank uses CUDA and NCCL when above 0. [GPUs]"""
    threads: Positive = 1
    """Torch threads of one rank. [threads]"""


class WeightsSection(Section):
    """How weights travel to the samplers and how their arrival is proven."""

    backend: str = "auto"
    """`object_ref` (Ray's object store), `nccl` (vLLM's broadcast: whole GPUs for learner and rollouts, and a vLLM
    newer than 0.26), or `auto`: `object_ref`, until another has proven itself on a GPU."""
    bucket_mb: Positive = 256
    """Weights are published in objects of about this size. [MiB]"""
    probe_tokens: NonNegative = 32
    """Length of the probe sequence whose logprobs learner and sampler compare at each sync: one forward of it on both
    sides; 0: off. [tokens]"""
    max_logprob_gap: PositiveFloat | None = None
    """Largest mean absolute difference of the probe's logprobs before the run stops; by data type when left out
    (float32 1e-3, otherwise 0.1: healthy bfloat16 weights show 0.04, stale ones 0.1 to 0.8). [nats]"""


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
