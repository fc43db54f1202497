"""Score sampled ids with the frozen reward model and the frozen reference, in one process: no Ray, no re-tokenising."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r3hf_ray.algorithms.batching import microbatches, pad_rows
from r3hf_ray.algorithms.redistribution import PrefixScores, redistribute
from r3hf_ray.config import ConfigError
from r3hf_ray.models.load import load_policy, load_reward_model, load_tokenizer, require_causal
from r3hf_ray.models.logprobs import token_logprobs
from r3hf_ray.models.prefix_scores import prefix_scores
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
    subtract_prompt_score: bool = True
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
        self._reward_model = load_reward_model(settings.reward_model, dtype).to(settings.device)
        self._reference = load_policy(settings.reference, dtype).to(settings.device)
        if settings.mode != "terminal":
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
        scores = prefix_scores(
            self._reward_model,
            ids,
            attention_mask,
            response_mask,
            suffix_ids=list(settings.suffix_ids),
            finished=finished,
        )
        rewards = redistribute(
            scores,
            response_mask,
            mode=settings.mode,
            beta_c=settings.beta_c,
            subtract_prompt_score=settings.subtract_prompt_score,
        )
        ref = token_logprobs(self._reference, ids, attention_mask, response_mask, temperature=settings.temperature)
        scores_cpu = PrefixScores(prefix=scores.prefix.cpu(), prompt=scores.prompt.cpu(), pooled=scores.pooled.cpu())
        rewards, ref = rewards.cpu(), ref.cpu()
        for row, trajectory in enumerate(trajectories):
            yield _scored(trajectory, row, rewards, ref, scores_cpu)


def load_gold(name: str) -> Gold:
    """The function `package.module:function`.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        return vars(importlib.import_module(module))[function]  # type: ignore[no-any-return]
    except (ImportError, KeyError, ValueError) as error:
        raise ConfigError(
            f"reward.gold: {name!r} names no function ({error}); write package.module:function"
        ) from error


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
    if not (math.isfinite(score) and bool(torch.isfinite(rewards[row]).all()) and bool(torch.isfinite(ref[row]).all())):
        reason = f"the reward model or the reference gives a number that is not finite (score {score})"
        return Failure(prompt_id=trajectory.prompt_id, sample=trajectory.sample, stage="score", reason=reason)
    return ScoredTrajectory(
        trajectory=trajectory,
        token_rewards=rewards[row, :length].numpy().copy(),
        prefix_scores=prefix.numpy(),
        ref_logprobs=ref[row, :length].numpy().copy(),
        score=score,
        prompt_score=prompt_score,
    )
