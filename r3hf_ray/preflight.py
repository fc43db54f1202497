"""Everything about a PPO run that can be known to be wrong before an actor starts (layer 4)."""

import math
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.config import PPOConfig
from r3hf_ray.counts_and_warnings import not_as_asked, risks
from r3hf_ray.data.loading import PromptRow, Report, load_prompts
from r3hf_ray.errors import ConfigError, ModelError
from r3hf_ray.methods import METHODS
from r3hf_ray.models.chat import pooling_suffix
from r3hf_ray.models.folder import ModelFolder, absolute, check_same_vocabulary, knows_ids, load_tokenizer, read_config
from r3hf_ray.models.load import require_score_head
from r3hf_ray.planning.placement import Cluster, cluster_of
from r3hf_ray.planning.plan import make_plan
from r3hf_ray.planning.processes import GIB
from r3hf_ray.planning.transfers import Links
from r3hf_ray.scoring.method_inputs import sentence_end_ids
from r3hf_ray.scoring.reward_prompts import measure_fit, translation_of
from r3hf_ray.scoring.scorer import RewardModel, ScoringSettings, load_gold
from r3hf_ray.scoring.vllm_reader import require_readable
from r3hf_ray.sections.actors import EngineFacts
from r3hf_ray.sections.models import field_of
from r3hf_ray.sections.ppo import CriticSection
from r3hf_ray.types import MAIN
from r3hf_ray.user_functions import user_function
from r3hf_ray.weights.media import check_medium, medium_of

SURE = 0.2
"""How much too high a plan may be; those held to a measurement were at most 6% above it (docs/results.md)."""
MARGIN = 1e-6
"""Slack for sums of fractional CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the checks found out, and the actors need."""

    config: PPOConfig
    """With what the checks have settled: `critic.init = auto` where the reward model has another tokenizer, and local
    model folders as absolute paths."""
    prompts: list[np.ndarray]
    """Token ids of the prompts to train on."""
    heldout: list[np.ndarray]
    """Token ids of the held-out prompts."""
    report: Report
    engine: EngineFacts
    scoring: ScoringSettings
    probe_ids: list[int]
    warnings: list[str]


def check(config: PPOConfig) -> Plan:
    """Check models, data and their fit.

    Raises:
        ConfigError: one sentence naming the field or line, and what to do.
    """
    _check_settings(config)
    policy = ModelFolder(config.model.policy, "policy")
    policy.require_language_model()
    ends, tokenizer, window = policy.end_ids, policy.tokenizer, policy.window
    for source in config.model.reward_sources.values():
        _check_reward_model(source)
        if config.reward.backend == "vllm":
            require_readable(source, attention="attention" in config.reward.facts.needs)
    if config.critic.source:
        _check_reward_model(config.critic.source)
    _check_method(config, tokenizer)
    loaded = load_prompts(config.data, tokenizer)
    rows = loaded.train + loaded.heldout
    needed = max(len(row.token_ids) for row in rows) + config.rollout.max_response_tokens
    _check_window(window, rows, needed, config)
    if config.model.reference:
        _check_reference(config.model.reference, tokenizer, needed)
    prompts, heldout = (
        [np.asarray(r.token_ids, dtype=np.int32) for r in part] for part in (loaded.train, loaded.heldout)
    )
    models = {
        name: _reward_model(name, source, config, tokenizer, rows)
        for name, source in config.model.reward_sources.items()
    }
    config, settled = _settled(config, tokenizer)
    config = with_absolute_models(config)
    return Plan(
        config=config,
        prompts=prompts,
        heldout=heldout,
        report=loaded.report,
        engine=EngineFacts(
            model=config.model.policy,
            max_model_len=min(max(needed, config.weights.probe_tokens + 1), window),
            eos_ids=tuple(ends),
            unknown_ids=tuple(policy.unknown_ids),
            medium=medium_of(config.weights.backend),
        ),
        scoring=ScoringSettings(
            reward=config.reward,
            model=config.model,
            temperature=config.rollout.temperature,
            logits_chunk=config.learner.logits_chunk,
            refers=config.has_reference,
            reads={name: model for name, (model, _) in models.items()},
        ),
        probe_ids=probe_sequence(prompts, min(config.weights.probe_tokens, window - 1)),
        warnings=[
            *risks(config),
            *not_as_asked(config, heldout=len(heldout), window=window),
            *settled,
            *(note for _, note in models.values() if note),
        ],
    )


