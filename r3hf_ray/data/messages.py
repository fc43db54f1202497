"""Turns of a dialogue out of the spellings in which rows hold them (layer 4).

Text stays text: it is never made from a number, and where it is missing, or is no text, the row is left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from r3hf_ray.errors import Unusable
from r3hf_ray.types import Message


def messages_of(value: Any, field: str) -> list[Message]:
    """Messages as a list or alone (OpenAI's or ShareGPT's fields); a transcript; any other text as one user turn.

    Raises:
        Unusable: nothing there, or content that is no text (images, tool calls).
        TypeError: neither text nor messages.
    """
    if isinstance(value, Mapping):
        return [_message(value)]
    if isinstance(value, list):
        if not value:
            raise Unusable(f"nothing in {field}")
        return [_message(turn) for turn in value]
    text = text_of(value, field)
    if re.match(r"\s*Human:", text) and (text.startswith("\n\n") or ASSISTANT in text):
        return transcript(text.rstrip().removesuffix("Assistant:").rstrip())
    return [Message(role="user", content=text)]


def transcript(text: str) -> list[Message]:
    """Turns after ``Human:`` and ``Assistant:``, as HH-RLHF writes them."""
    before, *turns = TURN.split("\n\n" + text.lstrip())
    if before.strip() or not turns:
        raise Unusable("no human turn at the start")
    return [
        Message(role="user" if speaker == "Human" else "assistant", content=content.strip())
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def dialogue(value: Any, field: str, asked: Sequence[Message]) -> tuple[list[Message], str]:
    """Prompt and answer, of an answer beside its prompt (`asked`) or of a whole dialogue, which may repeat its end.

    Raises:
        Unusable: no answer at the end, or two prompts.
    """
    if isinstance(value, str) and asked:
        return list(asked), text_of(value, field)
    *head, last = messages_of(value, field)
    if last["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    shorter, longer = sorted((head or list(asked), list(asked)), key=len)
    if not longer:
        raise Unusable("no prompt before the answer")
    if shorter and plain(longer)[-len(shorter) :] != plain(shorter):
        raise Unusable("no shared prompt")
    return longer, last["content"]


def plain(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """What two dialogues are compared by: speakers and texts, but for space around them."""
    return [(turn["role"], turn["content"].strip()) for turn in messages]


def text_of(value: Any, field: str) -> str:
    r"""Text, with ``\n`` for a Windows line end.

    Raises:
        Unusable: nothing there, or text that no file could hold.
        TypeError: a number or another value that is no text.
    """
    if value is None:
        raise Unusable(f"nothing in {field}")
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected text, got {type(value).__name__} {value!r:.40}; put text in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("half a character (an unpaired surrogate)") from None
    return value.replace("\r\n", "\n")


def refuse_unread(columns: Mapping[str, Any]) -> None:
    """Leave out what says more than its text does.

    Raises:
        Unusable: a column of a row or a field of a message that changes its meaning and is not read.
    """
    for column, what in _UNREAD.items():
        if not blank(columns.get(column)) and columns[column] not in (False, "[]", "{}", "null"):
            raise Unusable(what)


def blank(value: Any) -> bool:
    """Nothing, as files and tables write that: null, empty text, an empty list, an object of nulls."""
    if isinstance(value, Mapping | list):
        return all(map(blank, value.values() if isinstance(value, Mapping) else value))
    return value is None or (isinstance(value, str) and not value.strip())


def names_of(columns: Mapping[str, Any]) -> str:
    """Columns in a sentence, whatever characters they are written in."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in map(str, columns))


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise TypeError(f"a message is {turn!r:.40}, not an object with role and content")
    refuse_unread(turn)
    if not turn.keys() & {"role", "from"} or not turn.keys() & {"content", "value"}:
        raise TypeError(f"a message has the fields {names_of(turn)}, not 'role' and 'content'")
    speaker, content = (turn[a] if turn.get(a) is not None else turn.get(b) for a, b in _FIELDS)
    role = _ROLES.get(text_of(speaker, "role").strip().lower())
    if role is None:
        raise Unusable("a turn that is not the user's, the assistant's or the system's")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise Unusable("content that is not text")
        content = "".join(text_of(part.get("text"), "content") for part in content)
    return Message(role=role, content=text_of(content, "content"))


ASSISTANT = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
_FIELDS = (("role", "from"), ("content", "value"))
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_UNREAD = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images, sound or video"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "a thought apart from the answer"),
    "history": "earlier turns in a column of their own",
}
