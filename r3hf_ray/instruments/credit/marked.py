r"""Answers in which people marked what is wrong: reading them, and carrying token credit over to their characters.

Two shapes of row, as JSON Lines or a JSON array, gzipped or not:

- FineGrainedRLHF's QA feedback (github.com/allenai/FineGrainedRLHF, ``tasks/qa_feedback/data/dev_feedback.json``):
  ``question``, ``passages``, ``prediction 1`` and ``feedback`` with ``errors`` (``error type``, ``start``, ``end``) and
  ``corrected-prediction``. The prompt is one user turn: the question, then ``\n\nPassages:\n`` and a line
  ``title: sentences`` for each passage.
- one's own: ``prompt`` (text or messages), ``response``, ``spans`` (``start``, ``end``, ``kind``) and, if there is one,
  ``corrected``.

``start`` and ``end`` count characters of the answer, ``end`` exclusive.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float64
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from r3hf_ray.data.loading import Report, read_rows
from r3hf_ray.data.messages import messages_of
from r3hf_ray.data.sources import open_source
from r3hf_ray.errors import DataError, ModelError, Unusable
from r3hf_ray.instruments.scored_answers import Answer, Judge
from r3hf_ray.sections.data import DataSection
from r3hf_ray.types import Message


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` (exclusive) that people found wrong.

    Example: ``Span(104, 151, "Wrong-Grounding")``
    """

    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """An answer as text and as tokens, and which characters belong to which token."""

    text: str
    answer: Answer
    offsets: tuple[tuple[int, int], ...]
    """Characters of each token, end exclusive; an empty range for one without text, such as the end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedAnswer:
    """An answer with its marks, and the corrected answer where people wrote one that differs."""

    row: int
    """Line or row of the file, from 1."""
    question: str
    original: Text
    spans: tuple[Span, ...]
    corrected: Text | None


def load_marked(source: str, judge: Judge, *, limit: int | None) -> tuple[list[MarkedAnswer], str]:
    """Read marked answers as the reward model will see them, and one line that says what was left out.

    A row longer than the model's window is counted under its number and left out: cut text would lose its marks.

    Raises:
        DataError: no such file, a row of another shape (its place, the field and what is wrong), or no usable row.
        ModelError: the tokenizer cannot say which characters a token covers.
    """
    opened = open_source(DataSection(source=source))
    report = Report(opened.name, opened.unit)
    found = list(islice(read_rows(opened, partial(_marked, judge=judge), report), limit))
    report.used, report.limit = len(found), limit if limit and len(found) < limit else 0
    if not found:
        raise report.nothing_left()
    return found, str(report)


def tokenise(prompt: Sequence[Message], text: str, judge: Judge) -> Text:
    """The ids that `r3hf ppo` would score for this answer, with the characters of each token.

    Raises:
        Unusable: empty, or longer than the model's window.
        ModelError: a tokenizer without offsets.
    """
    head = judge.chat.prompt(prompt)
    given = judge.chat.encoded_answer(head, text)
    if not given.offsets:
        raise ModelError(f"{judge.source}: only a fast tokenizer says which characters a token covers")
    if len(head.token_ids) + len(given.token_ids) > judge.window:
        raise Unusable(f"over {judge.window} tokens")
    return Text(text=text, answer=Answer(head.token_ids, given.token_ids), offsets=tuple(given.offsets))


def on_characters(credit: Float64[np.ndarray, "T"], text: Text) -> Float64[np.ndarray, "C"]:
    """Each token's credit in equal parts on its characters; NaN on characters of no token.

    Credit of tokens without characters, such as the end token, falls on nothing. A character that is split over several
    tokens gets a part from each.
    """
    spread, touched = np.zeros(len(text.text)), np.zeros(len(text.text), dtype=bool)
    for paid, (start, end) in zip(credit, text.offsets, strict=True):
        if end > start:
            spread[start:end] += paid / (end - start)
            touched[start:end] = True
    return np.where(touched, spread, np.nan)


def marked_characters(text: str, spans: Sequence[Span], kind: str | None = None) -> Bool[np.ndarray, "C"]:
    """True on the characters of the spans, of one kind or of all."""
    marked = np.zeros(len(text), dtype=bool)
    for span in spans:
        if kind is None or span.kind == kind:
            marked[span.start : span.end] = True
    return marked


def changed_characters(original: str, corrected: str) -> tuple[Bool[np.ndarray, "C"], Bool[np.ndarray, "D"]]:
    """Words that the correction took out of the original, and words that it brought in; longest common word runs stay.

    Example: ``("two old cats", "two cats sat")`` marks ``old`` in the first and ``sat`` in the second.
    """
    words = [list(re.finditer(r"\S+", text)) for text in (original, corrected)]
    before, after = ([word.group() for word in side] for side in words)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    removed, added = np.zeros(len(original), dtype=bool), np.zeros(len(corrected), dtype=bool)
    for operation, a, b, c, d in matcher.get_opcodes():
        if operation != "equal":
            for mask, side, first, last in ((removed, words[0], a, b), (added, words[1], c, d)):
                if last > first:
                    mask[side[first].start() : side[last - 1].end()] = True
    return removed, added


class _Mark(BaseModel):
    start: NonNegativeInt
    end: NonNegativeInt
    kind: str = "wrong"


class _Own(BaseModel):
    """A row of one's own."""

    prompt: Any
    response: str
    spans: list[_Mark]
    corrected: str | None = None


