"""Score sampled ids with the frozen reward model and the frozen reference, in one process: no Ray, no re-tokenising."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r3hf_ray.algorithms.batching import microbatches, pad_rows
from r3hf_ray.algorithms.redistribution import PrefixScores, redistribute, settle_eos_jump
from r3hf_ray.config import WITHOUT_PREFIXES, ConfigError
from r3hf_ray.models.load import load_policy, load_reward_model, load_tokenizer, require_causal
from r3hf_ray.models.logprobs import token_logprobs, token_logprobs_and_entropy
from r3hf_ray.models.method_inputs import Evidence, method_of
from r3hf_ray.models.prefix_scores import prefix_scores, prefix_scores_and_attention
from r3hf_ray.models.user_functions import user_function
from r3hf_ray.types import Failure, Finish, ScoredTrajectory, ScoreInfo, Trajectory

Gold = Callable[[str, str], float]
"""An independent judge: (prompt text, response text), special tokens kept -> score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """What scoring needs; plain values, so that a scorer can be made without a run."""

    reward_model: str
    reference: str
    temperature: float
    mode: str = "r3hf"
    beta_c: float = 1.0
    """Share of the reward that the method redistributes (`RewardSection.method_weight`)."""
    subtract_prompt_score: bool = True
    eos_jump: str = "keep"
    segment_by: str = "sentence"
    segment_ngram: int = 5
    segment_entropy: float = 1.75
    suffix_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    microbatch_tokens: int = 8192
    gold: str | None = None
    device: str = "cpu"


