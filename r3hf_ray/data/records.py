"""One record type for every shape of row, and a parser for each shape (layer 4).

A record is a dialogue up to the answer, the answers to it, and which answer was preferred to which:

| format | answers | pairs |
|---|---|---|
| ``prompt`` | the ``completion``, where there is one | none |
| ``messages`` | the last assistant turn | none |
| ``preference``, ``hh``, ``safe_rlhf``, ``tldr_pairs`` | chosen, rejected | (0, 1) |
| ``safe_rlhf_cost``, never detected | the less safe one, the safer one | (0, 1) |
| ``ranked``, ``nectar`` | all | every stated preference |
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from r3hf_ray.errors import DataError


class Message(TypedDict):
    """One turn of a dialogue, as chat templates read it."""

    role: str
    content: str


class Unusable(ValueError):
    """A well-formed row that cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True, slots=True)
class Record:
    """A dialogue and what is known of its answers.

    Example: ``Record(prompt=[{"role": "user", "content": "Hi"}], answers=["Hello!", "No."], pairs=[(0, 1)])``
    """

    prompt: list[Message]
    answers: list[str]
    pairs: list[tuple[int, int]]
    """(preferred, other), indices into `answers`."""

    @property
    def best(self) -> str:
        """The answer with the most wins less losses; the first one among equals."""
        balance = [sum((winner == i) - (loser == i) for winner, loser in self.pairs) for i in range(len(self.answers))]
        return self.answers[balance.index(max(balance))]


def detect(columns: Mapping[str, Any], source: str) -> str:
    """The format of a row, from its columns.

    Raises:
        DataError: no format has these columns; the sentence lists what is there and what would do.
    """
    for name, required in _COLUMNS.items():
        if required <= columns.keys():
            return "hh" if name == "preference" and _is_transcript(columns) else name
    if {"chosen", "rejected"} <= columns.keys():
        return "hh" if isinstance(columns["chosen"], str) else "preference"
    known = "; ".join(f"{name}: {', '.join(sorted(required))}" for name, required in _COLUMNS.items())
    raise DataError(
        f"{source}: columns {', '.join(map(str, columns))} fit no known format; rename them or set data.format "
        f"({known}; hh: chosen, rejected)"
    )


def parse(row: Mapping[str, Any], form: str) -> Record:
    """Parse one row.

    Raises:
        Unusable: a well-formed row without a shared prompt, a stated preference or a last assistant turn.
        DataError: a missing column or a value of another type (without the row's place, which the caller adds).
    """
    try:
        return PARSERS[form](row)
    except KeyError as error:
        raise DataError(f"has no field {error} (data.format is {form}); there are {', '.join(map(str, row))}") from None
    except (TypeError, IndexError) as error:
        raise DataError(f"is not shaped as data.format {form}: {error}") from None


def _prompt(row: Mapping[str, Any]) -> Record:
    prompt = _messages(row["prompt"])
    return Record(prompt, [_answer(row["completion"], prompt)] if "completion" in row else [], [])


def _chat(row: Mapping[str, Any]) -> Record:
    prompt, answer = _split_answer(_messages(row["messages"]))
    return Record(prompt, [answer], [])


def _preference(row: Mapping[str, Any]) -> Record:
    if "prompt" in row:
        prompt = _messages(row["prompt"])
        return Record(prompt, [_answer(row["chosen"], prompt), _answer(row["rejected"], prompt)], [(0, 1)])
    chosen, rejected = (_split_answer(_messages(row[name])) for name in ("chosen", "rejected"))
    if chosen[0] != rejected[0]:
        raise Unusable("no shared prompt")
    return Record(chosen[0], [chosen[1], rejected[1]], [(0, 1)])


def _hh(row: Mapping[str, Any]) -> Record:
    chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
    head, mark, answer = chosen.rpartition(_ASSISTANT)
    other_head, _, other = rejected.rpartition(_ASSISTANT)
    if head != other_head:
        raise Unusable("no shared prompt")
    if not mark:
        raise Unusable("no assistant turn")
    if _TURN.search(answer) or _TURN.search(other):
        raise Unusable("last turn is not the assistant's")
    return Record(_transcript(head), [answer, other], [(0, 1)])


def _safe_rlhf(row: Mapping[str, Any]) -> Record:
    label = row["better_response_id"] if "better_response_id" in row else row["safer_response_id"]
    return _of_two(row["prompt"], [_text(row["response_0"]), _text(row["response_1"])], label)


