"""Score sampled ids with frozen reward models and the frozen reference, in one process: no Ray."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from r3hf_ray.algorithms.batching import microbatches, pad_rows
from r3hf_ray.algorithms.redistribution import PrefixScores, RedistributionInputs, redistribute, settle_eos_jump
from r3hf_ray.errors import ConfigError
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.models.load import load_policy
from r3hf_ray.models.logprobs import CHUNK, token_logprobs, token_logprobs_and_entropy
from r3hf_ray.models.sharding import DTYPES
from r3hf_ray.scoring.method_inputs import bind_method, needs_entropy
from r3hf_ray.scoring.readers import Aligned, MakeReader, Reader, ReaderSettings, Reading, SameIds, Sampled
from r3hf_ray.scoring.translation import Translation, Translator
from r3hf_ray.sections.models import ModelSection, field_of
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.types import MAIN, Failure, Finish, ModelScores, ScoredTrajectory, Trajectory, TrajectoryInfo
from r3hf_ray.user_functions import user_function

Gold = Callable[[str, str], float]
"""An independent judge: (prompt text, response text), special tokens kept -> score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """What a reward model reads besides the sampled ids.

    Example: ``RewardModel(suffix_ids=(198,))``
    """

    suffix_ids: tuple[int, ...] = ()
    """Read behind EOS, before pooling."""
    translation: Translation | None = None
    """Where it reads other ids than the policy's."""
    longest: int | None = None
    """Longest prompt + response of a run in its tokens, estimated where it reads a translation. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """What scoring needs: two sections, and what was found out about the models."""

    reward: RewardSection
    model: ModelSection
    """Its reward models are scored by, each redistributed in the same way; the policy's tokenizer spells what was
    sampled."""
    temperature: float
    """Of sampling, and so of the reference's logprobs."""
    logits_chunk: int = CHUNK
    """As `learner.logits_chunk`, for the reference. [tokens]"""
    refers: bool = True
    """Whether anything uses the reference; where nothing does, it is not loaded."""
    reads: Mapping[str, RewardModel] = field(default_factory=dict)
    """What each reward model reads, by name; one that is not named reads the ids as they are."""

    @property
    def device(self) -> str:
        """Where the models are."""
        return "cuda" if self.reward.gpus_per_actor > 0 else "cpu"


