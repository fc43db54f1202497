"""What a run says of itself before an actor starts: its counts, what may surprise, and what it will not do as asked."""

import os
from collections.abc import Iterable

from pydantic import BaseModel

from r3hf_ray.config import PPOConfig


def arithmetic(config: PPOConfig, prompts: int | None) -> list[tuple[str, str]]:
    """The counts of a run, in words, printed before any actor starts; ``prompts`` is None where no data was read."""
    rollout, ppo, ranks = config.rollout, config.ppo, config.learner.ranks
    responses = config.responses_per_step
    drawn = f"{rollout.prompts_per_step} a step: {rollout.prompts_per_step * ppo.steps} in {ppo.steps} steps"
    if prompts is not None:
        passes = ppo.steps * rollout.prompts_per_step / prompts
        drawn = f"{prompts} to train on, {rollout.prompts_per_step} a step: {passes:.2f} passes in {ppo.steps} steps"
    updates = ppo.epochs * ppo.minibatches
    return [
        ("prompts", drawn),
        (
            "responses",
            f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {responses} a step, "
            f"{responses * ppo.steps} in all",
        ),
        (
            "generation",
            f"{rollout.actors} rollout actor(s), {rollout.groups_per_step} groups of at most "
            f"{min(rollout.group_size, responses)} responses, at most {rollout.max_lag} version(s) behind",
        ),
        ("scoring", f"{config.reward.actors} reward actor(s), mode {config.reward.mode}"),
        (
            "learning",
            f"{ranks} rank(s) x {responses / ranks:g} responses, {ppo.minibatches} minibatches of "
            f"{responses / ppo.minibatches:g}",
        ),
        (
            "optimizer",
            f"{ppo.epochs} epochs x {ppo.minibatches} minibatches = {updates} optimizer steps a PPO step, "
            f"{updates * ppo.steps} in all",
        ),
    ]