class _Error(_Mark):
    kind: str = Field(alias="error type")


class _Feedback(BaseModel):
    errors: list[_Error]
    corrected: str | None = Field(None, alias="corrected-prediction")


class _QAFeedback(BaseModel):
    """A row of FineGrainedRLHF's QA feedback."""

    question: str
    passages: list[Annotated[list[str], Field(min_length=1)]]
    prediction: str = Field(alias="prediction 1")
    feedback: _Feedback


def _marked(number: int, row: Mapping[str, Any], judge: Judge) -> MarkedAnswer:
    try:
        question, prompt, text, marks, corrected = _qa_feedback(row) if "feedback" in row else _own(row)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        raise _no_marked_answer(f"{'.'.join(map(str, error['loc']))}: {error['msg']}") from None
    except TypeError as error:
        raise _no_marked_answer(str(error)) from None
    outside = next((mark for mark in marks if not mark.start <= mark.end <= len(text)), None)
    if outside is not None:
        raise _no_marked_answer(f"start {outside.start}, end {outside.end}: not within its {len(text)} characters")
    spans = [Span(mark.start, mark.end, mark.kind) for mark in marks]
    return MarkedAnswer(
        row=number,
        question=question,
        original=tokenise(prompt, text, judge),
        spans=tuple(sorted(spans, key=lambda span: span.start)),
        corrected=tokenise(prompt, corrected, judge) if corrected.strip() not in ("", text.strip()) else None,
    )


def _no_marked_answer(why: str) -> DataError:
    return DataError(
        f"is no marked answer ({why}); it needs question, passages, prediction 1 and feedback, or prompt, response and "
        "spans"
    )


def _qa_feedback(row: Mapping[str, Any]) -> tuple[str, list[Message], str, Sequence[_Mark], str]:
    given = _QAFeedback.model_validate(row)
    passages = [f"{title}: {' '.join(' '.join(sentences).split())}" for title, *sentences in given.passages]
    prompt = "\n".join([given.question, "", "Passages:", *passages]) if passages else given.question
    message = Message(role="user", content=prompt)
    return given.question, [message], given.prediction, given.feedback.errors, given.feedback.corrected or ""


def _own(row: Mapping[str, Any]) -> tuple[str, list[Message], str, Sequence[_Mark], str]:
    given = _Own.model_validate(row)
    prompt = messages_of(given.prompt, "prompt")
    return prompt[-1]["content"], prompt, given.response, given.spans, given.corrected or ""
