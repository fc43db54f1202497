"""What a reward model with another tokenizer or chat template reads in place of the policy's tokens.

A prompt was rendered for both from the same dialogue, before the run; the table `Translation.prompts` says which ids
stand for which. A response travels as text: spelled by the policy's tokenizer, cut anew by the reward model's, apart
from its prompt as everywhere (`models.chat`). With one vocabulary and two templates its ids stay as they were sampled.

The reward model reads the whole response in one forward, so its tokens are those of the whole text: of a prefix alone
it might have made others. Scores are still taken only where no character to come has been read.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int32, Int64
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from r3hf_ray.algorithms.alignment import boundaries, unmapped
from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import knows_ids

UNREADABLE = "\ufffd"
"""What a decoder puts for bytes that are no character, or not yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What a `Translator` needs besides the two tokenizers; plain values, made before a run by `reward_prompts`.

    Example: ``Translation(prompts={prompt_key(ids): np.array([1, 9, 4], np.int32)}, policy_before=" ", before="",
    end_ids=(2,), max_tokens=2047)``
    """

    prompts: dict[bytes, np.ndarray]
    """`prompt_key` of a prompt in the policy's ids -> the same dialogue in the reward model's."""
    policy_before: str
    """What the policy's format puts before an answer, and so the policy samples; the reward model does not read it."""
    before: str
    """What the reward model's format puts there."""
    end_ids: tuple[int, ...]
    """What ends an answer in the reward model's format."""
    max_tokens: int
    """Longest prompt + response the reward model can read, what follows the response left out. [tokens]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retold:
    """A response of ``T`` policy tokens as the reward model reads it.

    Example, ``Oh, no <eos>`` as ``Oh|, |no|<eos>`` and as ``O|h|, no``: ``boundary=[1, 1, 2, 2], loss=1/3``.
    """

    token_ids: Int32[np.ndarray, "S"]
    """The reward model's, without the end."""
    boundary: Int64[np.ndarray, "T"]
    """Index in ``token_ids`` of the last one that has read nothing but the text up to each policy token; -1: none."""
    loss: float
    """Share of the policy's tokens, the one that ends the response apart, within which none of the reward model's ends,
    unknown ones not counted: they earn nothing, or are paid for text that it cannot read."""


