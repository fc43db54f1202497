"""What the commands train on: prompts, examples, pairs and ranked groups as token ids, with a report (layer 4).

A row that cannot be read stops everything (`DataError` with its place). A well-formed row that cannot be used, or that
teaches nothing, is counted, listed by number under its reason, and left out. Nothing is skipped in silence, nothing is
cut to fit. Of the prompts that are held out none is trained on, unless `data.split_by` says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.messages import plain
from r3hf_ray.data.records import NO_ANSWER, NO_PREFERENCE, TIE, Record, detect, parse
from r3hf_ray.data.sources import Source, open_source
from r3hf_ray.errors import ConfigError, DataError, Unusable, sentence_of
from r3hf_ray.models.chat import Chat, Prompt
from r3hf_ray.sections.data import DataSection
from r3hf_ray.types import Example, Message, Pair, RankedGroup

T = TypeVar("T")
_LISTED = 20
_EQUAL = "equal answers"


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
    heldout: int = 0
    """How many of the used ones are held out."""
    limit: int = 0
    """How many were asked for, where there are fewer."""
    repeated: int = 0
    """Training rows whose prompt is held out too (`data.split_by` is `row`)."""
    form: str = ""
    """`data.format`, as set or as found."""
    unused: set[str] = field(default_factory=set)
    """Columns that weigh a row elsewhere and do not here."""
    left_out: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> numbers of the lines or rows."""

    def __str__(self) -> str:
        summary = f"{self.source}: {self.used:,} of {self.read:,} rows used"
        summary += f", fewer than the limit of {self.limit:,}" if self.limit else ""
        if self.heldout:
            kept = f"; {self.repeated:,} of the others share a prompt with them, as data.split_by = row lets them"
            summary += f", {self.heldout:,} of them held out" + (kept if self.repeated else "")
        if self.unused:
            summary += f"; not used: the column {', '.join(sorted(self.unused))}"
        reasons = ", ".join(text for _, text in self._reasons())
        return f"{summary}; left out: {reasons}" if reasons else summary

    def nothing_left(self, *, skipped: int = 0, heldout: int = 0) -> DataError:
        """The sentence that ends a command; it leads with what took most rows."""
        if not self.read:
            return DataError(f"{self.source}: holds no rows")
        form = f" (read as data.format {self.form})" if self.form else ""
        taken = [
            (skipped, f"{skipped:,} skipped (lower data.skip)"),
            (heldout, f"{heldout:,} held out (lower data.heldout)"),
        ]
        taken = sorted([*self._reasons(), *(t for t in taken if t[0])], key=lambda t: -t[0])
        return DataError(
            f"{self.source}: none of its {self.read:,} rows{form} is left: {', '.join(text for _, text in taken)}"
        )

    def _reasons(self) -> list[tuple[int, str]]:
        found = [(len(rows), f"{len(rows):,} {why} ({self._places(rows)})") for why, rows in self.left_out.items()]
        return sorted(found, key=lambda reason: -reason[0])

    def _places(self, rows: list[int]) -> str:
        if len(rows) == self.read > 1:
            return "all of them"
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
    chat = Chat(tokenizer)

    def prompt(number: int, record: Record) -> PromptRow:
        rendered = _prompt(record, data, chat)
        return PromptRow(number, rendered.token_ids, rendered.text, record.prompt)

    return _load(data, prompt)