def _check_settings(config: PPOConfig) -> None:
    """What settings alone tell."""
    check_medium(
        config.weights.backend,
        learner_gpus=config.learner.gpus_per_rank,
        sampler_gpus=config.rollout.gpus_per_actor,
        probe_tokens=config.weights.probe_tokens,
    )
    if config.reward.calibration_samples == 1:
        raise ConfigError("reward.calibration_samples = 1: one response has no spread; use 2 or more, or 0 for none")
    if config.reward.gold:
        load_gold(config.reward.gold)
    if config.reward.gold_credit:
        user_function(config.reward.gold_credit, field="reward.gold_credit")


def with_absolute_models(config: PPOConfig) -> PPOConfig:
    """Local folders of models as absolute paths, since Ray's workers run in another directory."""
    critic = config.critic.model_copy(update={"source": config.critic.source and absolute(config.critic.source)})
    return config.model_copy(update={"model": config.model.placed(absolute), "critic": critic})


def probe_sequence(prompts: list[np.ndarray], length: int) -> list[int]:
    """The first `length` tokens of all prompts, one after the other and over again: real ids, the same in every run."""
    ids = [int(token) for prompt in prompts[: max(1, length)] for token in prompt]
    return (ids * (length // len(ids) + 1))[:length]


def check_resources(config: PPOConfig, available: dict[str, float]) -> None:
    """Refuse what this machine can never place, instead of waiting for it without a word.

    Raises:
        ConfigError: it names what is asked for and what there is.
    """
    if missing := shortage(config, available):
        raise ConfigError(
            f"{missing}: lower cpus_per_actor, cpus_per_rank (gpus_per_actor, gpus_per_rank) or the counts"
        )


def check_memory(config: PPOConfig, machine: Cluster | None = None) -> None:
    """Refuse what a machine's memory, this one's if none is given, cannot hold even if the plan is `SURE` too high.

    Raises:
        ConfigError: it names what is needed, of what, and what there is.
    """
    machine = machine or cluster_of(nodes=1)
    plan = make_plan(config, machine, Links.of_gbit(node=100.0, storage=10.0))
    (node,) = plan.nodes
    needed = {
        "host memory": (node.on_host, machine.cpu_bytes),
        "a GPU": (max(node.on_gpu, default=0), machine.gpu_bytes),
    }
    for what, (planned, there) in needed.items():
        if planned * (1.0 - SURE) > there:
            raise ConfigError(
                f"the run needs about {planned / GIB:.1f} GiB of {what} and this machine has {there / GIB:.1f} GiB, "
                f"too little even if that is {SURE:.0%} too high: `r3hf plan` says for what, and what would have to "
                "change"
            )


def bundles(config: PPOConfig) -> list[dict[str, float]]:
    """What each process of the run asks of Ray."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    asked = [(rollout.cpus_per_actor, rollout.gpus_per_actor)] * rollout.actors
    asked += [(reward.cpus_per_actor, reward.gpus_per_actor)] * reward.actors
    asked += [(learner.cpus_per_rank, learner.gpus_per_rank)] * learner.ranks
    return [{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for cpus, gpus in asked]


def shortage(config: PPOConfig, available: dict[str, float]) -> str:
    """What the run asks for beyond what there is, as a sentence; empty where all of it is there."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    for kind in ("CPU", "GPU"):
        amount, there = sum(bundle.get(kind, 0.0) for bundle in bundles(config)), available.get(kind, 0.0)
        if amount > there + MARGIN:
            return (
                f"the run asks for {amount:g} {kind}s (rollout {rollout.actors} actors, reward {reward.actors} actors, "
                f"learner {learner.ranks} ranks) and the cluster has {there:g}"
            )
    return ""


def _check_reward_model(source: str) -> None:
    labels = read_config(source, "reward model").num_labels
    if labels != 1:
        raise ModelError(f"{source}: a reward model has one label, this has {labels}; train one with `r3hf reward`")
    require_score_head(source)


def _reward_model(
    name: str, source: str, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, rows: list[PromptRow]
) -> tuple[RewardModel, str]:
    """What a reward model reads, and what the user should know where that is not the policy's ids."""
    folder = ModelFolder(source, "reward model")
    own = folder.tokenizer
    setting = config.reward.pooling_suffix
    suffix = tuple(pooling_suffix(source, own, setting if name == MAIN or setting == "none" else "auto"))
    window = folder.window - len(suffix)
    translation = translation_of(rows, tokenizer, source, own, window=window)
    longest, growth, note = max(len(row.token_ids) for row in rows), 1.0, ""
    if translation is not None:
        fit = measure_fit(translation, rows, tokenizer, own)
        _check_fit(name, source, fit.loss, config)
        longest, growth, window = max(map(len, translation.prompts.values())), fit.growth, translation.max_tokens
        note = (
            f"{field_of(name)}: {source} reads the dialogues in its own tokenizer and chat template, and "
            f"{fit.loss:.1%} of the policy's tokens, in a sample of the prompts, have no score of their own"
        )
    needed = math.ceil(longest + growth * config.rollout.max_response_tokens)
    if needed > window:
        raise ConfigError(
            f"{field_of(name)}: {source} can read {window} tokens, and the longest prompt has {longest} of its tokens, "
            f"before about {growth:.2f} for each of rollout.max_response_tokens "
            f"({config.rollout.max_response_tokens}): lower that or data.max_prompt_tokens"
        )
    return RewardModel(suffix_ids=suffix, translation=translation, longest=needed), note


def _check_fit(name: str, source: str, loss: float, config: PPOConfig) -> None:
    reward = config.reward
    if "attention" in reward.facts.needs:
        raise ConfigError(
            f"{field_of(name)}: {source} has another tokenizer or chat template than the policy, and reward.mode = "
            f"{reward.mode} pays by attention to the policy's own tokens: use reward.mode = r3hf"
        )
    if reward.facts.reads_prefixes and loss > reward.max_alignment_loss:
        raise ConfigError(
            f"{field_of(name)}: {loss:.0%} of the policy's tokens, in a sample of the prompts, end inside a token of "
            f"{source} or in text that it cannot read, more than reward.max_alignment_loss "
            f"({reward.max_alignment_loss:g}): use a reward model with finer tokens, or reward.mode = terminal"
        )


def _check_reference(source: str, tokenizer: PreTrainedTokenizerBase, needed: int) -> None:
    """It reads the sampled ids as they are."""
    reference = ModelFolder(source, "reference")
    try:
        check_same_vocabulary(tokenizer, reference.tokenizer)
        reference.require_language_model()
    except ModelError as error:
        raise ConfigError(f"model.reference: {error}") from error
    if needed > reference.window:
        raise ConfigError(
            f"model.reference: {source} can read {reference.window} tokens, and the longest prompt with "
            f"rollout.max_response_tokens has {needed}: lower that or data.max_prompt_tokens, or leave model.reference "
            "out"
        )


def _settled(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PPOConfig, list[str]]:
    """The critic reads the policy's ids, so a reward model with other ones cannot be its start; and what follows."""
    source = config.critic.source or config.model.reward_model
    if not config.has_critic or config.critic_init == "sft" or knows_ids(load_tokenizer(source), tokenizer):
        return config, []
    if config.critic.init == "auto" and config.critic.source is None:
        start = (
            f"critic.init = auto: the critic starts from the policy (sft), whose tokens it reads; {source} has another "
            "tokenizer; set ppo.gae_lambda = 1 for long responses"
        )
        return config.model_copy(update={"critic": CriticSection(init="sft")}), [start]
    instead = "critic.init = sft" if config.critic.source is None else "critic.init = sft without critic.source"
    raise ConfigError(
        f"critic.init = {config.critic_init}: the critic reads the policy's tokens, and {source} has another "
        f"tokenizer: use {instead}"
    )


def _check_method(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a reward actor would find out only after it has loaded its models."""
    if config.reward.mode not in METHODS:
        user_function(config.reward.mode, field="reward.mode")
    if "span_ends" in config.reward.facts.needs and config.reward.segment_by == "sentence":
        sentence_end_ids(tokenizer)


def _check_window(window: int, rows: list[PromptRow], needed: int, config: PPOConfig) -> None:
    if needed > window:
        longest = max(rows, key=lambda row: len(row.token_ids))
        raise ConfigError(
            f"{config.data.source}: row {longest.row} has {len(longest.token_ids)} prompt tokens, which with "
            f"rollout.max_response_tokens ({config.rollout.max_response_tokens}) is more than the policy's window of "
            f"{window}: lower data.max_prompt_tokens to leave such rows out, or rollout.max_response_tokens"
        )