class Translator:
    """Retells what the policy sampled in the reward model's tokens."""

    def __init__(
        self, translation: Translation, policy_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Take the reward model's ``tokenizer`` without its post-processor, which trims spaces off the offsets.

        Its control tokens are read in what its format puts before an answer and nowhere else: in an answer they are
        letters that the policy has written, or it could end its turn and speak as the user.

        Raises:
            ModelError: it gives no character offsets.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer gives no character offsets, which aligning it with the "
                "policy's needs; save a fast one (tokenizer.json) beside the model"
            )
        self.translation = translation
        self._name, self._unknown = tokenizer.name_or_path, tokenizer.unk_token_id
        self._decode = _decoder(policy_tokenizer)
        same_start = translation.policy_before == translation.before
        self._keeps_ids = same_start and knows_ids(tokenizer, policy_tokenizer)
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._encoder.post_processor = None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = list(special)
        control, self._before = _behind_last(special.values(), translation.before)
        self._control = self._encode(control).ids
        self._encoder.encode_special_tokens = True

    def prompt(self, token_ids: np.ndarray) -> Int32[np.ndarray, "Q"]:
        """The reward model's ids of a prompt.

        Raises:
            ModelError: it is none of the run's.
        """
        ids = self.translation.prompts.get(prompt_key(token_ids))
        if ids is None:
            raise ModelError("a prompt that was not among the run's cannot be rendered for a reward model of its own")
        return ids

    def response(self, token_ids: Sequence[int], *, finished: bool) -> Retold:
        """A response; ``finished``: its last token is an end of sequence, no text.

        Raises:
            ModelError: the reward model's tokenizer has no tokens for the text, not even an unknown one.
        """
        spoken = token_ids[:-1] if finished else token_ids
        if self._keeps_ids:
            kept = np.minimum(np.arange(len(token_ids)), len(spoken) - 1)
            return Retold(token_ids=np.asarray(spoken, np.int32), boundary=kept, loss=0.0)
        before, policy_before = self._before, self.translation.policy_before
        text, ends = spell(self._decode, spoken)
        ends = [*ends, len(text)] if finished else [*ends[:-1], len(text)]
        dropped = len(policy_before) if text.startswith(policy_before) else 0
        read, read_ends = self._continue(before + text[dropped:])
        said = np.asarray(read, np.int32)
        if self._unknown is not None:  # vocabularies of words or pieces hold control tokens among them
            said[np.isin(said, self._special)] = self._unknown
        ids = np.concatenate([np.asarray(self._control, np.int32), said])
        reader_ends = np.asarray([0] * len(self._control) + read_ends, np.int64)
        policy_ends = np.asarray(ends, np.int64) + (len(before) - dropped)
        known = ids != (-1 if self._unknown is None else self._unknown)
        lost = unmapped(boundaries(policy_ends, reader_ends[known]))[: len(spoken)]
        return Retold(
            token_ids=ids, boundary=boundaries(policy_ends, reader_ends), loss=float(lost.mean()) if len(lost) else 0.0
        )

    def _continue(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and ends of a text that goes on behind a line: of the first one of all a tokenizer may make another."""
        with suppress(ModelError):  # a vocabulary may have no token for a line's end
            line, given = self._encode("\n"), self._encode("\n" + text)
            cut = len(line.ids)
            if given.ids[:cut] == line.ids and all(end <= 1 for _, end in given.offsets[:cut]):
                return given.ids[cut:], [end - 1 for _, end in given.offsets[cut:]]
        given = self._encode(text)
        return given.ids, [end for _, end in given.offsets]

    def _encode(self, text: str) -> Encoding:
        try:
            return self._encoder.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{self._name}: its tokenizer cannot read {text!r} ({error}); use another") from error


def prompt_key(token_ids: np.ndarray) -> bytes:
    """Key of a prompt in `Translation.prompts`."""
    return token_ids.astype(np.int32).tobytes()


def spell(decode: Callable[[list[int]], str], token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a response as it grows, and how many of its characters are certain after each token.

    A character is certain once no later token can change it. The bytes of one may be spread over several tokens: what
    decodes to U+FFFD at the end of the text waits for the next token. Each token is decoded behind those that gave the
    piece of text before its own, since a decoder may treat the first token of a sequence in its own way.

    Example, a byte-level tokenizer that needs three tokens for the euro sign: ``€ 5`` -> ``("€ 5", [0, 0, 1, 2, 3])``.

    Args:
        decode: token ids to text.
        token_ids: of the response.
    """
    text, held, before = "", "", ""
    ends: list[int] = []
    start = done = 0
    for position in range(1, len(token_ids) + 1):
        now = decode(list(token_ids[start:position]))
        if not now.startswith(before):  # the new token spoils the text of those before it, which stands: go on apart
            start, before = done, ""
            now = decode(list(token_ids[start:position]))
        held = now[len(before) :]
        if held and not held.endswith(UNREADABLE):
            text += held
            start, done, held = done, position, ""
            before = decode(list(token_ids[start:done]))
        ends.append(len(text) + len(held.rstrip(UNREADABLE)))
    return text + held, ends


def _behind_last(tokens: Iterable[str], text: str) -> tuple[str, str]:
    """The text up to the last of the tokens in it, and the rest, which is to be read together with what follows."""
    cut = max((text.rfind(token) + len(token) for token in tokens if token in text), default=0)
    return text[:cut], text[cut:]


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Text without special tokens; where there is one, straight from the library below, ten times as fast."""
    if tokenizer.is_fast:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
