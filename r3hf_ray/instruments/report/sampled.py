"""The parts of a report that show sampled responses: all of some steps, and the best and the worst by every method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3hf_ray.instruments.pages.coloured_answers import TRUE_UNDERLINES
from r3hf_ray.instruments.pages.parts import PageSection
from r3hf_ray.instruments.pages.texts import section
from r3hf_ray.instruments.report.credit import Payment, coloured_answers
from r3hf_ray.instruments.report.figures import TEXT
from r3hf_ray.records.samples import read_samples, sample_steps

MAX_DUMPS = 8
MAX_TOKENS = 2000
TRUTH = " Underlines are the truth, which this task knows: a good method is blue over green and orange over red."
TOKEN_FIELDS = ("reward", "value", "advantage", "kl", "prefix_score", "logprob")


def responses_section(run_folder: Path, payment: Payment) -> list[PageSection]:
    """Sampled responses of at most `MAX_DUMPS` steps, the first and the last among them; without any, nothing."""
    steps = sample_steps(run_folder)
    if len(steps) > MAX_DUMPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_DUMPS - 1))] for i in range(MAX_DUMPS)]
    dumps = [{"step": step, "responses": [_response(r) for r in read_samples(run_folder, step)]} for step in steps]
    if not dumps:
        return []
    words = {"first": "first " if payment.several else "", "of_a_token": payment.of_a_token}
    return [section(TEXT, "responses", words, responses=dumps)]


def methods_section(run_folder: Path, payment: Payment) -> list[PageSection]:
    """Chosen responses, paid by every method; nothing where the samples do not allow it."""
    answers = coloured_answers(run_folder, payment)
    if not answers:
        return []
    known = any(any(text.marks) for answer in answers for text in answer.texts)
    words = {"truth": TRUTH if known else "", "unit": payment.unit}
    return [section(TEXT, "methods", words, answers=answers, underlines=TRUE_UNDERLINES if known else {})]


def _response(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, shown = tokens[0], tokens[:MAX_TOKENS]
    return {
        **{key: first[key] for key in ("prompt_id", "sample", "prompt", "finish", "score", "gold")},
        "total": float(sum(token["reward"] or 0.0 for token in tokens)),
        "length": len(tokens),
        "text": [token["token"] for token in shown],
        "id": [token["token_id"] for token in shown],
        **{field: [token[field] for token in shown] for field in TOKEN_FIELDS},
    }
