"""Frozen configuration: one schema a job, sections from `sections/`, and the rules between fields (floor 0)."""

from typing import ClassVar, Literal

from pydantic import model_validator

from r3hf_ray.methods import methods_that
from r3hf_ray.sections.actors import LearnerSection, RolloutSection, TrainerSection, WeightsSection
from r3hf_ray.sections.data import DataSection
from r3hf_ray.sections.models import BaseModelSection, CostSection, ModelSection
from r3hf_ray.sections.ppo import CriticSection, OptimizerSection, PPOSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.sections.runs import EvaluationSection, RunSection, TrackingSection
from r3hf_ray.sections.stages import RewardTrainingSection, SFTSection
from r3hf_ray.settings import Command
from r3hf_ray.types import MAIN


class SFTConfig(Command):
    """Train the initial policy on chats."""

    command: ClassVar[str] = "sft"

    run: RunSection
    model: BaseModelSection
    data: DataSection
    sft: SFTSection = SFTSection()
    trainer: TrainerSection = TrainerSection()
    tracking: TrackingSection = TrackingSection()


class RewardConfig(Command):
    """Train a reward model from preferences."""

    command: ClassVar[str] = "reward"

    run: RunSection
    model: BaseModelSection
    data: DataSection
    reward_training: RewardTrainingSection = RewardTrainingSection()
    trainer: TrainerSection = TrainerSection()
    tracking: TrackingSection = TrackingSection()


