"""Preference pairs for an audit, from anything `r3hf reward` can train on."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.chat import answer_ids, chat_format, prompt_ids, render_prompt
from r3hf_ray.data.loading import Report, is_ranked, load_pairs
from r3hf_ray.data.records import Record, Unusable, detect, parse
from r3hf_ray.data.sources import open_source
from r3hf_ray.errors import DataError
from r3hf_ray.sections.data import DataSection
from r3hf_ray.types import Pair


def audit_pairs(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, window: int) -> tuple[list[Pair], str]:
    """Pairs that fit the reward model's window, and one line that says what was read and left out.

    A row that ranks several answers gives its first stated preference only, so that pairs stay independent of each
    other and the intervals are true.

    Raises:
        DataError: unreadable data, rows without preferences, or no usable row.
    """
    data = data.model_copy(update={"max_prompt_tokens": window})
    if not is_ranked(data):
        loaded = load_pairs(data, tokenizer, max_tokens=window)
        return loaded.train, str(loaded.report)
    report = Report(data.source, open_source(data).unit)
    pairs = list(_first_preferences(data, tokenizer, window, report))
    report.used = len(pairs)
    if not pairs:
        raise DataError(f"{report}; nothing left to audit: use more data or a smaller --skip")
    return pairs, str(report)


def selection(data: DataSection) -> str:
    """A data source in words, with what was set to find and read its rows.

    Example: ``PKU-Alignment/PKU-SafeRLHF (split test, format safe_rlhf_cost)``
    """
    given = data.model_dump(exclude_defaults=True, include={"config", "data_dir", "split", "format"})
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{data.source} ({words})" if words else data.source


def _first_preferences(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, window: int, report: Report
) -> Iterator[Pair]:
    opened, found, form = open_source(data), 0, ""
    for number, row in opened.rows:
        if data.limit is not None and found == data.skip + data.limit:
            return
        report.read += 1
        form = form or (detect(row, data.source) if data.format == "auto" else data.format)
        try:
            pair = _pair(parse(row, form), tokenizer, window)
        except Unusable as reason:
            report.left_out.setdefault(str(reason), []).append(number)
            continue
        except DataError as error:
            raise DataError(f"{opened.name}:{number}: {error}") from None
        found += 1
        if found > data.skip:
            yield pair


def _pair(record: Record, tokenizer: PreTrainedTokenizerBase, window: int) -> Pair:
    if not record.pairs:
        raise Unusable("no preference stated")
    form, (winner, loser) = chat_format(tokenizer), record.pairs[0]
    prompt = prompt_ids(render_prompt(record.prompt, tokenizer), tokenizer)
    chosen, rejected = (answer_ids(record.answers[i], form, tokenizer) for i in (winner, loser))
    if len(prompt) + max(len(chosen), len(rejected)) > window:
        raise Unusable(f"over {window} tokens")
    return Pair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
