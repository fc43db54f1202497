"""One record type for every shape of row, and a parser for each shape (layer 4).

A record is a dialogue up to the answer, the answers to it, and which answer was preferred to which:

| format | answers | pairs |
|---|---|---|
| ``prompt`` | the ``completion``, where there is one | none |
| ``messages`` | the last assistant turn; none where the user speaks last | none |
| ``preference``, ``hh``, ``safe_rlhf``, ``tldr_pairs``, ``arena``, ``helpsteer`` | chosen, rejected | (0, 1) |
| ``safe_rlhf_cost``, never detected | the less safe one, the safer one | (0, 1) |
| ``ranked``, ``nectar`` | all | every stated preference |

Text stays text: it is never made from a number, and a missing value is a reason to leave a row out. Columns that change
what a row means are read (`label`, ties, `system`) or are a reason too (images, tools, earlier turns elsewhere).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from r3hf_ray.data.messages import (
    ASSISTANT,
    TURN,
    blank,
    dialogue,
    messages_of,
    names_of,
    plain,
    refuse_unread,
    text_of,
    transcript,
)
from r3hf_ray.errors import DataError, Unusable
from r3hf_ray.types import Message


@dataclass(frozen=True, slots=True)
class Record:
    """A dialogue and what is known of its answers.

    Example: ``Record(prompt=[{"role": "user", "content": "Hi"}], answers=["Hello!", "No."], pairs=[(0, 1)])``
    """

    prompt: list[Message]
    answers: list[str]
    pairs: list[tuple[int, int]]
    """(preferred, other), indices into `answers`."""
    lacks: str = ""
    """Why the row says that there is no answer to imitate, or none preferred; its prompt is good all the same."""

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
    there = _usual_names(columns)
    for name, required in _COLUMNS.items():
        if required <= there.keys():
            return "hh" if name == "preference" and _is_transcript(there) else name
    known = "; ".join(f"{name}: {', '.join(sorted(required))}" for name, required in _COLUMNS.items())
    raise DataError(
        f"{source}: columns {names_of(columns)} fit no known format; rename them or set data.format ({known})"
    )


def parse(row: Mapping[str, Any], form: str) -> Record:
    """Parse one row.

    Raises:
        Unusable: a well-formed row without a shared prompt, or with something that is not read.
        DataError: a missing column or a value of another type (without the row's place, which the caller adds).
    """
    refuse_unread(row)
    try:
        record = _as_labelled(row, PARSERS[form](_with_input(row)))
        record = replace(record, prompt=_with_system(row, record.prompt))
    except KeyError as error:
        raise DataError(f"has no field {error} (data.format is {form}); there are {names_of(row)}") from None
    except (TypeError, IndexError) as error:
        raise DataError(f"is not shaped as data.format {form}: {error}") from None
    if not any(turn["content"].strip() for turn in record.prompt if turn["role"] != "system"):
        raise Unusable("empty prompt")
    return record


def _as_labelled(row: Mapping[str, Any], record: Record) -> Record:
    """Without answers that a column calls undesirable (as in data for KTO), or of which it says that none is better."""
    if record.pairs:
        return replace(record, answers=[], pairs=[], lacks=TIE) if _is_tie(row) else record
    labels = {_word(row[name]) for name in ("label", "kto_tag", "desirable") if not blank(row.get(name))}
    if not record.answers or labels <= _TRUE:
        return record
    undesired = labels <= {"false", "0", "0.0", "-1", "undesirable"}
    return replace(record, answers=[], lacks="labelled undesirable" if undesired else "label neither true nor false")


def _is_tie(row: Mapping[str, Any]) -> bool:
    if any(_word(row.get(name)) in _TRUE for name in ("is_tie", "tie")):
        return True
    if any(re.match(r"(tie|draw|both|neither)\b", _word(row.get(name))) for name in ("winner", "preference", "label")):
        return True
    return any(not blank(row.get(one)) and row[one] == row.get(other) for one, other in _SCORES)


def _with_system(row: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    system = next((row[name] for name in ("system", "system_prompt") if not blank(row.get(name))), None)
    if system is None:
        return prompt
    first = Message(role="system", content=text_of(system, "system"))
    if prompt[0]["role"] != "system":
        return [first, *prompt]
    if plain([first]) != plain(prompt[:1]):
        raise Unusable("two system prompts")
    return prompt


def _with_input(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row under its usual names; an instruction with what it is about, as Alpaca and Dolly keep them."""
    named = _usual_names(row)
    asked = named.get("prompt")
    if isinstance(asked, str) and row.get("prompt") is None:
        about = [row[name] for name in ("input", "context") if not blank(row.get(name)) and row[name] is not asked]
        named["prompt"] = "\n\n".join([asked, *(text_of(text, "input") for text in about)])
    return named


def _usual_names(row: Mapping[str, Any]) -> dict[str, Any]:
    named = dict(row)
    for name, others in _OTHER_NAMES.items():
        other = next((o for o in others if row.get(o) is not None), None)
        if other is not None and row.get(name) is None:
            named[name] = row[other]
    return named


def _prompt(row: Mapping[str, Any]) -> Record:
    prompt = messages_of(row["prompt"], "prompt")
    if row.get("completion") is None:
        return Record(prompt, [], [], NO_ANSWER)
    prompt, answer = dialogue(row["completion"], "completion", prompt)
    return Record(prompt, [answer], [])


def _chat(row: Mapping[str, Any]) -> Record:
    messages = messages_of(row["messages"], "messages")
    if messages[-1]["role"] == "user":
        return Record(messages, [], [], NO_ANSWER)
    prompt, answer = dialogue(messages, "messages", [])
    return Record(prompt, [answer], [])


def _compared(
    row: Mapping[str, Any], *, answers: tuple[str, str], preferred: Callable[[Mapping[str, Any]], int | None]
) -> Record:
    """Two answers, each with its dialogue or beside the prompt."""
    given = next((name for name in ("prompt", "conversations") if row.get(name) is not None), None)
    asked = [] if given is None else messages_of(row[given], given)
    (prompt, first), (other, second) = (dialogue(row[name], name, asked) for name in answers)
    if plain(prompt) != plain(other):
        raise Unusable("no shared prompt")
    return _of_two(prompt, [first, second], preferred(row))


def _hh(row: Mapping[str, Any]) -> Record:
    chosen, rejected = text_of(row["chosen"], "chosen"), text_of(row["rejected"], "rejected")
    head, mark, answer = chosen.rpartition(ASSISTANT)
    other_head, _, other = rejected.rpartition(ASSISTANT)
    if head != other_head:
        raise Unusable("no shared prompt")
    if not mark:
        raise Unusable("no assistant turn")
    if TURN.search(answer) or TURN.search(other):
        raise Unusable("last turn is not the assistant's")
    return _of_two(transcript(head), [answer, other], 0)


def _better(row: Mapping[str, Any]) -> int | None:
    return _choice(row["better_response_id"] if "better_response_id" in row else row["safer_response_id"])


def _less_safe(row: Mapping[str, Any]) -> int | None:
    """The less safe answer is the preferred one: a reward model trained on it scores harm, higher being worse."""
    safer = _choice(row["safer_response_id"])
    return None if safer is None else 1 - safer


def _stronger(row: Mapping[str, Any]) -> int | None:
    strength = row["preference_strength"]
    return None if blank(strength) or _number(strength) == 0 else int(_number(strength) > 0)


def _winner(row: Mapping[str, Any]) -> int | None:
    winner = re.fullmatch(r"(?:\w+[_ ])?([ab])", _word(row["winner"]))
    return None if winner is None else "ab".index(winner[1])


def _tldr_pairs(row: Mapping[str, Any]) -> Record:
    if "summaries" not in row:
        return PARSERS["preference"](row)
    info = row["info"]
    if not isinstance(info, dict):
        raise TypeError(f"info: expected an object, got {type(info).__name__}")
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
    lines = [f"{label}{text_of(info[field], field).strip()}" for label, field in parts if info.get(field)]
    if not info.get("post"):
        lines.append(f"ARTICLE: {text_of(info['article'], 'article').strip()}")
    answers = [text_of(summary["text"], "text") for summary in _list(row, "summaries")]
    if len(answers) != 2:
        raise TypeError(f"{len(answers)} summaries, not two")
    return _of_two([Message(role="user", content="\n\n".join([*lines, "TL;DR:"]))], answers, _choice(row["choice"]))


def _nectar(row: Mapping[str, Any]) -> Record:
    ranked = sorted(((_number(answer["rank"]), answer) for answer in _list(row, "answers")), key=lambda pair: pair[0])
    pairs = [(i, j) for i in range(len(ranked)) for j in range(i + 1, len(ranked)) if ranked[i][0] < ranked[j][0]]
    answers = [text_of(answer["answer"], "answer") for _, answer in ranked]
    return Record(messages_of(row["prompt"], "prompt"), answers, pairs)


def _ranked(row: Mapping[str, Any]) -> Record:
    answers = [text_of(response, "responses") for response in _list(row, "responses")]
    if row.get("pairs") is not None:
        pairs = [_pair(pair, len(answers)) for pair in _list(row, "pairs")]
    else:
        scores = [_number(score) for score in _list(row, "scores")]
        if len(scores) != len(answers):
            raise TypeError(f"{len(scores)} scores of {len(answers)} responses")
        pairs = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if scores[i] > scores[j]]
    return Record(messages_of(row["prompt"], "prompt"), answers, pairs)