class Scorer:
    """Reward models and a reference; `score` gives token rewards and reference logprobs for the same samples."""

    def __init__(self, settings: ScoringSettings, *, make_reader: MakeReader = SameIds) -> None:
        """Load the models; ``make_reader`` decides what runs the reward models."""
        self._settings, self._reward = settings, settings.reward
        reference, dtype = settings.model.reference or settings.model.policy, DTYPES[settings.reward.dtype]
        self._readers = {
            name: _reader(source, settings.reads.get(name, RewardModel()), settings, make_reader)
            for name, source in settings.model.reward_sources.items()
        }
        self._reference = None
        if settings.refers:
            self._reference = load_policy(reference, dtype, attention=settings.model.attention).to(settings.device)
        self._bind = bind_method(settings.reward, settings.model.policy)
        self._gold = load_gold(settings.reward.gold) if settings.reward.gold else None
        self._tokenizer = load_tokenizer(settings.model.policy) if settings.reward.gold else None

    @torch.no_grad()
    def score(self, trajectories: Sequence[Trajectory]) -> list[ScoredTrajectory | Failure]:
        """Score each trajectory, in order; one whose reward is not finite is a failure, never data."""
        results: dict[int, ScoredTrajectory | Failure] = {}
        lengths = [len(t.token_ids) for t in trajectories]
        for index in microbatches(lengths, budget_tokens=self._reward.microbatch_tokens):
            results |= zip(index, self._score([trajectories[i] for i in index]), strict=True)
        return [results[i] for i in range(len(trajectories))]

    def judge(self, scored: ScoredTrajectory) -> TrajectoryInfo:
        """The scalars of one scored trajectory, with the gold score where a judge is configured."""
        trajectory = scored.trajectory
        return replace(
            trajectory.info,
            scores={name: part.score for name, part in scored.by_model.items()},
            gold=self._gold_score(trajectory) if self._gold else None,
        )

    def _gold_score(self, trajectory: Trajectory) -> float:
        if self._gold is None or self._tokenizer is None:
            raise ConfigError("reward.gold is not configured")
        prompt, response = np.split(trajectory.token_ids, [trajectory.prompt_len])
        return float(self._gold(self._tokenizer.decode(prompt.tolist()), self._tokenizer.decode(response.tolist())))

    def _score(self, trajectories: Sequence[Trajectory]) -> Iterator[ScoredTrajectory | Failure]:
        """One microbatch: one forward of each reward model, one of the reference."""
        device = torch.device(self._settings.device)
        batch = Sampled.of(
            [t.token_ids for t in trajectories],
            [t.prompt_len for t in trajectories],
            [t.finish is Finish.EOS for t in trajectories],
            device=device,
        )
        readings = self._read(batch)
        behavior = pad_rows([t.behavior_logprobs for t in trajectories], fill=0.0).to(device)
        ref, entropy = self._refer(batch, behavior)
        inputs = RedistributionInputs(
            scores=readings[MAIN].scores,
            response_mask=batch.response_mask,
            token_ids=batch.token_ids,
            finished=batch.finished,
            behavior_logprobs=behavior,
            ref_logprobs=ref,
            by_model={name: reading.scores for name, reading in readings.items()},
        )
        rewards = {name: self._redistribute(reading, inputs, entropy).cpu() for name, reading in readings.items()}
        scores, ref = {name: _on_cpu(reading.scores) for name, reading in readings.items()}, ref.cpu()
        losses = torch.stack([reading.alignment_loss for reading in readings.values()]).amax(0).tolist()
        for row, trajectory in enumerate(trajectories):
            length = len(trajectory.token_ids)
            parts = {name: _model_scores(rewards[name][row, :length], scores[name], row) for name in readings}
            logprobs = ref[row, :length].numpy().copy()
            reason = _refusal(readings, row) or _not_finite(parts, logprobs, lender=self._reward.prefixes_from)
            if reason:
                yield Failure(prompt_id=trajectory.prompt_id, sample=trajectory.sample, call="score", reason=reason)
            else:
                yield ScoredTrajectory(
                    trajectory=trajectory, ref_logprobs=logprobs, by_model=parts, alignment_loss=losses[row]
                )

    def _read(self, batch: Sampled) -> dict[str, Reading]:
        """Each model's reading, the main one's with the prefixes that carry its reward."""
        readings = {name: reader.read(batch) for name, reader in self._readers.items()}
        if self._reward.prefixes_from is not None:
            main, other = readings[MAIN], readings[self._reward.prefixes_from]
            readings[MAIN] = replace(main, scores=main.scores.carried_by(other.scores, batch.response_mask))
        return readings

    def _redistribute(self, reading: Reading, inputs: RedistributionInputs, entropy: Tensor | None) -> Tensor:
        reward = self._reward
        return redistribute(
            settle_eos_jump(reading.scores, inputs.response_mask, inputs.finished, rule=reward.eos_jump),
            inputs.response_mask,
            mode=reward.mode,
            beta_c=reward.method_weight,
            subtract_prompt_score=reward.subtract_prompt_score,
            method=self._bind(inputs, reading.attention, entropy),
        )

    def _refer(self, batch: Sampled, behavior: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logprobs and, where it is asked for, entropy; without a reference, what the samples came with."""
        if self._reference is None:
            return behavior, None
        temperature, chunk = self._settings.temperature, self._settings.logits_chunk
        if needs_entropy(self._reward):
            return token_logprobs_and_entropy(self._reference, *batch.arrays, temperature=temperature, chunk=chunk)
        return token_logprobs(self._reference, *batch.arrays, temperature=temperature, chunk=chunk), None


def load_gold(name: str) -> Gold:
    """The function `package.module:function`.

    Raises:
        ConfigError: there is no such module or function.
    """
    return user_function(name, field="reward.gold")


def _reader(source: str, model: RewardModel, settings: ScoringSettings, make_reader: MakeReader) -> Reader:
    """A reader of what ``model`` reads; where that is a translation, the end of an answer comes from it too."""
    translation, facts = model.translation, settings.reward.facts
    behind = (*(translation.end_ids if translation else ()), *model.suffix_ids)
    reader = make_reader(
        ReaderSettings(
            source=source,
            suffix_ids=behind,
            attention=settings.model.attention,
            maps="attention" in facts.needs,
            prefixes=facts.reads_prefixes,
            dtype=DTYPES[settings.reward.dtype],
            device=settings.device,
            longest=None if model.longest is None else model.longest + len(behind),
        )
    )
    if translation is None:
        return reader
    return Aligned(reader, Translator(translation, load_tokenizer(settings.model.policy), load_tokenizer(source)))


def _on_cpu(scores: PrefixScores) -> PrefixScores:
    return PrefixScores(prefix=scores.prefix.cpu(), prompt=scores.prompt.cpu(), pooled=scores.pooled.cpu())


def _model_scores(rewards: Tensor, scores: PrefixScores, row: int) -> ModelScores:
    score, prefix = float(scores.pooled[row]), scores.prefix[row, : len(rewards)].clone()
    prefix[-1] = score
    return ModelScores(
        token_rewards=rewards.numpy().copy(),
        prefix_scores=prefix.numpy(),
        score=score,
        prompt_score=float(scores.prompt[row]),
    )


def _refusal(readings: Mapping[str, Reading], row: int) -> str:
    reasons = [
        f"{field_of(name)}: {reading.refused[row]}" for name, reading in readings.items() if row in reading.refused
    ]
    return "; ".join(reasons)


def _not_finite(parts: Mapping[str, ModelScores], ref_logprobs: np.ndarray, *, lender: str | None) -> str:
    """Which number is not finite, as a sentence; empty where all are.

    The ``lender`` of prefix scores is looked at first, since its numbers are in the main model's rewards too.
    """
    what = [
        f"{field_of(name)} gives a score (R(x, y) {part.score:g})"
        for name, part in sorted(parts.items(), key=lambda item: item[0] != lender)
        if not (math.isfinite(part.score) and np.isfinite(part.token_rewards).all())
    ]
    what += [] if np.isfinite(ref_logprobs).all() else ["the reference gives a logprob"]
    return f"{what[0]} that is not finite: check its weights, or load it in another dtype" if what else ""