class PPOConfig(Command):
    """PPO with token-level redistributed rewards."""

    command: ClassVar[str] = "ppo"

    run: RunSection
    model: ModelSection
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    cost: CostSection = CostSection()
    ppo: PPOSection = PPOSection()
    critic: CriticSection = CriticSection()
    optimizer: OptimizerSection = OptimizerSection()
    learner: LearnerSection = LearnerSection()
    weights: WeightsSection = WeightsSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def responses_per_step(self) -> int:
        """Responses of one PPO step."""
        return self.rollout.responses_per_step

    @property
    def critic_init(self) -> Literal["sft", "reward_trunk", "reward_model"]:
        """The critic's start after `auto` is resolved."""
        if self.critic.init != "auto":
            return self.critic.init
        alone = self.summed == {MAIN} and self.model.reward_weight > 0.0
        sparse = not self.reward.facts.mixed_by
        return "reward_model" if sparse and alone else "reward_trunk"

    @property
    def summed(self) -> set[str]:
        """Names of the models that are trained on: of a weight other than 0, or a cost whose price can become one."""
        price = self.cost.multiplier or self.cost.multiplier_lr
        return {name for name, weight in self.model.weights(price).items() if weight}

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.ppo.steps * self.ppo.epochs * self.ppo.minibatches

    @property
    def has_reference(self) -> bool:
        """Whether anything uses the frozen reference: a price, a log, spans by its entropy, or a user's own method."""
        ppo, reward = self.ppo, self.reward
        by_entropy = "span_ends" in reward.facts.needs and reward.segment_by == "entropy"
        return bool(ppo.kl_coef or ppo.kl_target or ppo.log_kl or by_entropy or ":" in reward.mode)

    @property
    def has_critic(self) -> bool:
        """Whether a critic is loaded and trained."""
        return self.ppo.advantage == "gae"

    @property
    def terminal_weight(self) -> float:
        """Share of the reward that is paid at the last token: 1 in mode `terminal`, else 1 - method_weight."""
        return 1.0 - self.reward.method_weight

    @model_validator(mode="after")
    def _cross_field_rules(self) -> "PPOConfig":
        rollout, ppo, responses = self.rollout, self.ppo, self.responses_per_step
        rules = [
            (rollout.top_p == 1.0, "rollout.top_p must be 1: otherwise the behaviour logprobs are not the policy's"),
            (
                rollout.top_k in (-1, 0),
                "rollout.top_k must be -1 (off): otherwise the behaviour logprobs are not the policy's",
            ),
            *(
                (
                    least <= section.actors <= (section.max_actors or section.actors),
                    f"{name}.actors = {section.actors} must lie between {least} ({name}.min_actors) and "
                    f"{section.max_actors} ({name}.max_actors)",
                )
                for name, section, least in (
                    ("rollout", rollout, rollout.min_actors),
                    ("reward", self.reward, 1),
                )
            ),
            (
                responses >= ppo.minibatches * self.learner.ranks,
                f"ppo.minibatches ({ppo.minibatches}) x learner.ranks ({self.learner.ranks}) is more than the "
                f"{responses} responses of a step",
            ),
            (
                self.learner.ranks % self.learner.replicas == 0,
                f"learner.replicas ({self.learner.replicas}) must divide learner.ranks ({self.learner.ranks})",
            ),
            (
                ppo.old_logprobs == "learner" or ppo.importance_cap is None,
                "ppo.importance_cap weighs the learner's old logprobs by the sampler's: set ppo.old_logprobs = learner",
            ),
            *self._credit_rules(),
            *self._model_rules(),
        ]
        broken = [sentence for holds, sentence in rules if not holds]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    def _model_rules(self) -> list[tuple[bool, str]]:
        cost, default = self.cost, CostSection()
        changed = [name for name in CostSection.model_fields if dict(cost)[name] != dict(default)[name]]
        return [
            (bool(self.summed), "model.reward_weight = 0 leaves no model that is trained on"),
            (
                self.model.cost is not None or not changed,
                f"{', '.join(f'cost.{name}' for name in changed)} needs a cost model: set model.cost",
            ),
            (
                self.model.cost is None or not cost.multiplier_lr or "limit" in cost.model_fields_set,
                "cost.limit must be set: cost.multiplier_lr > 0 holds the cost to it; read cost/score/mean of a first "
                "step, or set cost.multiplier_lr = 0 for a fixed price",
            ),
            (
                cost.multiplier <= cost.max_multiplier,
                f"cost.multiplier ({cost.multiplier:g}) must be at most cost.max_multiplier ({cost.max_multiplier:g})",
            ),
            (
                not self.has_critic or self.critic_init != "reward_model" or self.model.reward_weight > 0.0,
                "critic.init = reward_model starts at the reward model's scores: model.reward_weight must be above 0",
            ),
            (
                self.model.attention != "flash_attention_2"
                or all(
                    part.dtype == "bfloat16" and gpus > 0
                    for part, gpus in (
                        (self.learner, self.learner.gpus_per_rank),
                        (self.reward, self.reward.gpus_per_actor),
                    )
                ),
                "model.attention = flash_attention_2 needs GPUs and dtype = bfloat16 in [learner] and in [reward]",
            ),
            (
                self.critic.init != "sft" or self.critic.source is None,
                "critic.init = sft starts from the policy and does not read critic.source: leave one of them out",
            ),
        ]

    def _credit_rules(self) -> list[tuple[bool, str]]:
        reward, ppo = self.reward, self.ppo
        facts = reward.facts
        grouped = ppo.advantage in ("rloo", "grpo")
        lender, names = reward.prefixes_from, [further.name for further in self.model.rewards]
        return [
            (
                lender is None or lender in names,
                f"reward.prefixes_from = {lender} is none of [[model.rewards]] ({', '.join(names) or 'empty'})",
            ),
            (
                lender is None or facts.reads_prefixes,
                f"reward.prefixes_from needs a mode that reads prefixes, not reward.mode = {reward.mode}",
            ),
            (
                lender is None or reward.eos_jump != "drop",
                f"reward.prefixes_from = {lender} pays model.reward_model's reward in the last difference, which "
                "reward.eos_jump = drop takes away: use keep or spread",
            ),
            (
                reward.eos_jump == "keep" or facts.reads_prefixes,
                f"reward.eos_jump = {reward.eos_jump} needs a mode that pays differences of prefix scores, not "
                f"reward.mode = {reward.mode}",
            ),
            (
                facts.mixed_by in ("", "beta_c") or reward.beta_c == 1.0,
                f"reward.beta_c must stay 1 with reward.mode = {reward.mode}, which mixes by reward.{facts.mixed_by}",
            ),
            (
                not grouped or self.rollout.samples_per_prompt >= 2,
                f"ppo.advantage = {ppo.advantage} compares the samples of a prompt: rollout.samples_per_prompt must be "
                "at least 2",
            ),
            (
                not grouped or facts.potential_based,
                f"ppo.advantage = {ppo.advantage} needs reward.mode = "
                f"{methods_that(lambda method: method.potential_based)}: with {reward.mode} "
                "what is still to be paid shrinks along a response, and its group's mean is on another scale",
            ),
            (
                ppo.advantage != "reinforce_pp" or ppo.whiten_advantages,
                "ppo.advantage = reinforce_pp is whitening: ppo.whiten_advantages must stay true",
            ),
            (
                ppo.advantage != "r3hf_baseline" or (facts.pays_differences and reward.beta_c == 1.0),
                f"ppo.advantage = r3hf_baseline needs reward.mode = "
                f"{methods_that(lambda method: method.pays_differences)} and reward.beta_c = 1: otherwise nothing "
                "stands in for a critic",
            ),
        ]


class PlanConfig(PPOConfig):
    """What a job of `r3hf ppo` needs of memory, links and nodes, and whether it fits; no weight is read."""

    command: ClassVar[str] = "plan"
