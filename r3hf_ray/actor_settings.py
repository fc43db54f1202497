"""What each rollout and reward actor of a run is started with (layer 4)."""

from r3hf_ray.actors.rollout import EngineFacts
from r3hf_ray.config import PPOConfig
from r3hf_ray.preflight import Plan
from r3hf_ray.scoring.scorer import ScoringSettings
from r3hf_ray.weights.media import medium_of


def engine_facts(config: PPOConfig, plan: Plan) -> EngineFacts:
    """Of a rollout actor."""
    return EngineFacts(
        model=config.model.policy,
        max_model_len=plan.max_model_len,
        eos_ids=plan.eos_ids,
        unknown_ids=plan.unknown_ids,
        medium=medium_of(config.weights.backend),
    )


def scoring_settings(config: PPOConfig, plan: Plan) -> ScoringSettings:
    """Of a reward actor; the configuration's sources are absolute by now, as workers in another directory need them."""
    return ScoringSettings(
        reward=config.reward, model=config.model, temperature=config.rollout.temperature, reads=plan.reward_models
    )
