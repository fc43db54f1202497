"""Which models a command reads."""

from collections.abc import Callable
from typing import Literal

from pydantic import field_validator

from r3hf_ray.sections.fields import FiniteFloat, MetricName, NonNegativeFloat, PositiveFloat, Section
from r3hf_ray.types import COST, MAIN


class BaseModelSection(Section):
    """The model that is fine-tuned."""

    base: str
    """Local folder or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of training."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Implementation of attention: `auto` is the fastest of transformers' own that gives the scores of the plain one
    (`eager`, which soft-capped models need); `flash_attention_2` needs its package, GPUs and bfloat16."""


class FurtherModel(Section):
    """A reward model besides the main one."""

    name: MetricName
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
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Implementation of attention in all of them: `auto` is the fastest of transformers' own that gives the scores of
    the plain one (`eager`, which soft-capped models need); `flash_attention_2` needs its package, GPUs and bfloat16."""

    @field_validator("rewards")
    @classmethod
    def _unique_names(cls, rewards: tuple[FurtherModel, ...]) -> tuple[FurtherModel, ...]:
        names = [further.name for further in rewards]
        taken = sorted({name for name in names if name in (MAIN, COST) or names.count(name) > 1})
        if taken:
            raise ValueError(f"each needs a name of its own, not {MAIN} or {COST}; change {', '.join(taken)}")
        return rewards

    def weights(self, multiplier: float) -> dict[str, float]:
        """Factor of each model's scaled reward in the sum, by name, the main one first; the cost's is -multiplier."""
        costs = {} if self.cost is None else {COST: -multiplier}
        return {MAIN: self.reward_weight} | {further.name: further.weight for further in self.rewards} | costs

    @property
    def reward_sources(self) -> dict[str, str]:
        """Folder or hub name of every model that scores, by name, the main one first."""
        costs = {} if self.cost is None else {COST: self.cost}
        return {MAIN: self.reward_model} | {further.name: further.source for further in self.rewards} | costs

    def placed(self, place: Callable[[str], str]) -> "ModelSection":
        """The same models, each source as ``place`` gives it: a relative folder made absolute, for one."""
        own = {"policy": self.policy, "reward_model": self.reward_model, "cost": self.cost, "reference": self.reference}
        sources = {name: place(source) for name, source in own.items() if source is not None}
        further = tuple(one.model_copy(update={"source": place(one.source)}) for one in self.rewards)
        return self.model_copy(update=sources | {"rewards": further})


def field_of(name: str) -> str:
    """What a model that scores is called in the configuration."""
    return {MAIN: "model.reward_model", COST: "model.cost"}.get(name, f"model.rewards {name}")


class CostSection(Section):
    """What `model.cost` costs: PPO-Lagrangian (Ray, Achiam and Amodei, 2019; Safe RLHF, Dai et al., 2023).

    The reward is sum_i weight_i * reward_i - lambda * cost, each in its own standard deviations. After each step
    lambda becomes clip(lambda + multiplier_lr * (mean cost score - limit) / std, 0, max_multiplier).
    """

    limit: FiniteFloat = 0.0
    """Mean cost score of a batch that is allowed; must be given where multiplier_lr > 0. A cost model trained on pairs
    has no zero of its own: read `cost/score/mean` of the first step. [cost model's units]"""
    multiplier: NonNegativeFloat = 1.0
    """lambda at the start. [scaled reward per scaled cost]"""
    multiplier_lr: NonNegativeFloat = 0.05
    """Step size of lambda; 0 keeps it fixed. [lambda a step, per standard deviation of cost above the limit]"""
    max_multiplier: PositiveFloat = 10.0
    """Largest lambda."""
