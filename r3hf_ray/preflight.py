"""Everything about a PPO run that can be known to be wrong before an actor starts (layer 4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from r3hf_ray.config import MODES, ConfigError, PPOConfig
from r3hf_ray.data.chat import compare_format, pooling_suffix
from r3hf_ray.data.loading import PromptRow, Report, load_prompts
from r3hf_ray.models.load import (
    ModelError,
    check_folder,
    check_same_vocabulary,
    eos_ids,
    load_tokenizer,
    require_score_head,
)
from r3hf_ray.models.method_inputs import sentence_end_ids
from r3hf_ray.models.scoring import load_gold
from r3hf_ray.models.user_functions import user_function

MARGIN = 1e-6
"""Slack for sums of fractional CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the checks found out, and the actors need."""

    prompts: list[np.ndarray]
    """Token ids of the prompts to train on."""
    heldout: list[np.ndarray]
    """Token ids of the held-out prompts."""
    report: Report
    eos_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    max_model_len: int
    probe_ids: list[int]
    warnings: list[str]


def check(config: PPOConfig) -> Plan:
    """Check models, data and their fit.

    Raises:
        ConfigError: one sentence naming the field or line, and what to do.
    """
    check_folder(config.model.policy, "policy")
    check_folder(config.model.reward_model, "reward model")
    if config.model.reference:
        check_folder(config.model.reference, "reference")
    tokenizer = load_tokenizer(config.model.policy)
    policy = _model_config(config.model.policy, "policy")
    ends = eos_ids(tokenizer, policy, _generation_config(config.model.policy))
    _check_reward_model(config, tokenizer)
    if config.reward.gold:
        load_gold(config.reward.gold)
    _check_method(config, tokenizer)
    loaded = load_prompts(config.data, tokenizer)
    rows = loaded.train + loaded.heldout
    needed = max(len(row.token_ids) for row in rows) + config.rollout.max_response_tokens
    _check_window(policy, rows, needed, config)
    window = _window(policy)
    prompts, heldout = (
        [np.asarray(r.token_ids, dtype=np.int32) for r in part] for part in (loaded.train, loaded.heldout)
    )
    reward_tokenizer = load_tokenizer(config.model.reward_model)
    return Plan(
        prompts=prompts,
        heldout=heldout,
        report=loaded.report,
        eos_ids=tuple(ends),
        suffix_ids=tuple(pooling_suffix(config.model.reward_model, reward_tokenizer, config.reward.pooling_suffix)),
        max_model_len=min(max(needed, config.weights.probe_tokens + 1), window),
        probe_ids=probe_sequence(prompts, min(config.weights.probe_tokens, window - 1)),
        warnings=_warnings(config),
    )


def probe_sequence(prompts: list[np.ndarray], length: int) -> list[int]:
    """The first `length` tokens of all prompts, one after the other and over again: real ids, the same in every run."""
    ids = [int(token) for prompt in prompts[: max(1, length)] for token in prompt]
    return (ids * (length // len(ids) + 1))[:length]


def check_resources(config: PPOConfig, available: dict[str, float]) -> None:
    """Refuse what the cluster can never place, instead of waiting for it without a word.

    Raises:
        ConfigError: it names what is asked for and what there is.
    """
    rollout, reward, learner = config.rollout, config.reward, config.learner
    asked = {
        "CPU": rollout.actors * rollout.cpus_per_actor
        + reward.actors * reward.cpus_per_actor
        + learner.ranks * learner.cpus_per_rank,
        "GPU": rollout.actors * rollout.gpus_per_actor
        + reward.actors * reward.gpus_per_actor
        + learner.ranks * learner.gpus_per_rank,
    }
    for kind, amount in asked.items():
        if amount > available.get(kind, 0.0) + MARGIN:
            raise ConfigError(
                f"the run asks for {amount:g} {kind}s (rollout {rollout.actors} actors, reward {reward.actors} actors, "
                f"learner {learner.ranks} ranks) and the cluster has {available.get(kind, 0.0):g}: lower "
                f"{kind.lower()}s_per_actor, {kind.lower()}s_per_rank or the counts, or add nodes"
            )


def _check_reward_model(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    source = config.model.reward_model
    labels = _model_config(source, "reward model").num_labels
    if labels != 1:
        raise ModelError(f"{source}: a reward model has one label, this has {labels}; train one with `r3hf reward`")
    require_score_head(source)
    check_same_vocabulary(tokenizer, load_tokenizer(source))
    compare_format(source, tokenizer)


def _check_method(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a reward actor would find out only after it has loaded its models."""
    if config.reward.mode not in MODES:
        user_function(config.reward.mode, field="reward.mode")
    if config.reward.mode == "segment" and config.reward.segment_by == "sentence":
        sentence_end_ids(tokenizer)


def _check_window(policy: PretrainedConfig, rows: list[PromptRow], needed: int, config: PPOConfig) -> None:
    window = _window(policy)
    if needed > window:
        longest = max(rows, key=lambda row: len(row.token_ids))
        raise ConfigError(
            f"{config.data.source}: row {longest.row} has {len(longest.token_ids)} prompt tokens, which with "
            f"rollout.max_response_tokens ({config.rollout.max_response_tokens}) is more than the policy's window of "
            f"{window}: lower data.max_prompt_tokens to leave such rows out, or rollout.max_response_tokens"
        )


def _warnings(config: PPOConfig) -> list[str]:
    reward = config.reward
    warnings = []
    differences = reward.mode in ("r3hf", "segment")
    if differences and config.has_critic and config.critic_init == "reward_model":
        warnings.append(
            f"critic.init = reward_model with reward.mode = {reward.mode} counts the prefix score twice: the critic "
            "starts at it and the rewards already are its differences; use reward_trunk (the trunk with a zero head)"
        )
    if differences and config.ppo.gamma < 1.0:
        warnings.append(
            "ppo.gamma < 1: redistribution then changes which policy is best, not only how fast it is found"
        )
    if config.ppo.kl_in == "reward" and config.ppo.kl_estimator != "k1":
        warnings.append(
            f"ppo.kl_estimator = {config.ppo.kl_estimator} inside the reward does not have the gradient of the KL: "
            "use k1, or ppo.kl_in = loss"
        )
    if config.rollout.max_lag > 0 and config.ppo.importance_cap is None:
        warnings.append("rollout.max_lag > 0 without ppo.importance_cap: off-policy samples get no importance weight")
    return warnings


def _model_config(source: str, kind: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as {kind}: {str(error).strip().splitlines()[0]}") from error


def _generation_config(source: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a model folder need not have one
        return None


def _window(policy: PretrainedConfig) -> int:
    return int(policy.get_text_config().max_position_embeddings)