def _pair(value: Any, answers: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(index not in range(answers) for index in value):
        raise TypeError(f"a pair is {value!r}, not [preferred, other] with indices into 0..{answers - 1}")
    preferred, other = value
    return int(preferred), int(other)


def _of_two(prompt: list[Message], answers: list[str], preferred: int | None) -> Record:
    if preferred is None:
        return Record(prompt, [], [], NO_PREFERENCE)
    return Record(prompt, [answers[preferred], answers[1 - preferred]], [(0, 1)])


def _number(value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise TypeError(f"a score is {value!r:.40}, not a number") from None


def _choice(value: Any) -> int | None:
    """0 or 1, as a number or as the text of a CSV file; None for anything else: no preference."""
    return {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}.get(_word(value))


def _list(row: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(row[field], list):
        raise TypeError(f"{field}: expected a list, got {type(row[field]).__name__}")
    return list(row[field])


def _word(value: Any) -> str:
    return str(value).strip().lower()


def _is_transcript(row: Mapping[str, Any]) -> bool:
    chosen = row["chosen"]
    if not isinstance(chosen, str) or row.get("prompt") is None:
        return isinstance(chosen, str)
    return bool(re.match(r"\s*Human:", chosen)) and ASSISTANT in chosen.replace("\r\n", "\n")


NO_PREFERENCE = "no preference stated"
TIE = "stated tie"
NO_ANSWER = "no answer to learn from"
_TRUE = {"true", "1", "1.0", "desirable"}
_SCORES = [
    (form.format("chosen", noun), form.format("rejected", noun))
    for noun in ("score", "rating", "reward")
    for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}")
]

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "problem", "context"),
    "completion": ("response", "output", "solution", "answer"),
    "messages": ("conversations", "conversation"),
    "response_a": ("conversation_a",),
    "response_b": ("conversation_b",),
    "response_1": ("response1",),
    "response_2": ("response2",),
    "preference_strength": ("overall_preference",),
}

_COLUMNS: dict[str, set[str]] = {
    "safe_rlhf": {"prompt", "response_0", "response_1"},
    "tldr_pairs": {"info", "summaries", "choice"},
    "nectar": {"prompt", "answers"},
    "ranked": {"prompt", "responses"},
    "helpsteer": {"prompt", "response_1", "response_2", "preference_strength"},
    "arena": {"response_a", "response_b", "winner"},
    "preference": {"chosen", "rejected"},
    "messages": {"messages"},
    "prompt": {"prompt"},
}
"""Columns that tell a format, the most particular first."""

PARSERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "prompt": _prompt,
    "messages": _chat,
    "preference": partial(_compared, answers=("chosen", "rejected"), preferred=lambda row: 0),
    "hh": _hh,
    "safe_rlhf": partial(_compared, answers=("response_0", "response_1"), preferred=_better),
    "safe_rlhf_cost": partial(_compared, answers=("response_0", "response_1"), preferred=_less_safe),
    "tldr_pairs": _tldr_pairs,
    "nectar": _nectar,
    "ranked": _ranked,
    "arena": partial(_compared, answers=("response_a", "response_b"), preferred=_winner),
    "helpsteer": partial(_compared, answers=("response_1", "response_2"), preferred=_stronger),
}
