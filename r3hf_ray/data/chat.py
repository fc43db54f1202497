r"""The one place that turns dialogues into token ids, for sft, reward and ppo alike (layer 4).

A prompt is the dialogue under the tokenizer's chat template with its generation prompt; an answer is tokenised apart
from it, as a sampler would go on. What comes between the two and after the answer is read off the template.
A tokenizer without a template gets ``\n\nHuman: ...\n\nAssistant:``, then a space, the answer and EOS.

The format a reward model was trained on lies beside it (`FORMAT_FILE`); PPO lets it read that (`reward_prompts`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.messages import Message, Unusable
from r3hf_ray.errors import DataError

FORMAT_FILE = "r3hf_format.json"
_PLAIN_ROLES = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\n"}
_PROBE: Message = {"role": "user", "content": "question"}
_ANSWER = "answer"


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


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Read the format off the tokenizer's chat template.

    Raises:
        DataError: the template cannot render one question and one answer.
    """
    template = tokenizer.chat_template
    if template is None:
        return ChatFormat(None, " ", _eos(tokenizer), "")
    if not isinstance(template, str):
        raise DataError(f"{tokenizer.name_or_path}: has several chat templates; keep one in its tokenizer folder")
    try:
        prompt = render_prompt([_PROBE], tokenizer)
        whole = _apply(tokenizer, [_PROBE, Message(role="assistant", content=_ANSWER)], generation_prompt=False)
    except Unusable as error:
        raise DataError(f"{tokenizer.name_or_path}: its chat template cannot render a question: {error}") from None
    head, _, tail = whole.rpartition(_ANSWER)
    before = head.removeprefix(prompt) if head.startswith(prompt) else ""
    ending = [token for token in tokenizer.all_special_tokens if tail.lstrip().startswith(token)]
    end = max(ending, key=len, default="")
    return ChatFormat(template, before, end, tail.lstrip().removeprefix(end) if end else "")


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The dialogue as the policy reads it, up to where its answer begins.

    Raises:
        Unusable: the template refuses the dialogue (roles that do not alternate, say).
    """
    if tokenizer.chat_template is None:
        turns = [f"{_PLAIN_ROLES.get(turn['role'], _PLAIN_ROLES['user'])}{turn['content']}" for turn in messages]
        return "".join(turns) + _PLAIN_ROLES["assistant"].rstrip(" ")
    return _apply(tokenizer, messages, generation_prompt=True)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a rendered prompt. A template holds its own BOS; the plain form gets the tokenizer's."""
    if tokenizer.chat_template is not None:
        return tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(text)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def answer_ids(answer: str, form: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an answer after its prompt, with the token that ends it (once, if the text has it already).

    Raises:
        Unusable: the answer is empty.
    """
    text = answer.strip()
    text = text.removesuffix(form.end).rstrip() if form.end else text
    if not text:
        raise Unusable("empty answer")
    return tokenizer.encode(form.before + text + form.end, add_special_tokens=False)


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
    trained = _read_format(reward_model)
    if trained is not None:
        return trained
    return chat_format(reward_tokenizer) if reward_tokenizer.chat_template is not None else None


def pooling_suffix(reward_model: str, reward_tokenizer: PreTrainedTokenizerBase, setting: str) -> list[int]:
    """Token ids the reward model reads after EOS before it pools (`reward.pooling_suffix`).

    ``auto``: what its `FORMAT_FILE` says; where there is none, what its chat template puts after EOS. ``none``:
    nothing. Anything else is the text itself.
    """
    if setting == "none":
        return []
    if setting != "auto":
        return reward_tokenizer.encode(setting, add_special_tokens=False)
    trained = _read_format(reward_model)
    text = (trained or chat_format(reward_tokenizer)).suffix
    return reward_tokenizer.encode(text, add_special_tokens=False) if text else []


def _read_format(reward_model: str) -> ChatFormat | None:
    path = Path(reward_model) / FORMAT_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    names = [field.name for field in fields(ChatFormat)]
    if not isinstance(record, dict) or record.get("version") != 1 or not record.keys() >= set(names):
        raise DataError(f"{path}: is not a version 1 format file; train the reward model again with r3hf reward")
    return ChatFormat(**{name: record[name] for name in names})


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    conversation = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise Unusable(f"chat template: {error}") from None


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise DataError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its folder")
    return str(tokenizer.eos_token)
