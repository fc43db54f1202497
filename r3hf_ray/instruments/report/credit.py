"""The credit part of a run's report: sampled responses, paid by every method side by side.

Computed from the prefix scores in the samples with the functions of `algorithms.redistribution`, in the unit of the
run's rewards. The run's own row holds the rewards it really paid, with all its settings; the other rows are the plain
methods (beta_c = 1, the jump at EOS kept, segments by sentence). `abc` needs attention, which only a run of that mode
has measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r3hf_ray.algorithms.redistribution import PrefixScores, every_method
from r3hf_ray.algorithms.spans import ends_sentence
from r3hf_ray.instruments.pages.coloured_answers import (
    AnswerText,
    ColouredAnswer,
    ColourRow,
    ending_of,
    known_credit_row,
    mark_of,
    method_rows,
    scale_of,
)
from r3hf_ray.methods import METHODS, facts_of
from r3hf_ray.records.samples import PART, read_samples, sample_steps
from r3hf_ray.types import MAIN

PLAIN = {"beta_c": 1.0, "subtract_prompt_score": True, "eos_jump": "keep", "missing_eos": "keep"}
"""Fields of `[reward]` with which a method pays steps of the prefix score and nothing else."""
Tokens = Sequence[Mapping[str, Any]]
"""The rows of one response, as `samples.read_samples` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """How a run pays its tokens."""

    mode: str = "r3hf"
    """A name in `METHODS`, or a user's own ``package.module:function``."""
    several: bool = False
    """Whether more than one model pays; the samples hold the main one's prefix scores and the sum of all rewards."""
    plain: bool = True
    """Whether the method alone decides: no share is paid at the end, no part of a score is moved, dropped or added."""
    mean: float = 0.0
    """Of the score under the initial policy: what counts as 0."""
    std: float = 1.0
    """Of the score under the initial policy, over the model's weight: what counts as 1."""

    @property
    def steps(self) -> bool:
        """Whether a token earns the step that the prefix score takes at it, or a span the sum of its steps."""
        return facts_of(self.mode).pays_differences and self.plain and not self.several

    @property
    def unit(self) -> str:
        """Of all numbers, in words."""
        if (self.mean, self.std) == (0.0, 1.0):
            return "in the reward model's own units"
        return "standard deviations of the score; 0 is the average answer before training"

    @property
    def of_a_token(self) -> str:
        """What a token's reward has to do with the line of prefix scores under a response; empty if little."""
        spans = ", summed over spans" if "span_ends" in facts_of(self.mode).needs else ""
        scaled = ", divided by the spread of scores (one fixed number for the whole run)" if self.std != 1.0 else ""
        return f"; a token's reward is the step the line takes there{spans}{scaled}" if self.steps else ""


def payment_of(config: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Payment:
    """What a run's ``config.toml`` and events say; without calibration the unit is the reward model's own."""
    model, reward = config.get("model", {}), config.get("reward", {})
    told = [e for e in events if e.get("event") == "calibrated" and e.get("model", MAIN) == MAIN]
    mean, std = (float(told[-1]["mean"]), float(told[-1]["std"]) or 1.0) if told else (0.0, 1.0)
    return Payment(
        mode=str(reward.get("mode", "r3hf")),
        plain=all(reward.get(name, value) == value for name, value in PLAIN.items()),
        several=bool(model.get("rewards")) or "cost" in model,
        mean=mean,
        std=std / (float(model.get("reward_weight", 1.0)) or 1.0),
    )


def paid_by_method(tokens: Tokens, payment: Payment) -> dict[str, np.ndarray]:
    """What each plain method pays each token of one response, in the run's unit; float64 arrays of its length."""
    first = tokens[0]

    def scaled(values: Any) -> torch.Tensor:
        return (torch.tensor([values], dtype=torch.float64) - payment.mean) / payment.std

    prefix = scaled([token["prefix_score"] for token in tokens])
    scores = PrefixScores(prefix=prefix, prompt=scaled(first["prompt_score"]), pooled=scaled(first["score"]))
    mask = torch.ones_like(prefix, dtype=torch.bool)
    ends = torch.tensor([[ends_sentence(token["token"]) for token in tokens]])
    return {mode: paid[0].numpy() for mode, paid in every_method(scores, mask, span_ends=ends).items()}


def coloured_answers(run_folder: Path, payment: Payment) -> list[ColouredAnswer]:
    """The best and the worst response, by score, of the last and of the first dump.

    Dumps that were written without the prompt's score are left out.
    """
    steps = sample_steps(run_folder)
    answers = []
    for step in dict.fromkeys([*steps[-1:], *steps[:1]]):
        complete = [tokens for tokens in read_samples(run_folder, step) if tokens[0]["prompt_score"] is not None]
        ranked = sorted(complete, key=lambda tokens: tokens[0]["score"], reverse=True)
        ends = {"best score": ranked[:1], "worst score": ranked[1:][-1:]}
        answers += [
            _coloured(tokens, payment, label=f"Step {step}, {end} of {len(ranked)}")
            for end, chosen in ends.items()
            for tokens in chosen
        ]
    return answers


def _coloured(tokens: Tokens, payment: Payment, *, label: str) -> ColouredAnswer:
    first, known = tokens[0], [token["gold_credit"] for token in tokens]
    knows = all(credit is not None for credit in known)
    curve = [(token["prefix_score"] - payment.mean) / payment.std for token in tokens]
    text = AnswerText(
        text=[token["token"] for token in tokens],
        id=[token["token_id"] for token in tokens],
        curve=curve,
        start=(first["prompt_score"] - payment.mean) / payment.std,
        marks=[mark_of(credit) for credit in known] if knows else (),
    )
    own = np.array([token["reward"] for token in tokens])
    methods = paid_by_method(tokens, payment)
    scale = scale_of([own, *methods.values()])
    facts = [
        ("score", f"{curve[-1]:+.2f}"),
        *([] if first["gold"] is None else [("gold", f"{first['gold']:+.2f}")]),
        ("tokens", str(len(tokens))),
        ending_of(first["finish"] == "eos"),
    ]
    others = {name: paid for name, paid in methods.items() if payment.several or name != payment.mode}
    parts = [
        ColourRow(name, "a model's part of that sum", [token[name] for token in tokens], scale=scale)
        for name in first
        if name.startswith(PART)
    ]
    rows = [*([known_credit_row(known)] if knows else []), _own_row(own, payment, scale), *parts]
    rows += method_rows(others, scale=scale)
    return ColouredAnswer(label=label, facts=facts, prompt=first["prompt"], texts=[text], rows=rows)


def _own_row(rewards: np.ndarray, payment: Payment, scale: float) -> ColourRow:
    if payment.several:
        title, note = "all models", "the sum of what this run's models pay; the other rows pay by the first one only"
    else:
        title = payment.mode.rpartition(":")[2]
        note = facts_of(payment.mode).note if payment.mode in METHODS else f"this run's own method, {payment.mode}"
    return ColourRow(title, note, rewards, scale=scale, own=True)
