"""What each rollout and reward actor of a run is started with (layer 4)."""

from dataclasses import replace

from r3hf_ray.actors.rollout import EngineFacts
from r3hf_ray.config import PPOConfig
from r3hf_ray.preflight import Plan, reward_sources
from r3hf_ray.scoring.scorer import ScoringSettings
from r3hf_ray.types import MAIN
from r3hf_ray.weights.media import medium_of


def engine_facts(config: PPOConfig, plan: Plan) -> EngineFacts:
    """Of a rollout actor."""
    return EngineFacts(
        model=config.model.policy,
        max_model_len=plan.max_model_len,
        eos_ids=plan.eos_ids,
        medium=medium_of(config.weights.backend),
    )


def scoring_settings(config: PPOConfig, plan: Plan) -> ScoringSettings:
    """Of a reward actor."""
    reward, models = config.reward, plan.reward_models
    # The configuration's sources are absolute by now, which workers in another directory need.
    further = {name: source for name, source in reward_sources(config.model).items() if name != MAIN}
    return ScoringSettings(
        reward_model=config.model.reward_model,
        reference=config.model.reference or config.model.policy,
        tokenizer=config.model.policy,
        temperature=config.rollout.temperature,
        mode=reward.mode,
        beta_c=reward.method_weight,
        prefixes_from=reward.prefixes_from,
        subtract_prompt_score=reward.subtract_prompt_score,
        eos_jump=reward.eos_jump,
        segment_by=reward.segment_by,
        segment_ngram=reward.segment_ngram,
        segment_entropy=reward.segment_entropy,
        suffix_ids=models[MAIN].suffix_ids,
        translation=models[MAIN].translation,
        longest=models[MAIN].longest,
        further={name: replace(models[name], source=source) for name, source in further.items()},
        dtype=reward.dtype,
        microbatch_tokens=reward.microbatch_tokens,
        gold=reward.gold,
        device="cuda" if reward.gpus_per_actor > 0 else "cpu",
    )
