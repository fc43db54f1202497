"""Answers under a reward model: the score of every prefix, then what each redistribution method pays each token.

A reward model is free up to a constant and a factor, so credit is compared after both are gone: scores are taken minus
their mean and divided by their standard deviation over the answers at hand. Every token reward here is in that unit.
"""

from collections.abc import Iterator, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from r3hf_ray.algorithms.batching import microbatches, pad_rows
from r3hf_ray.algorithms.redistribution import PrefixScores, every_method, r3hf, telescoping_error
from r3hf_ray.algorithms.spans import sentence_ends
from r3hf_ray.errors import ModelError
from r3hf_ray.instruments.pages.coloured_answers import AnswerText
from r3hf_ray.models.chat import Chat, pooling_suffix
from r3hf_ray.models.folder import ModelFolder, check_same_vocabulary, load_tokenizer
from r3hf_ray.models.load import load_policy, score_head
from r3hf_ray.models.logprobs import token_logprobs
from r3hf_ray.scoring.method_inputs import sentence_end_ids
from r3hf_ray.scoring.readers import ReaderSettings, SameIds, Sampled

MICROBATCH_TOKENS = 4096
"""Padded tokens of one forward. [tokens]"""
ATTENTION_TOKENS = 1024
"""The same where attention maps are kept: their size grows with the square of a row's length. [tokens]"""
QUIET = Console(quiet=True)
Credit = list[np.ndarray]
"""One float64 array ``[T]`` for each answer: what each of its tokens is paid."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A rendered prompt and a response to it, as token ids.

    Example: ``Answer(prompt_ids=[1, 4, 12, 15, 3], response_ids=[8, 17, 47, 2])``
    """

    prompt_ids: list[int]
    response_ids: list[int]
    """The end token included; without it the response was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one forward pass of a reward model says about an answer, in its own units.

    Example: ``Scored(answer=..., prompt_score=0.5, prefix=np.array([0.9, 1.7]), score=2.0, finished=True)``
    """

    answer: Answer
    prompt_score: float
    """R(x, empty)."""
    prefix: Float64[np.ndarray, "T"]
    """R(x, y_<=t) after each token of the response."""
    score: float
    """R(x, y) at the model's own pooling position, which may lie behind the last token."""
    finished: bool
    """Ended with an end token, so that the pooling suffix was read."""
    attention: Float64[np.ndarray, "T"] | None = None
    """What the last token pays to each token, where the judge reads attention; see `prefix_scores`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A reward model that can be asked about prefixes, and all that is needed to ask."""

    source: str
    reader: SameIds
    """In float32. Where it reads attention, so that `abc` can be judged, it is slower, and keeps a map of layers x
    heads x T^2 a row."""
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    ends: frozenset[int]
    window: int
    """Longest prompt + response it can read, room for the suffix left. [tokens]"""


def load_judge(source: str, *, attention: bool = False) -> Judge:
    """Load a reward model in float32, on the GPU where there is one; with ``attention``, able to show its maps.

    Raises:
        ModelError: no decoder-only reward model with one linear head, or it looks ahead.
    """
    folder = ModelFolder(source, "reward model")
    suffix = tuple(pooling_suffix(source, folder.tokenizer, "auto"))
    settings = ReaderSettings(
        source=source, suffix_ids=suffix, maps=attention, dtype=torch.float32, device=str(_device())
    )
    return Judge(
        source=source,
        reader=SameIds(settings),
        tokenizer=folder.tokenizer,
        chat=folder.chat,
        ends=frozenset(folder.end_ids),
        window=folder.window - len(suffix),
    )


def untrained(judge: Judge, *, seed: int) -> Judge:
    """The judge with fresh weights everywhere, trunk and head: a control that was taught neither language nor taste.

    It reads no attention, and is as large as the judge beside which it stands in memory.
    """
    config = deepcopy(judge.reader.model.config)  # from_config writes into it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=config._attn_implementation
        )
        head = score_head(model)
        nn.init.normal_(head.weight, std=head.in_features**-0.5)  # a fresh running-sum head is 0
    return replace(judge, reader=SameIds(replace(judge.reader.settings, maps=False), model.eval()))


@torch.inference_mode()
def score_answers(judge: Judge, answers: Sequence[Answer], *, console: Console = QUIET) -> list[Scored]:
    """Score each answer (prompt and response not empty, together within `judge.window`), in order.

    Raises:
        ModelError: a score is not finite.
    """
    found: dict[int, Scored] = {}
    budget = ATTENTION_TOKENS if judge.reader.settings.attention else MICROBATCH_TOKENS
    for index, batch in _batches(answers, judge.ends, budget, "scoring", console):
        reading = judge.reader.read(batch)
        given, maps = reading.scores, reading.attention
        for row, i in enumerate(index):
            inside = batch.response_mask[row]
            found[i] = Scored(
                answer=answers[i],
                prompt_score=float(given.prompt[row]),
                prefix=given.prefix[row][inside].double().cpu().numpy(),
                score=float(given.pooled[row]),
                finished=bool(batch.finished[row]),
                attention=None if maps is None else maps[row][inside].double().cpu().numpy(),
            )
    if not all(np.isfinite([s.score, s.prompt_score, *s.prefix]).all() for s in found.values()):
        raise ModelError(f"{judge.source}: gives scores that are not finite; its weights are damaged")
    return [found[i] for i in range(len(answers))]


