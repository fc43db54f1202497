"""One type for each step of the way; the type says how far the data has come (layer 0: numpy only, no torch).

    Prompt --generate--> Trajectory --score--> ScoredTrajectory --collate--> Batch (algorithms/batching.py)

Index convention: index ``t`` is the action that emits token ``t``. Every per-token array has the length ``T`` of
prompt + response and is exactly 0 on the prompt. All arrays are numpy so that they are zero-copy in Ray's object store.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, Int32

MAIN = "reward"
"""Name of `model.reward_model` among the models that score a response."""
COST = "cost"
"""Name of `model.cost` among them."""


class Message(TypedDict):
    """One turn of a dialogue, as chat templates read it.

    Example: ``{"role": "user", "content": "Hi"}``
    """

    role: str
    content: str


class Finish(StrEnum):
    """Why a response ended. A failed generation is never a trajectory, so there is no third member."""

    EOS = "eos"
    """The policy sampled an end-of-sequence token; it is the last token of ``token_ids``."""
    LENGTH = "length"
    """The response reached the token limit; it is terminal too (value 0 afterwards, no bootstrap)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryInfo:
    """What the coordinator, evaluation and calibration know of a trajectory: ids, lengths and scores, never an array.

    Example, scored: ``TrajectoryInfo(prompt_id=130, sample=0, attempt=0, policy_version=4, prompt_len=12, length=40,
    finish=Finish.EOS, scores={"reward": 2.0, "cost": -1.0})``
    """

    prompt_id: int
    sample: int
    attempt: int
    policy_version: int
    prompt_len: int
    length: int
    """Prompt + response, in tokens."""
    finish: Finish
    scores: dict[str, float] = field(default_factory=dict)
    """R(x, y) of each reward model by name, the main one first; empty before scoring."""
    gold: float | None = None
    """An independent judge's score where one is configured (`reward.gold`); never trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sampled response.

    Example: prompt ``[5, 6]``, response ``[7, 2]`` (2 is EOS) ->
    ``token_ids=[5, 6, 7, 2], prompt_len=2, behavior_logprobs=[0, 0, -0.1, -1.3], finish=Finish.EOS``
    """

    prompt_id: int
    """Position in the run's prompt stream; it goes on over epochs, so it is unique in a run."""
    sample: int
    """Which of the prompt's samples this is, from 0."""
    attempt: int
    """How many times this prompt was dispatched before; never part of a seed."""
    policy_version: int
    """The weights version that sampled every token: 0 is the initial policy, k the policy after k steps."""
    prompt_len: int
    finish: Finish
    token_ids: Int32[np.ndarray, "T"]
    """Prompt and response, token ids exactly as sampled, EOS included."""
    behavior_logprobs: Float32[np.ndarray, "T"]
    """log mu(token_t | tokens_<t) at the sampling temperature, from vLLM when sampled; 0 on the prompt. [nats]"""

    @property
    def info(self) -> TrajectoryInfo:
        """Its ids and lengths."""
        return TrajectoryInfo(
            prompt_id=self.prompt_id,
            sample=self.sample,
            attempt=self.attempt,
            policy_version=self.policy_version,
            prompt_len=self.prompt_len,
            length=len(self.token_ids),
            finish=self.finish,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """What one reward model, or the cost model, says of a trajectory, raw: scale and centre belong to the learner.

    Example (r3hf, beta_c = 1): ``score=2.0, prompt_score=0.5, token_rewards=[0, 0, 0.4, 1.1]``,
    ``prefix_scores=[0, 0, 0.9, 2.0]``; the rewards sum to ``score - prompt_score``.
    """

    token_rewards: Float32[np.ndarray, "T"]
    """Its score redistributed by the run's method; a cost is positive where it is bad."""
    prefix_scores: Float32[np.ndarray, "T"]
    """R(x, y_<=t) on the response, 0 on the prompt; at the last token the pooled score R(x, y)."""
    score: float
    """R(x, y), the undistributed sequence reward at the model's own pooling position."""
    prompt_score: float
    """R(x, empty): the head at the last token of the rendered prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTrajectory:
    """A trajectory with what each model says of it; the sum over models belongs to the learner.

    Example: ``ScoredTrajectory(trajectory=..., ref_logprobs=[0, 0, -0.2, -1.1], by_model={"reward": ModelScores(...),
    "cost": ModelScores(...)})``
    """

    trajectory: Trajectory
    ref_logprobs: Float32[np.ndarray, "T"]
    """log pi_ref(token_t | tokens_<t) at the sampling temperature; 0 on the prompt. [nats]"""
    by_model: dict[str, ModelScores]
    """By name, the main model first, as `MAIN`; the cost model as `COST`."""
    alignment_loss: float = 0.0
    """Share of response tokens that a reward model with another tokenizer could not be aligned with; the largest over
    models."""

    @property
    def main(self) -> ModelScores:
        """What `model.reward_model` says."""
        return self.by_model[MAIN]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One sample that could not be made or scored. It is retried or quarantined and counted; it is never data."""

    prompt_id: int
    sample: int
    call: str
    """``generate`` or ``score``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """What the coordinator may know of a generated or scored group: ids, lengths, scores, failures; never an array."""

    infos: list[TrajectoryInfo]
    failures: list[Failure]
    seconds: float
    """Work since the report before this one: those of an actor sum to the time it worked."""
    number: int = -1
    """Of the generated `SampleGroup`."""
    broken: str = ""
    """What broke the engine while it held the group, whoever's fault it was; nothing of the group was made then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sample to generate: everything the sampler's result depends on, besides the weights.

    Example: ``Request(row=17, token_ids=[1, 9, 3], prompt_id=130, sample=0, seed=1093, attempt=0)``
    """

    row: int
    """Row of the prompt table, for people."""
    token_ids: np.ndarray
    """The rendered prompt, ``[P]`` int32."""
    prompt_id: int
    sample: int
    seed: int
    attempt: int = 0
    """Attempts that have failed; it never enters a seed."""

    @property
    def key(self) -> tuple[int, int]:
        """What it is known by in a run."""
        return self.prompt_id, self.sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGroup:
    """The unit of work: requests that go to one sampler, are handed on when all have ended, and are scored together.

    Example: ``SampleGroup(number=17, requests=[Request(...), Request(...)])``
    """

    number: int
    """Of this dispatch; the same requests have another one when they go again."""
    requests: list[Request]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the answer to imitate.

    Example: ``Example(prompt_ids=[1, 5, 9, 3], answer_ids=[7, 8, 2])`` with 2 the EOS token
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    """The token that ends it included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGroup:
    """Responses to one prompt and which of them beat which.

    Example: ``RankedGroup(prompt_tokens=1, sequences=[[5, 6, 7, 2], [5, 6, 2]], pairs=[(1, 0)])``: the second won.
    """

    prompt_tokens: int
    """Length of the prompt that every sequence starts with."""
    sequences: Sequence[Sequence[int]]
    """Token ids of prompt + response, up to the token the reward model pools at."""
    pairs: Sequence[tuple[int, int]]
    """(winner, loser), indices into `sequences`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the first preferred.

    Example: ``Pair(prompt_ids=[1, 5, 3], chosen_ids=[7, 8, 2], rejected_ids=[9, 2])`` with 2 the EOS token
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def as_group(self) -> RankedGroup:
        """The same preference as a ranked group of two."""
        sequences = [self.prompt_ids + self.chosen_ids, self.prompt_ids + self.rejected_ids]
        return RankedGroup(prompt_tokens=len(self.prompt_ids), sequences=sequences, pairs=[(0, 1)])
