"""Credit of each method against the toy language's known credit, and the first advantages, without any training.

Areas under the curve are taken within each response and averaged over responses: pooled over responses, a method that
pays every token of a good answer alike would look as if it knew where the good tokens are.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Integer

from r3hf_ray.algorithms.advantages import gae
from r3hf_ray.algorithms.batching import pad_rows
from r3hf_ray.algorithms.credit import auc, pearson, phrase_sums
from r3hf_ray.algorithms.masking import previous_token
from r3hf_ray.algorithms.redistribution import r3hf, terminal, uniform
from r3hf_ray.draws import seed_of
from r3hf_ray.errors import ModelError
from r3hf_ray.instruments.pages.intervals import Estimate, mean_interval
from r3hf_ray.instruments.scored_answers import (
    Answer,
    Credit,
    Judge,
    Scored,
    ScoreUnit,
    load_judge,
    r3hf_credit,
    score_answers,
    standardised,
    unit_of,
    unpadded,
)
from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import VOCABULARY, ToyRequest, gold_credit, make_request, phrase_ids
from r3hf_ray.instruments.toy.sampling import render_prompt, sample_responses
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.models.load import load_policy

CONTROLS = ("random", "position", "oracle")
LAMBDAS = (0.95, 1.0)
R3HF_BAR = 0.60
CHANCE_WIDTH = 0.03
ADVANTAGE_BAR = 0.05
ENOUGH_RESPONSES = 200
"""With fewer judged responses, a method that knows nothing is often off 0.5 by more than `CHANCE_WIDTH`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyResponse:
    """A response whose every token has a known credit."""

    request: ToyRequest
    answer: Answer
    gold: Float64[np.ndarray, "T"]
    phrases: Integer[np.ndarray, "T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well credit agrees with the known credit; 0.5 is chance for areas, 0 for correlations."""

    auc: Estimate
    """What helped against what hurt, within a response."""
    pearson: Estimate
    auc_pooled: float
    """Over all responses: a method that pays all of a good response alike looks as if it knew where the good is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyMeasures:
    """One method's credit against the known credit."""

    method: str
    control: bool
    phrase: Agreement
    """By phrase: the one to judge by, since credit often lands a token early or late."""
    token: Agreement


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a sound method and a sound reward model must reach."""

    holds: bool | None
    """None: too few responses to judge."""
    sentence: str

    @property
    def label(self) -> str:
        """In a word or two."""
        return "not judged" if self.holds is None else "met" if self.holds else "missed"


def toy_responses(
    judge: Judge, policy: str | None, *, count: int, max_response_tokens: int, seed: int
) -> list[ToyResponse]:
    """Responses to fresh requests: sampled from a policy, or written by the language's mediocre author without one.

    Raises:
        ModelError: the reward model or the policy does not speak the toy language.
    """
    _require_toy(judge.source, judge.tokenizer.get_vocab())
    rng = random.Random(seed_of(seed, "credit benchmark"))
    requests = [make_request(rng) for _ in range(count)]
    if policy is None:
        texts = [noisy_response(request, max_response_tokens, rng) for request in requests]
        rows = [judge.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        tokenizer = load_tokenizer(policy)
        _require_toy(policy, tokenizer.get_vocab())
        rows = sample_responses(
            load_policy(policy, torch.float32),
            tokenizer,
            requests,
            max_response_tokens=max_response_tokens,
            seed=seed_of(seed, "credit samples"),
        )
        texts = tokenizer.batch_decode(rows)
    return [
        ToyResponse(
            request=request,
            answer=Answer(render_prompt(judge.tokenizer, request), ids),
            gold=np.array(gold_credit(request.text, text, max_response_tokens=max_response_tokens)),
            phrases=np.array(phrase_ids(text)),
        )
        for request, ids, text in zip(requests, rows, texts, strict=True)
    ]


def with_toy_controls(paid: Mapping[str, Credit], responses: Sequence[ToyResponse], *, seed: int) -> dict[str, Credit]:
    """The methods' credit and the controls: noise, the place in the response, and the known credit itself."""
    rng = np.random.default_rng(seed)
    lengths = [len(response.gold) for response in responses]
    return {
        **paid,
        "random": [rng.standard_normal(length) for length in lengths],
        "position": [np.arange(1, length + 1) / length for length in lengths],
        "oracle": [response.gold for response in responses],
    }


def measure_on_toy(paid: Mapping[str, Credit], responses: Sequence[ToyResponse]) -> list[ToyMeasures]:
    """The measures of every method (see `with_toy_controls`)."""
    phrases = [response.phrases for response in responses]
    gold = [response.gold for response in responses]
    return [
        ToyMeasures(
            method=method,
            control=method in CONTROLS,
            phrase=_agreement(_by_phrase(credit, phrases), _by_phrase(gold, phrases)),
            token=_agreement(credit, gold),
        )
        for method, credit in paid.items()
    ]


def _by_phrase(credit: Credit, phrases: Sequence[np.ndarray]) -> Credit:
    return [phrase_sums(one, ids) for one, ids in zip(credit, phrases, strict=True)]


def _agreement(credit: Credit, gold: Credit) -> Agreement:
    pairs = list(zip(credit, gold, strict=True))
    return Agreement(
        auc=mean_interval([_auc(*pair) for pair in pairs]),
        pearson=mean_interval([pearson(*pair) for pair in pairs]),
        auc_pooled=_auc(np.concatenate(credit), np.concatenate(gold)),
    )


def reward_model_agreement(reward_model: str, policy: str, *, count: int, seed: int) -> ToyMeasures:
    """How well `r3hf` under a reward model pays a policy's samples, against the known credit."""
    judge = load_judge(reward_model)
    responses = toy_responses(judge, policy, count=count, max_response_tokens=48, seed=seed)
    scored = score_answers(judge, [response.answer for response in responses])
    unit = unit_of(scored)
    return measure_on_toy({"r3hf": r3hf_credit(scored, unit)}, responses)[0]


def first_advantages(
    scored: Sequence[Scored], responses: Sequence[ToyResponse], unit: ScoreUnit
) -> dict[str, dict[float, float]]:
    """Area under the curve of the very first advantages, tokens that helped against tokens that hurt, by lambda.

    Pooled over responses, as PPO whitens them. ``V = RM`` is a critic loaded from the reward model with its head.
    Sparse reward with it and `r3hf` with a zero critic are equal: redistribution is potential-based (Wiewiora, 2003).
    """
    scores, mask = standardised(scored, unit)
    gold, zero = pad_rows([response.gold for response in responses], fill=0.0), torch.zeros_like(scores.prefix)
    previous = previous_token(mask)
    before = torch.where(previous >= 0, scores.prefix.gather(1, previous.clamp(min=0)), scores.prompt[:, None])
    values = before.masked_fill(~mask, 0.0)  # R(x, y_<t)
    sparse, dense, flat = terminal(scores, mask), r3hf(scores, mask), uniform(scores, mask)
    arms = {
        "terminal, V = 0": (sparse, zero),
        "terminal, V = RM": (sparse, values),
        "r3hf, V = 0": (dense, zero),
        "r3hf, V = RM (counted twice)": (dense, values),
        "uniform, V = 0": (flat, zero),
        "oracle, V = 0": (gold, zero),
    }
    known = np.concatenate(unpadded(gold, mask))
    found: dict[str, dict[float, float]] = {}
    for arm, (rewards, value) in arms.items():
        advantages = {lam: gae(rewards, value, mask, gamma=1.0, lam=lam)[0] for lam in LAMBDAS}
        found[arm] = {lam: _auc(np.concatenate(unpadded(a, mask)), known) for lam, a in advantages.items()}
    return found


def requirements(rows: Sequence[ToyMeasures], advantages: Mapping[str, Mapping[float, float]]) -> list[Requirement]:
    """The bars of the benchmark, held against the measured values themselves.

    None is judged below `ENOUGH_RESPONSES` responses that have both phrases that helped and phrases that hurt.
    """
    by_name = {row.method: row.phrase.auc for row in rows}
    r3hf, oracle = by_name["r3hf"], by_name["oracle"]
    dense, sparse = (advantages[arm][LAMBDAS[0]] for arm in ("r3hf, V = 0", "terminal, V = 0"))
    bars = [
        Requirement(r3hf.value >= R3HF_BAR, f"phrase AUC of r3hf is {r3hf}, at least {R3HF_BAR:.2f} wanted"),
        Requirement(oracle.value == 1.0, f"phrase AUC of the oracle is {oracle.value:.3f}, exactly 1 wanted"),
        *(
            Requirement(
                abs(by_name[method].value - 0.5) <= CHANCE_WIDTH,
                f"phrase AUC of {method} is {by_name[method].value:.3f}, 0.50 ± {CHANCE_WIDTH:.2f} wanted",
            )
            for method in ("uniform", "terminal")
        ),
        Requirement(
            dense >= sparse + ADVANTAGE_BAR,
            f"first-advantage AUC at lambda {LAMBDAS[0]:g} is {dense:.3f} for r3hf and {sparse:.3f} for terminal with "
            f"a cold critic, {ADVANTAGE_BAR:.2f} more wanted",
        ),
    ]
    if r3hf.count >= ENOUGH_RESPONSES:
        return bars
    few = f"too few responses: {r3hf.count} that can be judged, {ENOUGH_RESPONSES} needed"
    return [Requirement(None, f"{bar.sentence}; {few}") for bar in bars]


def _auc(credit: np.ndarray, gold: np.ndarray) -> float:
    judged = np.abs(gold) > 1e-9
    return auc(credit[judged], gold[judged] > 0)


def _require_toy(source: str, vocabulary: Mapping[str, int]) -> None:
    if set(VOCABULARY) != set(vocabulary):
        raise ModelError(
            f"{source}: does not speak the toy language; the toy benchmark is for a reward model (and policy) that "
            "`r3hf quickstart` trains; for others use --benchmark with a file of marked answers"
        )
