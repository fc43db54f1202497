"""What the commands train on: prompts, examples, pairs and ranked groups as token ids, with a report (layer 4).

A row that cannot be read stops everything (`DataError` with its place). A well-formed row that cannot be used is
counted, listed by number under its reason, and left out. Nothing is skipped in silence, nothing is cut to fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.chat import ChatFormat, answer_ids, chat_format, prompt_ids, render_prompt
from r3hf_ray.data.records import Message, Record, Unusable, detect, parse
from r3hf_ray.data.sources import Source, open_source
from r3hf_ray.errors import DataError
from r3hf_ray.sections.data import DataSection
from r3hf_ray.types import Example, Pair, RankedGroup

T = TypeVar("T")
_LISTED = 20


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt of the data.

    Example: ``PromptRow(row=3, token_ids=[1, 5, 9, 3], text="<bos> baking no-jokes politely :",
    messages=[{"role": "user", "content": "baking no-jokes politely :"}])``
    """

    row: int
    """Line or row of the source, from 1."""
    token_ids: list[int]
    """The rendered prompt, chat template applied."""
    text: str
    """The same, as text."""
    messages: list[Message]
    """The dialogue it was rendered from, for a reward model with a template of its own."""


@dataclass(slots=True)
class Report:
    """How many rows were read and which ones were left out, and why.

    Example: ``str(report)`` is ``"pairs.jsonl: 1,596 of 1,600 rows used; left out: 2 no shared prompt (lines 662,
    1030), 2 empty answer (lines 1481, 1506)"``.
    """

    source: str
    unit: str
    read: int = 0
    used: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> numbers of the lines or rows."""

    def __str__(self) -> str:
        reasons = [f"{len(rows):,} {reason} ({self._places(rows)})" for reason, rows in self.left_out.items()]
        summary = f"{self.source}: {self.used:,} of {self.read:,} rows used"
        return f"{summary}; left out: {', '.join(reasons)}" if reasons else summary

    def _places(self, rows: list[int]) -> str:
        shown = ", ".join(map(str, rows[:_LISTED]))
        more = f" and {len(rows) - _LISTED:,} more" if len(rows) > _LISTED else ""
        return f"{self.unit}{'s' if len(rows) > 1 else ''} {shown}{more}"


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """The usable rows that a data section selects: after `skip`, at most `limit`, the last `heldout` apart."""

    train: list[T]
    heldout: list[T]
    report: Report


def load_prompts(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Loaded[PromptRow]:
    """Rendered prompts of any format; answers are not looked at.

    Raises:
        DataError: unreadable data, or no usable row.
    """

    def prompt(number: int, record: Record) -> PromptRow:
        text, ids = _prompt(record, data, tokenizer)
        return PromptRow(number, ids, text, record.prompt)

    return _load(data, prompt)


def load_examples(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[Example]:
    """Prompts with the answer to imitate (of several, the preferred one), its end token included.

    Raises:
        DataError: unreadable data, no answers, or no usable row.
    """
    form = chat_format(tokenizer)

    def example(_: int, record: Record) -> Example:
        if not record.answers:
            raise DataError("has no answer to learn from; use another data.format")
        prompt, (answer,) = _sequences(record, [record.best], data, tokenizer, form, max_tokens)
        return Example(prompt_ids=prompt, answer_ids=answer)

    loaded = _load(data, example)
    _require_end(form, [e.answer_ids for e in loaded.train], tokenizer, data)
    return loaded


def load_pairs(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[Pair]:
    """Prompts with a chosen and a rejected answer, their end tokens included; a ranking of many gives no pairs here.

    Raises:
        DataError: unreadable data, rows that are no pairs, or no usable row.
    """
    form = chat_format(tokenizer)

    def pair(_: int, record: Record) -> Pair:
        if record.pairs != [(0, 1)] or len(record.answers) != 2:
            raise DataError("is no pair of a chosen and a rejected answer; use another data.format")
        prompt, (chosen, rejected) = _sequences(record, record.answers, data, tokenizer, form, max_tokens)
        return Pair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)

    loaded = _load(data, pair)
    _require_end(form, [p.chosen_ids for p in loaded.train], tokenizer, data)
    return loaded


def load_groups(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[RankedGroup]:
    """Ranked answers to each prompt as whole sequences, with every stated preference as (preferred, other).

    Raises:
        DataError: unreadable data, rows without preferences, or no usable row.
    """
    form = chat_format(tokenizer)

    def group(_: int, record: Record) -> RankedGroup:
        if not record.answers:
            raise DataError("has no answers to rank; use another data.format")
        if not record.pairs:
            raise Unusable("no preference stated")
        prompt, answers = _sequences(record, record.answers, data, tokenizer, form, max_tokens)
        sequences = [prompt + answer for answer in answers]
        return RankedGroup(prompt_tokens=len(prompt), sequences=sequences, pairs=record.pairs)

    loaded = _load(data, group)
    _require_end(form, [list(s) for g in loaded.train for s in g.sequences], tokenizer, data)
    return loaded


def is_ranked(data: DataSection) -> bool:
    """Whether the rows rank several answers (`load_groups`) rather than hold plain pairs (`load_pairs`).

    Raises:
        DataError: the first row cannot be read, or its columns fit no format.
    """
    return _format(data, next(open_source(data).rows, (0, {}))[1]) in ("ranked", "nectar")


def _load(data: DataSection, convert: Callable[[int, Record], T]) -> Loaded[T]:
    source = open_source(data)
    report = Report(source.name, source.unit)
    end = None if data.limit is None else data.skip + data.limit
    usable = list(islice(_usable(data, source, convert, report), end))[data.skip :]
    train = usable[: max(0, len(usable) - data.heldout)]
    report.used = len(usable)
    if not train:
        raise DataError(
            f"{report}; data.skip ({data.skip}) and data.heldout ({data.heldout}) leave nothing to train on: lower "
            "them or use more data"
        )
    return Loaded(train, usable[len(train) :], report)


def _usable(data: DataSection, source: Source, convert: Callable[[int, Record], T], report: Report) -> Iterator[T]:
    form = None
    for number, row in source.rows:
        report.read += 1
        form = form or _format(data, row)
        try:
            item = convert(number, parse(row, form))
        except Unusable as reason:
            report.left_out.setdefault(str(reason), []).append(number)
        except DataError as error:
            place = f"{source.name}:{number}" if source.unit == "line" else f"{source.name}: row {number}"
            raise DataError(f"{place}: {error}") from None
        else:
            yield item


def _format(data: DataSection, row: dict[str, object]) -> str:
    if data.format != "auto":
        return data.format
    if not row:
        raise DataError(f"{data.source}: holds no rows")
    return detect(row, data.source)


def _prompt(record: Record, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    text = render_prompt(record.prompt, tokenizer)
    ids = prompt_ids(text, tokenizer)
    if len(ids) > data.max_prompt_tokens:
        raise Unusable(f"prompt over {data.max_prompt_tokens} tokens")
    if not ids:
        raise Unusable("empty prompt")
    return text, ids


def _sequences(
    record: Record,
    texts: list[str],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    form: ChatFormat,
    max_tokens: int,
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids and the ids of each answer."""
    _, prompt = _prompt(record, data, tokenizer)
    answers = [answer_ids(text, form, tokenizer) for text in texts]
    if len(prompt) + max(map(len, answers)) > max_tokens:
        raise Unusable(f"over {max_tokens} tokens")
    return prompt, answers


def _require_end(
    form: ChatFormat, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> None:
    """Where the template ends no answer, the data must: a model that never saw EOS would never stop."""
    if not form.end and not any(tokenizer.eos_token_id in ids for ids in rows):
        raise DataError(
            f"{data.source}: no answer ends with {tokenizer.eos_token!r} and the chat template of "
            f"{tokenizer.name_or_path} adds no end either; correct the template"
        )