class Scorer:
    """A reward model and a reference; `score` gives token rewards and reference logprobs for the same ids."""

    def __init__(self, settings: ScoringSettings) -> None:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        self._settings = settings
        attention = "eager" if settings.mode == "abc" else "sdpa"
        self._reward_model = load_reward_model(settings.reward_model, dtype, attention=attention).to(settings.device)
        self._reference = load_policy(settings.reference, dtype).to(settings.device)
        self._method_of = method_of(
            settings.mode,
            segment_by=settings.segment_by,
            segment_ngram=settings.segment_ngram,
            segment_entropy=settings.segment_entropy,
            tokenizer=settings.reference,
        )
        self._needs_entropy = settings.mode == "segment" and settings.segment_by == "entropy"
        if settings.mode not in WITHOUT_PREFIXES:
            require_causal(self._reward_model, self._reference.get_input_embeddings().num_embeddings)
        self._gold = load_gold(settings.gold) if settings.gold else None
        self._tokenizer = load_tokenizer(settings.reference) if settings.gold else None

    @torch.no_grad()
    def score(self, trajectories: Sequence[Trajectory]) -> list[ScoredTrajectory | Failure]:
        """Score each trajectory, in order; one whose reward is not finite is a failure, never data."""
        results: dict[int, ScoredTrajectory | Failure] = {}
        lengths = [len(t.token_ids) for t in trajectories]
        for index in microbatches(lengths, budget_tokens=self._settings.microbatch_tokens):
            results |= zip(index, self._score([trajectories[i] for i in index]), strict=True)
        return [results[i] for i in range(len(trajectories))]

    def judge(self, scored: ScoredTrajectory) -> ScoreInfo:
        """The scalars of one scored trajectory, with the gold score where a judge is configured."""
        trajectory = scored.trajectory
        return ScoreInfo(
            info=trajectory.info,
            score=scored.score,
            prompt_score=scored.prompt_score,
            gold=self._gold_score(trajectory) if self._gold else None,
        )

    def _gold_score(self, trajectory: Trajectory) -> float:
        if self._gold is None or self._tokenizer is None:
            raise ConfigError("reward.gold is not configured")
        prompt, response = np.split(trajectory.token_ids, [trajectory.prompt_len])
        return float(self._gold(self._tokenizer.decode(prompt.tolist()), self._tokenizer.decode(response.tolist())))

    def _score(self, trajectories: Sequence[Trajectory]) -> Iterator[ScoredTrajectory | Failure]:
        """One microbatch: one forward of the reward model, one of the reference."""
        settings = self._settings
        ids, attention_mask, response_mask, finished = (x.to(settings.device) for x in _pad(trajectories))
        arrays = (ids, attention_mask, response_mask)
        scores, attention = self._read(arrays, finished)
        ref, entropy = self._refer(arrays)
        evidence = Evidence(
            token_ids=ids,
            response_mask=response_mask,
            finished=finished,
            behavior_logprobs=pad_rows([t.behavior_logprobs for t in trajectories], fill=0.0).to(settings.device),
            ref_logprobs=ref,
            ref_entropy=entropy,
            attention=attention,
        )
        rewards = redistribute(
            settle_eos_jump(scores, response_mask, finished, rule=settings.eos_jump),
            response_mask,
            mode=settings.mode,
            beta_c=settings.beta_c,
            subtract_prompt_score=settings.subtract_prompt_score,
            method=self._method_of(evidence),
        )
        scores_cpu = PrefixScores(prefix=scores.prefix.cpu(), prompt=scores.prompt.cpu(), pooled=scores.pooled.cpu())
        rewards, ref = rewards.cpu(), ref.cpu()
        for row, trajectory in enumerate(trajectories):
            yield _scored(trajectory, row, rewards, ref, scores_cpu)

    def _read(self, arrays: tuple[Tensor, Tensor, Tensor], finished: Tensor) -> tuple[PrefixScores, Tensor | None]:
        suffix_ids = list(self._settings.suffix_ids)
        if self._settings.mode == "abc":
            return prefix_scores_and_attention(self._reward_model, *arrays, suffix_ids=suffix_ids, finished=finished)
        return prefix_scores(self._reward_model, *arrays, suffix_ids=suffix_ids, finished=finished), None

    def _refer(self, arrays: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        temperature = self._settings.temperature
        if self._needs_entropy:
            return token_logprobs_and_entropy(self._reference, *arrays, temperature=temperature)
        return token_logprobs(self._reference, *arrays, temperature=temperature), None


def load_gold(name: str) -> Gold:
    """The function `package.module:function`.

    Raises:
        ConfigError: there is no such module or function.
    """
    return user_function(name, field="reward.gold")


def _pad(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = torch.tensor([len(t.token_ids) for t in trajectories])
    prompts = torch.tensor([t.prompt_len for t in trajectories])
    ids = pad_rows([t.token_ids for t in trajectories], fill=0).long()
    position = torch.arange(ids.shape[1])
    attention_mask = position < lengths[:, None]
    response_mask = attention_mask & (position >= prompts[:, None])
    return ids, attention_mask, response_mask, torch.tensor([t.finish is Finish.EOS for t in trajectories])


def _scored(
    trajectory: Trajectory, row: int, rewards: Tensor, ref: Tensor, scores: PrefixScores
) -> ScoredTrajectory | Failure:
    length = len(trajectory.token_ids)
    score, prompt_score = float(scores.pooled[row]), float(scores.prompt[row])
    prefix = scores.prefix[row, :length].clone()
    prefix[-1] = score
    rewarded = math.isfinite(score) and bool(torch.isfinite(rewards[row]).all())
    if not rewarded or not bool(torch.isfinite(ref[row]).all()):
        what = "the reference gives a logprob" if rewarded else f"model.reward_model gives a score (R(x, y) {score:g})"
        reason = f"{what} that is not finite: check its weights, or load it in another dtype"
        return Failure(prompt_id=trajectory.prompt_id, sample=trajectory.sample, stage="score", reason=reason)
    return ScoredTrajectory(
        trajectory=trajectory,
        token_rewards=rewards[row, :length].numpy().copy(),
        prefix_scores=prefix.numpy(),
        ref_logprobs=ref[row, :length].numpy().copy(),
        score=score,
        prompt_score=prompt_score,
    )
