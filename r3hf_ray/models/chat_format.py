r"""How a tokenizer's chat template surrounds an answer: read off the template, and kept beside reward models.

A template that ends no answer leaves that to the data. One that asks for an answer in another place than it shows one
is refused. The format a reward model was trained on lies beside it (`FORMAT_FILE`); PPO lets it read that.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from r3hf_ray.errors import DataError, Unusable
from r3hf_ray.types import Message

FORMAT_FILE = "r3hf_format.json"
PROBE: Message = {"role": "user", "content": "question"}
ANSWER = "answer"
"""The question and the answer that a template is read with."""
_SHOWN = 60
"""Characters of a rendered text that a sentence shows."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    r"""How a tokenizer's chat template surrounds an answer.

    Example (SmolLM2): ``ChatFormat(chat_template="{% for ...", before="", end="<|im_end|>", suffix="\n")``
    """

    chat_template: str | None
    """The template's source; None: the plain form."""
    before: str
    """Text between the generation prompt and the answer."""
    end: str
    """The token that ends an answer. Empty where the template adds none: an answer then holds its own, or was cut."""
    suffix: str
    """What the template puts after `end`. Our own reward models never read it; others pool on it."""
    gap: str = ""
    """White space that the template puts between an answer and its `end`."""


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Read the format off the tokenizer's chat template.

    Raises:
        DataError: the template cannot render one question and one answer, or asks for an answer in another place than
            it shows one.
    """
    template = tokenizer.chat_template
    if template is None:
        return ChatFormat(None, " ", _eos(tokenizer), "")
    if not isinstance(template, str):
        raise DataError(f"{tokenizer.name_or_path}: has several chat templates; keep one in its tokenizer folder")
    answered = [PROBE, Message(role="assistant", content=ANSWER)]
    try:
        prompt = render(tokenizer, template, [PROBE], generation_prompt=True)
        whole = render(tokenizer, template, answered, generation_prompt=False)
    except Unusable as error:
        raise DataError(f"{tokenizer.name_or_path}: its chat template cannot render a question: {error}") from None
    head, _, tail = whole.rpartition(ANSWER)
    if not head.startswith(prompt):
        raise DataError(
            f"{tokenizer.name_or_path}: its chat template asks for an answer behind {prompt[-_SHOWN:]!r} and shows one "
            f"as {whole[-_SHOWN:]!r}, so an answer would be learned in another place than it is sampled: correct the "
            "template so that the first text begins the second (a thought that it opens must be closed, or not opened)"
        )
    gap, end = tail[: len(tail) - len(tail.lstrip())], _end(tail, tokenizer)
    suffix = tail.lstrip().removeprefix(end)
    return (
        ChatFormat(template, head.removeprefix(prompt), end, suffix, gap)
        if end
        else ChatFormat(template, head.removeprefix(prompt), "", "")
    )


def save_format(form: ChatFormat, folder: Path) -> None:
    """Write `FORMAT_FILE` beside a reward model that pools at the answer's last token, `end` included."""
    record = {"version": 1, "pooling": "last answer token", **asdict(form), "suffix": ""}
    (folder / FORMAT_FILE).write_text(json.dumps(record, indent=2) + "\n")


def trained_format(reward_model: str, reward_tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format that a reward model was trained on: what its `FORMAT_FILE` says, else its tokenizer's template.

    None: neither is there, so nothing is known of it.

    Raises:
        DataError: the file or the template cannot be used.
    """
    trained = read_format(reward_model)
    if trained is not None:
        return trained
    return chat_format(reward_tokenizer) if reward_tokenizer.chat_template is not None else None


def read_format(reward_model: str) -> ChatFormat | None:
    """What lies beside a reward model in `FORMAT_FILE`; None where there is none.

    Raises:
        DataError: it cannot be used.
    """
    path = Path(reward_model) / FORMAT_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    names = [field.name for field in fields(ChatFormat)]
    if not isinstance(record, dict) or record.get("version") != 1 or not record.keys() >= {*names} - {"gap"}:
        raise DataError(f"{path}: is not a version 1 format file; train the reward model again with r3hf reward")
    return ChatFormat(**{name: record[name] for name in names if name in record})


def _end(tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that opens what a template puts behind an answer, special or not; empty where none does."""
    given = tail.strip()
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if given.startswith(token.content)]
    if added or not given:
        return max(added, key=len, default="")
    word = given.split()[0]
    index = tokenizer.get_vocab().get(word, tokenizer.unk_token_id)
    if index == tokenizer.unk_token_id or not is_mark(word):
        return ""
    return word if index in tokenizer.encode(ANSWER + tail, add_special_tokens=False) else ""


def is_mark(token: str) -> bool:
    """Whether a token looks like one that frames text, not like a word, a space or a sign of punctuation."""
    return len(token) > 1 and not token[0].isalnum() and not token[0].isspace()


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, generation_prompt: bool
) -> str:
    """The dialogue under a chat template.

    Raises:
        Unusable: the template refuses it.
    """
    conversation = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(conversation, **options))
    except TemplateError as error:
        raise Unusable(f"chat template: {error}") from None


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its folder")
    return str(tokenizer.eos_token)
