r"""The one place that turns dialogues into token ids, for sft, reward and ppo alike (floor 2).

A prompt is the dialogue under the tokenizer's chat template with its generation prompt. The ids of an answer are those
it has in the rendered whole, cut where its prompt ends, so that they are the ones a sampler goes on with. What comes
between the two and after the answer is read off the template. A tokenizer without a template gets
``\n\nHuman: ...\n\nAssistant:``, then a space, the answer and EOS.

Control tokens are the template's. Where a user's text spells one ("what does </s> mean?"), it stays the letters it is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from r3hf_ray.errors import Unusable
from r3hf_ray.models.chat_format import ANSWER, PROBE, ChatFormat, chat_format, is_mark, read_format, render
from r3hf_ray.types import Message

_PLAIN_ROLES = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\n"}
_LETTERS, _TOKEN = "\ufdd0{}\ufdd1", "\ufdd2{}\ufdd3"
"""What stands for the n-th control token as a user's text spells it, and for the token itself."""


@dataclass(frozen=True, slots=True)
class Prompt:
    r"""A rendered dialogue, up to where its answer begins.

    Example: ``Prompt(text="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", token_ids=[1, 4093, ...], ...)``
    """

    text: str
    token_ids: list[int]
    escaped: str
    """The text with its control tokens told from letters that spell them."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of an answer, and the characters ``[start, end)`` of the given text that each one covers.

    Example, ``" Yes"`` with an end token: ``Encoded(token_ids=[8241, 2], offsets=[(1, 4), (4, 4)])``
    """

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    """Empty where a token has no characters of the text; no entries where the tokenizer knows none."""