def _safe_rlhf_cost(row: Mapping[str, Any]) -> Record:
    """The less safe answer is the preferred one: a reward model trained on it scores harm, higher being worse."""
    safer = row["safer_response_id"]
    less_safe = 1 - safer if safer in (0, 1) else None
    return _of_two(row["prompt"], [_text(row["response_0"]), _text(row["response_1"])], less_safe)


def _tldr_pairs(row: Mapping[str, Any]) -> Record:
    if "summaries" not in row:
        return _preference(row)
    info = row["info"]
    if not isinstance(info, dict):
        raise TypeError(f"info: expected an object, got {type(info).__name__}")
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
    lines = [f"{label}{_text(info[field]).strip()}" for label, field in parts if info.get(field)]
    if not info.get("post"):
        lines.append(f"ARTICLE: {_text(info['article']).strip()}")
    prompt = "\n\n".join([*lines, "TL;DR:"])
    return _of_two(prompt, [_text(summary["text"]) for summary in row["summaries"]], row["choice"])


def _nectar(row: Mapping[str, Any]) -> Record:
    ranked = sorted(row["answers"], key=lambda answer: answer["rank"])
    ranks = [answer["rank"] for answer in ranked]
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
    return Record(_messages(row["prompt"]), [_text(answer["answer"]) for answer in ranked], pairs)


def _ranked(row: Mapping[str, Any]) -> Record:
    answers = [_text(response) for response in _list(row, "responses")]
    if "pairs" in row:
        pairs = [_pair(pair, len(answers)) for pair in _list(row, "pairs")]
    else:
        scores = [_number(score) for score in _list(row, "scores")]
        if len(scores) != len(answers):
            raise TypeError(f"{len(scores)} scores of {len(answers)} responses")
        pairs = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if scores[i] > scores[j]]
    return Record(_messages(row["prompt"]), answers, pairs)


def _pair(value: Any, answers: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(index not in range(answers) for index in value):
        raise TypeError(f"a pair is {value!r}, not [preferred, other] with indices into 0..{answers - 1}")
    preferred, other = value
    return int(preferred), int(other)


def _of_two(prompt: Any, answers: list[str], preferred: Any) -> Record:
    if preferred not in (0, 1):
        raise Unusable("no preference stated")
    return Record(_messages(prompt), [answers[preferred], answers[1 - preferred]], [(0, 1)])


def _messages(value: Any) -> list[Message]:
    """A list of messages as it is; a transcript split into turns; any other text as one user turn."""
    if isinstance(value, str):
        return _transcript(value.rstrip().removesuffix("Assistant:")) if _opens_dialogue(value) else [_user(value)]
    if not isinstance(value, list) or not value:
        raise TypeError(f"expected text or a list of messages, got {type(value).__name__}")
    return [Message(role=_text(turn["role"]), content=_text(turn["content"])) for turn in value]


def _transcript(text: str) -> list[Message]:
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        raise Unusable("no human turn at the start")
    return [
        Message(role="user" if speaker == "Human" else "assistant", content=content.strip())
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _split_answer(messages: list[Message]) -> tuple[list[Message], str]:
    *prompt, last = messages
    if last["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    if not prompt:
        raise Unusable("no prompt before the answer")
    return prompt, last["content"]


def _answer(value: Any, prompt: list[Message]) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value)
    head, answer = ([], messages[0]["content"]) if len(messages) == 1 else _split_answer(messages)
    if head and head != prompt:
        raise Unusable("no shared prompt")
    return answer


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"a score is {value!r}, not a number")
    return float(value)


def _list(row: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(row[field], list):
        raise TypeError(f"{field}: expected a list, got {type(row[field]).__name__}")
    return list(row[field])


def _opens_dialogue(text: str) -> bool:
    return text.lstrip("\n").startswith("Human:") and text.startswith("\n\n")


def _is_transcript(row: Mapping[str, Any]) -> bool:
    return isinstance(row["chosen"], str) and _opens_dialogue(row["chosen"])


_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")

_COLUMNS: dict[str, set[str]] = {
    "safe_rlhf": {"prompt", "response_0", "response_1"},
    "tldr_pairs": {"info", "summaries", "choice"},
    "nectar": {"prompt", "answers"},
    "ranked": {"prompt", "responses"},
    "preference": {"prompt", "chosen", "rejected"},
    "messages": {"messages"},
    "prompt": {"prompt"},
}
"""Columns that tell a format, the most particular first."""

PARSERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "prompt": _prompt,
    "messages": _chat,
    "preference": _preference,
    "hh": _hh,
    "safe_rlhf": _safe_rlhf,
    "safe_rlhf_cost": _safe_rlhf_cost,
    "tldr_pairs": _tldr_pairs,
    "nectar": _nectar,
    "ranked": _ranked,
}