def risks(config: PPOConfig) -> list[str]:
    """Settings that are allowed together, and rarely wanted: one sentence each."""
    reward = config.reward
    warnings = []
    differences = reward.facts.pays_differences
    if differences and config.has_critic and config.critic_init == "reward_model":
        warnings.append(
            f"critic.init = reward_model with reward.mode = {reward.mode} counts the prefix score twice: the critic "
            "starts at it and the rewards already are its differences; use reward_trunk (the trunk with a zero head)"
        )
    several = len(config.summed) > 1
    if several and config.has_critic and config.critic_init == "reward_model":
        warnings.append(
            "critic.init = reward_model starts at the scores of model.reward_model alone, and the reward is a sum over "
            "several models; use reward_trunk (the trunk with a zero head)"
        )
    if several and not reward.calibration_samples:
        warnings.append(
            "reward.calibration_samples = 0 with several models adds their scores in each one's own units: "
            "weights and cost.multiplier then depend on them"
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
    return [*warnings, *_slow_types(config)]


def _slow_types(config: PPOConfig) -> list[str]:
    """The default is for CPUs."""
    on_gpu = {
        "rollout": (config.rollout.gpus_per_actor, config.rollout.dtype),
        "learner": (config.learner.gpus_per_rank, config.learner.dtype),
        "reward": (config.reward.gpus_per_actor, config.reward.dtype),
    }
    slow = [f"{name}.dtype" for name, (gpus, dtype) in on_gpu.items() if gpus > 0 and dtype == "float32"]
    what = (
        "on a GPU is several times as slow as bfloat16 and takes twice its memory, and vLLM's flash attention has none"
    )
    return [f"{', '.join(slow)} = float32 {what}: set bfloat16"] if slow else []


def not_as_asked(config: PPOConfig, *, heldout: int, window: int) -> list[str]:
    """Settings that were given and are capped or not read in this run: one sentence each.

    Args:
        config: of the run; a field at its default was not asked for.
        heldout: held-out prompts that the data gives.
        window: longest text that policy and reference read. [tokens]
    """
    return [
        *_capped(config, heldout, window),
        *(f"{names} not read: {why}" for names, why in _not_read(config, heldout)),
    ]


def _capped(config: PPOConfig, heldout: int, window: int) -> list[str]:
    rollout, tracking, ranks = config.rollout, config.tracking, config.learner.ranks
    groups, share = rollout.groups_per_step * (rollout.max_lag + 1), config.responses_per_step // ranks
    asked, probe = "prompts" in _given(config.evaluation), config.weights.probe_tokens
    found = [
        (
            rollout.actors > groups,
            f"rollout.actors = {rollout.actors}: {rollout.actors - groups} of them idle at any time, since only "
            f"{groups} groups are under way (of rollout.group_size, here {rollout.group_size}): a smaller one, or more "
            "rollout.prompts_per_step",
        ),
        (
            asked and 0 < heldout < config.evaluation.prompts,
            f"evaluation.prompts = {config.evaluation.prompts}: the data holds out {heldout} (data.heldout), which are "
            "all used",
        ),
        (
            "samples_per_dump" in _given(tracking) and tracking.samples_per_dump > share,
            f"tracking.samples_per_dump = {tracking.samples_per_dump}: a dump has at most {share} responses, those of "
            "rank 0",
        ),
        (probe >= window, f"weights.probe_tokens = {probe}: the models read {window}, so that {window - 1} are used"),
    ]
    return [sentence for holds, sentence in found if holds]


def _not_read(config: PPOConfig, heldout: int) -> Iterable[tuple[str, str]]:
    """(given fields, why nothing reads them)."""
    rollout, reward, ppo = config.rollout, config.reward, config.ppo
    on_gpu, method = rollout.gpus_per_actor > 0, f"reward.mode = {reward.mode}"
    spans, facts = "span_ends" in reward.facts.needs, reward.facts
    by = reward.segment_by if spans else ""
    backend = config.weights.backend
    rules = [
        (not on_gpu, "rollout", ["gpu_memory_utilization"], "rollout.gpus_per_actor = 0: engines run on the CPU"),
        (on_gpu, "rollout", ["kv_cache_gb"], "rollout.gpus_per_actor > 0: engines run on a GPU"),
        (
            not heldout or not config.evaluation.prompts,
            "evaluation",
            ["every", *(["prompts"] if config.evaluation.prompts else [])],
            "there are no held-out prompts (data.heldout, evaluation.prompts)",
        ),
        (config.tracking.wandb == "disabled", "tracking", ["project", "entity"], "tracking.wandb = disabled"),
        (not config.tracking.samples_per_dump, "tracking", ["samples_every"], "tracking.samples_per_dump = 0"),
        ("RAY_ADDRESS" in os.environ, "run", ["cpus"], "RAY_ADDRESS names a cluster, which the run joins"),
        (facts.mixed_by != "beta_c", "reward", ["beta_c"], method),
        (not facts.reads_prefixes, "reward", ["subtract_prompt_score", "max_alignment_loss"], method),
        (facts.mixed_by != "abc_beta", "reward", ["abc_beta"], method),
        (not spans, "reward", ["segment_by", "segment_ngram", "segment_entropy"], method),
        (by in ("sentence", "entropy"), "reward", ["segment_ngram"], f"reward.segment_by = {by}"),
        (by in ("sentence", "ngram"), "reward", ["segment_entropy"], f"reward.segment_by = {by}"),
        (reward.missing_eos == "keep", "reward", ["missing_eos_penalty"], "reward.missing_eos = keep"),
        (not config.has_critic, "ppo", ["gae_lambda", "value_clip_range"], f"ppo.advantage = {ppo.advantage}"),
        (not config.has_critic, "critic", ["init", "source"], f"ppo.advantage = {ppo.advantage}"),
        (not config.has_critic, "optimizer", ["critic_lr"], f"ppo.advantage = {ppo.advantage}"),
        (ppo.kl_target is None, "ppo", ["kl_horizon"], "ppo.kl_target is not set, so ppo.kl_coef stays as it is"),
        (backend == "nccl", "weights", ["bucket_mb"], "weights.backend = nccl broadcasts tensor by tensor"),
        (not config.weights.probe_tokens, "weights", ["max_logprob_gap"], "weights.probe_tokens = 0"),
    ]
    sections = dict(config)
    for holds, section, names, why in rules:
        given = [f"{section}.{name}" for name in names if name in _given(sections[section])]
        if holds and given:
            yield f"{', '.join(given)} {'is' if len(given) == 1 else 'are'}", why


def _given(section: BaseModel) -> set[str]:
    """Fields that were set to something else than their default."""
    values, fields = dict(section), type(section).model_fields
    return {name for name in section.model_fields_set if values[name] != fields[name].default}
