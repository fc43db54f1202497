"""How a response is scored and its reward paid."""

from typing import Literal

from pydantic import field_validator

from r3hf_ray.methods import METHODS, MethodFacts, facts_of
from r3hf_ray.sections.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class RewardSection(Section):
    """Reward actors: a frozen reward model and the frozen reference on the same sampled ids."""

    actors: Positive = 2
    """Reward actors working in parallel on refs. [actors]"""
    max_actors: Positive | None = None
    """Most reward actors that `r3hf scale` may ask for; left out: no limit. [actors]"""
    deadline: PositiveFloat = 600.0
    """How long the scoring of a group may take before its actor is started anew and the group goes elsewhere. [s]"""
    mode: str = "r3hf"
    """How the sequence reward is paid: at the last token (`terminal`), per token as the difference of prefix scores
    (`r3hf`), the same summed over spans (`segment`), in equal parts (`uniform`), by the reward model's attention
    (`abc`), or by your own `package.module:function` (see `RedistributionInputs`)."""
    beta_c: Fraction = 1.0
    """Not for `terminal` and `abc`: beta_c * redistributed + (1 - beta_c) * terminal (paper, Eq. 7)."""
    prefixes_from: str | None = None
    """Name of one of `[[model.rewards]]`, usually of weight 0, whose prefix scores Q stand in for the main model's:
    `P_t := P_0 + Q_t - Q_0`. What is paid in all stays the main model's R - P_0. For a model that knows beginnings
    better, trained on the same preferences with `reward_training.prefix_weight`, and so in the same units. Not with
    `eos_jump = "drop"`, which would take R away and leave Q_{T-1} - Q_0."""
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
    the reward model's own r3hf_format.json, and from its chat template where there is none; `none` forbids it to every
    reward model. A text of your own is for `model.reward_model` alone: the others keep to `auto`."""
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
        if mode in METHODS or (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            return mode
        raise ValueError(f"no method {mode!r}; choose {', '.join(METHODS)} or your own package.module:function")

    @property
    def facts(self) -> MethodFacts:
        """Of the method that `mode` names."""
        return facts_of(self.mode)

    @property
    def method_weight(self) -> float:
        """Share of the reward that the method redistributes; the rest is paid at the last token."""
        return {"": 0.0, "beta_c": self.beta_c, "abc_beta": self.abc_beta}[self.facts.mixed_by]