class Chat:
    """A tokenizer with the format of its dialogues."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: ChatFormat | None = None) -> None:
        """``form``: another one than the tokenizer's own, that a reward model was trained on.

        Raises:
            DataError: the tokenizer's template cannot be used.
        """
        self.tokenizer = tokenizer
        self.form = form or chat_format(tokenizer)
        frame = self._render([PROBE]) + self.form.before + self.form.end
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        control = {token for token, special in added.items() if special or (token in frame and is_mark(token))}
        self._control = sorted(control | {self.form.end} - {""}, key=lambda token: (-len(token), token))
        self._spelled = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The dialogue as the policy reads it, up to where its answer begins.

        A template holds its own BOS; the plain form gets the tokenizer's.

        Raises:
            Unusable: the template refuses the dialogue (roles that do not alternate, say), or has been applied to it
                before.
        """
        for turn in messages:
            self._require_bare(turn["content"], "prompt")
        escaped = self._render([{**turn, "content": self._escape(turn["content"])} for turn in messages])
        return Prompt(self._unescape(escaped), self._encode(escaped).token_ids, escaped)

    def answer(self, prompt: Prompt, text: str) -> list[int]:
        """Ids of an answer as it stands after its prompt, with the token that ends it (once, if the text has it).

        Raises:
            Unusable: the answer is empty, has been through the template already, or would change the prompt's ids.
        """
        return self.encoded_answer(prompt, text).token_ids

    def encoded_answer(self, prompt: Prompt, text: str) -> Encoded:
        """`answer`, and the characters of ``text`` that each token covers."""
        form, ends = self.form, self._ends
        body = given = text.strip()
        while body.endswith(ends):
            body = next(body.removesuffix(end) for end in ends if body.endswith(end)).rstrip()
        if not body:
            raise Unusable("empty answer")
        self._require_bare(body, "answer")
        own = given[len(body) :]  # only a format without an end leaves the answer's own in place
        tail = form.gap + form.end if form.end else own[: own.find(ends[0]) + len(ends[0])] if own else ""
        head = prompt.escaped + form.before
        both = head + self._escape(body) + tail
        whole, cut = self._encode(both), len(prompt.token_ids)
        if whole.token_ids[:cut] != prompt.token_ids:
            raise Unusable("answer whose first characters would change the tokens of its prompt")
        low = len(text) - len(text.lstrip())
        start = len(self._disguise(head) if _LETTERS[0] in both else head)
        shift, high = low - start, low + len(body)
        offsets = [(min(max(a + shift, low), high), min(max(b + shift, low), high)) for a, b in whole.offsets[cut:]]
        return Encoded(whole.token_ids[cut:], offsets)

    @property
    def end_id(self) -> int | None:
        """The token that ends an answer: the format's, else EOS."""
        end = self.form.end or self.tokenizer.eos_token
        return None if end is None else int(self.tokenizer.convert_tokens_to_ids(end))

    @property
    def end_ids(self) -> list[int]:
        """What stands behind an answer up to its end: white space that the format puts there, and `end_id`."""
        return [*self._behind("", self.form.gap), *([] if self.end_id is None else [self.end_id])]

    def suffix_ids(self, suffix: str) -> list[int]:
        """Ids of a text as it stands behind a finished answer."""
        return self._behind(self.form.gap + self.form.end, suffix)

    def _behind(self, before: str, text: str) -> list[int]:
        """Ids that ``text`` adds to a dialogue without words that ends with ``before``."""
        if not text:
            return []
        head = self._render([{**PROBE, "content": ""}]) + self.form.before + before
        start, whole = (self._encode(part).token_ids for part in (head, head + text))
        apart = whole[: len(start)] == start
        return whole[len(start) :] if apart else self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _openings(self) -> list[str]:
        """What opens a turn of the template, where that is no word of a language ("User:")."""
        if self.form.chat_template is None:
            return []
        bos = self.tokenizer.bos_token or ""
        turn, _, reply = self._render([PROBE]).partition(PROBE["content"])
        found = {turn.removeprefix(bos), reply.strip() or self.form.before}  # a template may ask for no answer
        if end := self.form.end:
            found = {opening.rpartition(end)[2] for opening in found}  # behind a system turn, or the user's end
        openings = {opening.strip() for opening in found}
        return sorted(opening for opening in openings if any(token in opening for token in self._control))

    @property
    def _ends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, (self.form.end, self.tokenizer.eos_token))))

    def _require_bare(self, text: str, kind: str) -> None:
        for opening in self._openings:
            if opening in text:
                raise Unusable(f"{kind} that is rendered already (it holds {opening!r})")

    def _render(self, messages: Sequence[Message]) -> str:
        if self.form.chat_template is None:
            turns = [f"{_PLAIN_ROLES.get(turn['role'], _PLAIN_ROLES['user'])}{turn['content']}" for turn in messages]
            return "".join(turns) + _PLAIN_ROLES["assistant"].rstrip(" ")
        return render(self.tokenizer, self.form.chat_template, messages, generation_prompt=True)

    def _escape(self, text: str) -> str:
        return self._spelled.sub(lambda found: _LETTERS.format(self._control.index(found[0])), text)

    def _unescape(self, escaped: str) -> str:
        return re.sub(_LETTERS.format(r"(\d+)"), lambda found: self._control[int(found[1])], escaped)

    def _encode(self, escaped: str) -> Encoded:
        start = self._start if self.form.chat_template is None else []
        if _LETTERS[0] in escaped:
            given = self._literal.encode(self._disguise(escaped), add_special_tokens=False)
            ids, offsets = given.ids, given.offsets
        elif self.tokenizer.is_fast:
            batch = self.tokenizer(escaped, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = batch["input_ids"], batch["offset_mapping"]
        else:
            ids, offsets = self.tokenizer.encode(escaped, add_special_tokens=False), []
        return Encoded(start + ids, offsets and [(0, 0)] * len(start) + offsets)

    def _disguise(self, escaped: str) -> str:
        """The text for `_literal`: the format's control tokens under its names, a user's letters as they were."""
        return self._unescape(self._spelled.sub(lambda found: _TOKEN.format(self._control.index(found[0])), escaped))

    @cached_property
    def _literal(self) -> Tokenizer:
        """The same tokenizer with other names for its control tokens, so that their old names are letters to it.

        Raises:
            Unusable: it is none that can be copied so.
        """
        if not self.tokenizer.is_fast:
            raise Unusable("text that spells a control token, which only a fast tokenizer reads as letters")
        names = {token: _TOKEN.format(number) for number, token in enumerate(self._control)}
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model = state["model"]
        for added in state["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): index for word, index in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(state | dict.fromkeys(("truncation", "padding", "post_processor"))))

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text, such as BOS."""
        bare, whole = (self.tokenizer.encode(ANSWER, add_special_tokens=added) for added in (False, True))
        return whole[: len(whole) - len(bare) - (whole[-1:] != bare[-1:])]


def pooling_suffix(reward_model: str, reward_tokenizer: PreTrainedTokenizerBase, setting: str) -> list[int]:
    """Token ids the reward model reads after EOS before it pools (`reward.pooling_suffix`).

    ``auto``: what its `FORMAT_FILE` says; where there is none, what its chat template puts after EOS. ``none``:
    nothing. Anything else is the text itself.
    """
    if setting == "none":
        return []
    chat = Chat(reward_tokenizer, read_format(reward_model))
    return chat.suffix_ids(chat.form.suffix if setting == "auto" else setting)