def load_examples(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[Example]:
    """Prompts with the answer to imitate (of several, the preferred one), its end token included.

    Raises:
        DataError: unreadable data, no answers, or no usable row.
    """
    chat = Chat(tokenizer)

    def example(_: int, record: Record) -> Example:
        if not record.answers:
            raise Unusable(record.lacks or NO_ANSWER)
        prompt, (answer,) = _sequences(record, [record.best], data, chat, max_tokens)
        return Example(prompt_ids=prompt, answer_ids=answer)

    return _with_ends(_load(data, example), chat, data, lambda one: [one.answer_ids])


def load_pairs(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[Pair]:
    """Prompts with a chosen and a rejected answer, their end tokens included.

    A row that ranks several answers gives its first stated preference only, so that pairs stay independent of each
    other and an audit's intervals are true; `load_groups` gives all of them.

    Raises:
        DataError: unreadable data, or no usable row.
    """
    chat = Chat(tokenizer)

    def pair(_: int, record: Record) -> Pair:
        winner, loser = _told(record)[0]
        texts = [record.answers[winner], record.answers[loser]]
        prompt, (chosen, rejected) = _sequences(record, texts, data, chat, max_tokens)
        if chosen == rejected:
            raise Unusable(_EQUAL)
        return Pair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)

    return _with_ends(_load(data, pair), chat, data, lambda one: [one.chosen_ids])


def load_groups(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Loaded[RankedGroup]:
    """Ranked answers to each prompt as whole sequences, with every stated preference as (preferred, other).

    Of two answers that are equal none is preferred, whatever a row says.

    Raises:
        DataError: unreadable data, or no usable row.
    """
    chat = Chat(tokenizer)

    def group(_: int, record: Record) -> RankedGroup:
        told = _told(record)
        prompt, answers = _sequences(record, record.answers, data, chat, max_tokens)
        pairs = [(winner, loser) for winner, loser in told if answers[winner] != answers[loser]]
        if not pairs:
            raise Unusable(_EQUAL)
        return RankedGroup(prompt_tokens=len(prompt), sequences=[prompt + answer for answer in answers], pairs=pairs)

    return _with_ends(_load(data, group), chat, data, lambda one: one.sequences)


def is_ranked(data: DataSection) -> bool:
    """Whether the rows rank several answers (`load_groups`) rather than hold pairs (`load_pairs`).

    Raises:
        DataError: the first row cannot be read, or its columns fit no format.
    """
    return _format(data, next(open_source(data).rows, (0, {}))[1]) in ("ranked", "nectar")


def read_rows(source: Source, read: Callable[[int, Mapping[str, Any]], T], report: Report) -> Iterator[T]:
    """What `read` makes of every row; the one place where a row is left out or refused.

    Raises:
        DataError: a row that cannot be read, with its place: whatever a parser, a template or a tokenizer makes of it.
    """
    for number, row in source.rows:
        report.read += 1
        try:
            item = read(number, row)
        except Unusable as reason:
            report.left_out.setdefault(str(reason), []).append(number)
        except DataError as error:
            raise DataError(f"{source.place(number)}: {error}") from None
        except ConfigError:
            raise
        except Exception as error:  # of a stranger's template or tokenizer; nothing narrower holds for all of them
            what = ascii(sentence_of(error))[1:-1]
            raise DataError(
                f"{source.place(number)}: cannot be turned into tokens ({type(error).__name__}: {what}); correct or "
                "remove it, or the tokenizer's chat template"
            ) from error
        else:
            yield item


def _load(data: DataSection, convert: Callable[[int, Record], T]) -> Loaded[T]:
    source = open_source(data)
    report = Report(source.name, source.unit)

    def read(number: int, row: Mapping[str, Any]) -> tuple[int, int, T]:
        report.form = report.form or _format(data, row)
        report.unused |= row.keys() & {"margin", "weight"}
        record = parse(row, report.form)
        return number, _asked(record), convert(number, record)

    end = None if data.limit is None else data.skip + data.limit
    found = list(islice(read_rows(source, read, report), end))
    selected = found[data.skip :]
    report.limit = data.limit if data.limit and len(selected) < data.limit else 0
    train, heldout = selected[: max(0, len(selected) - data.heldout)], selected[-data.heldout or len(selected) :]
    asked = {prompt for _, prompt, _ in heldout}
    shared = [number for number, prompt, _ in train if prompt in asked]
    if data.split_by == "row":
        report.repeated = len(shared)
    elif shared:
        train = [row for row in train if row[1] not in asked]
        report.left_out['with a prompt that is held out (data.split_by = "row" keeps them)'] = shared
    report.heldout, report.used = len(heldout), len(train) + len(heldout)
    if not train:
        raise report.nothing_left(skipped=min(data.skip, len(found)), heldout=len(heldout))
    return Loaded([item for _, _, item in train], [item for _, _, item in heldout], report)


def _asked(record: Record) -> int:
    """Two rows ask the same when every turn before the answer is the same, but for space around it."""
    return hash(tuple(plain(record.prompt)))


def _told(record: Record) -> list[tuple[int, int]]:
    """The preferences between answers that differ."""
    if not record.pairs:
        raise Unusable(TIE if record.lacks == TIE else NO_PREFERENCE)
    texts = [answer.strip() for answer in record.answers]
    told = [(winner, loser) for winner, loser in record.pairs if texts[winner] != texts[loser]]
    if not told:
        raise Unusable(_EQUAL)
    return told


def _format(data: DataSection, row: Mapping[str, Any]) -> str:
    if data.format != "auto":
        return data.format
    if not row:
        raise DataError(f"{data.source}: holds no rows")
    return detect(row, data.source)


def _prompt(record: Record, data: DataSection, chat: Chat) -> Prompt:
    prompt = chat.prompt(record.prompt)
    if len(prompt.token_ids) > data.max_prompt_tokens:
        raise Unusable(f"prompt over {data.max_prompt_tokens} tokens")
    if not prompt.token_ids:
        raise Unusable("empty prompt")
    return prompt


def _sequences(
    record: Record, texts: list[str], data: DataSection, chat: Chat, max_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """Prompt ids and the ids of each answer."""
    prompt = _prompt(record, data, chat)
    answers = [chat.answer(prompt, text) for text in texts]
    if len(prompt.token_ids) + max(map(len, answers)) > max_tokens:
        raise Unusable(f"over {max_tokens} tokens")
    return prompt.token_ids, answers


def _with_ends(
    loaded: Loaded[T], chat: Chat, data: DataSection, texts: Callable[[T], Sequence[Sequence[int]]]
) -> Loaded[T]:
    """Where the template ends no answer, the data must: a model that never saw EOS would never stop."""
    eos = chat.tokenizer.eos_token
    ended = any(chat.tokenizer.eos_token_id in ids for one in loaded.train for ids in texts(one))
    if not chat.form.end and not ended:
        raise DataError(
            f"{data.source}: no answer ends with {eos!r} and the chat template of {chat.tokenizer.name_or_path} adds "
            "no end either; correct the template"
        )
    return loaded