@torch.inference_mode()
def reference_logprobs(judge: Judge, policy: str, answers: Sequence[Answer], *, console: Console = QUIET) -> Credit:
    """``log pi(y_t | x, y_<t)`` of a policy with the reward model's vocabulary, for each token of each answer. [nats]

    Raises:
        ModelError: the policy cannot be loaded, or its vocabulary is another one.
    """
    check_same_vocabulary(load_tokenizer(policy), judge.tokenizer)
    model = load_policy(policy, torch.float32).to(_device())
    found: dict[int, np.ndarray] = {}
    for index, batch in _batches(answers, judge.ends, MICROBATCH_TOKENS, "reference", console):
        given = token_logprobs(model, *batch.arrays, temperature=1.0)
        for row, i in enumerate(index):
            found[i] = given[row][batch.response_mask[row]].double().cpu().numpy()
    return [found[i] for i in range(len(answers))]


@dataclass(frozen=True, slots=True)
class ScoreUnit:
    """Zero and unit of all credit.

    Example: under ``ScoreUnit(mean=1.0, std=2.0)`` a score of 4 is 1.5 standard deviations above the mean.
    """

    mean: float
    std: float

    def of(self, score: float) -> float:
        """A score in standard deviations about the mean."""
        return (score - self.mean) / self.std


def unit_of(scored: Sequence[Scored]) -> ScoreUnit:
    """Mean and standard deviation of the scores.

    Raises:
        ModelError: all scores are the same, so the model tells nothing apart.
    """
    scores = np.array([s.score for s in scored])
    if not scores.std() > 0.0:
        raise ModelError(f"the reward model gives all {len(scores)} answers the same score {scores[0]:g}")
    return ScoreUnit(float(scores.mean()), float(scores.std()))


def standardised(scored: Sequence[Scored], unit: ScoreUnit) -> tuple[PrefixScores, Tensor]:
    """All prefix scores as ``(score - mean) / std``, padded, with the mask of the responses; float64."""
    mask = torch.arange(max(len(s.prefix) for s in scored)) < torch.tensor([len(s.prefix) for s in scored])[:, None]
    prefix = (pad_rows([s.prefix for s in scored], fill=0.0) - unit.mean) / unit.std
    prompt = torch.tensor([unit.of(s.prompt_score) for s in scored], dtype=torch.float64)
    pooled = torch.tensor([unit.of(s.score) for s in scored], dtype=torch.float64)
    return PrefixScores(prefix=prefix.masked_fill(~mask, 0.0), prompt=prompt, pooled=pooled), mask


def credit_by_method(judge: Judge, scored: Sequence[Scored], unit: ScoreUnit) -> dict[str, Credit]:
    """What every method in `METHODS` pays each token, in standard deviations of the score; `segment` by sentence.

    A method that reads what is not at hand is left out: `abc` without attention, `segment` where no token of the
    tokenizer ends a sentence.
    """
    scores, mask = standardised(scored, unit)
    paid = every_method(scores, mask, **_attention(scored), **_span_ends(judge, scored, mask))
    return {mode: unpadded(rewards, mask) for mode, rewards in paid.items()}


def r3hf_credit(scored: Sequence[Scored], unit: ScoreUnit) -> Credit:
    """What `r3hf` pays each token, in standard deviations of the score."""
    scores, mask = standardised(scored, unit)
    return unpadded(r3hf(scores, mask), mask)


def _attention(scored: Sequence[Scored]) -> dict[str, Tensor]:
    rows = [s.attention for s in scored if s.attention is not None]
    return {"attention": pad_rows(rows, fill=0.0)} if len(rows) == len(scored) else {}


def _span_ends(judge: Judge, scored: Sequence[Scored], mask: Tensor) -> dict[str, Tensor]:
    try:
        ends = sentence_end_ids(judge.tokenizer)
    except ModelError:
        return {}
    ids = pad_rows([np.array(s.answer.response_ids) for s in scored], fill=0).long()
    return {"span_ends": sentence_ends(ids, mask, end_ids=torch.tensor(ends))}


def largest_telescoping_error(scored: Sequence[Scored], unit: ScoreUnit) -> float:
    """Largest relative gap between a response's `r3hf` rewards and R(x, y) - R(x, empty); about 1e-7 is rounding."""
    scores, mask = standardised(scored, unit)
    gap = telescoping_error(r3hf(scores, mask), scores, mask, mode="r3hf", beta_c=1.0, subtract_prompt_score=True)
    return float(gap.max())


def unpadded(values: Tensor, mask: Tensor) -> Credit:
    """The masked part of each row, as float64 arrays."""
    return [row[inside].double().numpy() for row, inside in zip(values, mask, strict=True)]


def scored_text(scored: Scored, tokenizer: PreTrainedTokenizerBase, unit: ScoreUnit, **more: Any) -> AnswerText:
    """The tokens of an answer and its curve of prefix scores, for a page; ``more`` are further fields."""
    ids, after = scored.answer.response_ids, [*scored.prefix[:-1], scored.score]
    texts = [str(tokenizer.decode([token])) for token in ids]
    curve = [unit.of(score) for score in after]
    return AnswerText(text=texts, id=ids, curve=curve, start=unit.of(scored.prompt_score), **more)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(
    answers: Sequence[Answer], ends: Set[int], budget: int, what: str, console: Console
) -> Iterator[tuple[list[int], Sampled]]:
    """Which answers, and they as one padded microbatch."""
    lengths = [len(answer.prompt_ids) + len(answer.response_ids) for answer in answers]
    groups = microbatches(lengths, budget_tokens=budget)
    for index in track(groups, description=what, console=console, transient=True, disable=not console.is_terminal):
        rows = [answers[i] for i in index]
        yield (
            index,
            Sampled.of(
                [np.array(row.prompt_ids + row.response_ids) for row in rows],
                [len(row.prompt_ids) for row in rows],
                [row.response_ids[-1] in ends for row in rows],
                device=_device(),
            ),
        )
