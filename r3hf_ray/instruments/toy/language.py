"""A synthetic assistant language in which the true contribution of every token is known.

A prompt names a topic, a style to avoid and a tone: ``<bos> gardening no-slang politely :``. A response is a row of
short phrases and should end with ``<eos>``: ``gardens grow . slangy words . thanks goodbye <eos>``. `gold_credit` says
what each word is worth; their sum is the gold reward. A number sits on the word at which the outcome becomes known.

| phrase | credit |
|---|---|
| ``gardens grow .`` (a fact on the topic asked for) | +1 the first time, -0.3 repeated or untrue; -0.5 off topic |
| ``slangy words .`` (a style) | +0.5 the first time, -0.1 again, -1 when it was to be avoided |
| ``how-to weapons .`` / ``how-to safety .`` | -1.5 / +0.2 |
| ``um .`` (filler) | -0.1 |
| ``claimed-cheap .`` ... ``proven-cheap .`` | a claim 0 (-0.1 again), its proof +1, a proof without claim -0.3 |
| ``thanks goodbye <eos>`` | +1 when asked politely, -0.5 when casually; -0.5 a word that goes on after it |
| ``<eos>`` | -0.25 for each open claim, -0.5 inside a phrase |
| a broken phrase or a stray word | -0.3 |
| no ``<eos>`` | -1 on the last word |

Text without ``<eos>`` is a response that was cut at the token limit, so scorers need text with special tokens kept.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD: Final = "<pad>"
BOS: Final = "<bos>"
EOS: Final = "<eos>"
SEPARATOR: Final = ":"
STOP: Final = "."

REQUESTS: Final = ("gardening", "sailing", "baking", "astronomy")
TOPICS: Final = ("gardens", "boats", "cakes", "stars")
AVOID: Final = ("no-slang", "no-jokes", "no-rhymes")
POLITE: Final = "politely"
CASUAL: Final = "casually"
FACTS: Final = (
    "grow", "change", "age", "move", "rest", "turn", "vary", "last",
    "shine", "settle", "spread", "shrink", "open", "close", "endure", "fade",
)  # fmt: skip
STYLES: Final = ("slangy", "funny", "rhyming")
STYLE_ENDS: Final = ("words", "lines")
HOW_TO: Final = "how-to"
WEAPONS: Final = "weapons"
SAFETY: Final = "safety"
THANKS: Final = "thanks"
GOODBYE: Final = "goodbye"
FILLERS: Final = ("um", "well", "anyway", "basically")
CLAIMS: Final = ("claimed-cheap", "claimed-safe")
PROOFS: Final = ("proven-cheap", "proven-safe")

VOCABULARY: Final = (
    PAD, BOS, EOS, SEPARATOR, *REQUESTS, *TOPICS, *AVOID, POLITE, CASUAL, *FACTS, *STYLES, *STYLE_ENDS,
    HOW_TO, WEAPONS, SAFETY, THANKS, GOODBYE, *FILLERS, STOP, *CLAIMS, *PROOFS,
)  # fmt: skip
"""Word of each token id."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + ' ' + message['content'] + ' :' }}"
    "{% else %}{{ ' ' }}{% generation %}{{ message['content'] }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
"""An answer is rendered as it is: it holds its own ``<eos>``, because a cut answer must be shown without one."""

_NEXT: Final = {
    "fact": frozenset(FACTS),
    "style end": frozenset(STYLE_ENDS),
    "advice": frozenset((WEAPONS, SAFETY)),
    "goodbye": frozenset((GOODBYE,)),
    "stop": frozenset((STOP,)),
    "phrase": frozenset[str](),
}
"""The words that go on as expected; any other one begins a phrase (and breaks the open one, if there is one)."""


@dataclass(frozen=True)
class ToyRequest:
    """What a prompt asks for.

    Example: ``ToyRequest(topic=0, avoid=0, polite=True)`` is ``gardening no-slang politely``.
    """

    topic: int
    """Index into `REQUESTS` and `TOPICS`."""
    avoid: int
    """Index into `AVOID` and `STYLES`."""
    polite: bool

    @property
    def text(self) -> str:
        """The user's message."""
        return f"{REQUESTS[self.topic]} {AVOID[self.avoid]} {POLITE if self.polite else CASUAL}"


def make_request(rng: random.Random) -> ToyRequest:
    """Draw one of the 24 requests, all equally likely."""
    topic, avoid = rng.randrange(len(REQUESTS)), rng.randrange(len(AVOID))
    return ToyRequest(topic, avoid, rng.choice((True, False)))


def read_request(prompt: str) -> ToyRequest:
    """Parse a prompt, with or without the chat template's ``<bos>`` and ``:``.

    Raises:
        ValueError: the text is not a prompt of this language.
    """
    words = [word for word in prompt.split() if word not in (BOS, SEPARATOR)]
    match words:
        case [topic, avoid, tone] if topic in REQUESTS and avoid in AVOID and tone in (POLITE, CASUAL):
            return ToyRequest(REQUESTS.index(topic), AVOID.index(avoid), tone == POLITE)
    raise ValueError(f"not a toy prompt: {prompt!r}; expected words like 'gardening no-slang politely'")


def facts_in_reach(max_response_tokens: int) -> int:
    """Number of facts a topic has, in proportion to the token limit: 4, 8, 16 for 24, 48, 96 tokens."""
    return max(1, min(len(FACTS), max_response_tokens // 6))


class _Judge:
    """Reads a response word by word; knows what was said, what is open and what should come next."""

    def __init__(self, request: ToyRequest, facts: int) -> None:
        self.request = request
        self.true_facts = frozenset(FACTS[:facts])
        self.expected = "phrase"
        self.on_topic = False
        self.after_goodbye = False
        self.facts_said: set[str] = set()
        self.styles_used: set[int] = set()
        self.claims_open: set[int] = set()
        self.claims_proven: set[int] = set()

    def credit(self, word: str) -> float:
        """What the next word is worth."""
        after_goodbye, self.after_goodbye = self.after_goodbye, False
        went_on = -0.5 if after_goodbye and word != EOS else 0.0
        if word in _NEXT[self.expected]:
            return went_on + self._continue(word)
        broken = 0.0 if self.expected == "phrase" else -0.3
        if word == EOS:
            return broken + self._end(after_goodbye)
        return went_on + broken + self._begin(word)

    def _continue(self, word: str) -> float:
        place, self.expected = self.expected, "stop"
        if place == "fact" and self.on_topic:
            new = word in self.true_facts and word not in self.facts_said
            self.facts_said.add(word)
            return 1.0 if new else -0.3
        if place == "advice":
            return -1.5 if word == WEAPONS else 0.2
        if place in ("goodbye", "stop"):
            self.expected = "phrase"
            self.after_goodbye = place == "goodbye"
        return 0.0

    def _begin(self, word: str) -> float:
        self.expected = "stop"
        if word in TOPICS:
            self.expected = "fact"
            self.on_topic = TOPICS.index(word) == self.request.topic
            return 0.0 if self.on_topic else -0.5
        if word in STYLES:
            self.expected = "style end"
            return self._style(STYLES.index(word))
        if word in CLAIMS:
            return self._claim(CLAIMS.index(word))
        if word in PROOFS:
            return self._proof(PROOFS.index(word))
        if word in FILLERS:
            return -0.1
        self.expected = {HOW_TO: "advice", THANKS: "goodbye"}.get(word, "phrase")
        return -0.3 if self.expected == "phrase" else 0.0

    def _style(self, style: int) -> float:
        if style == self.request.avoid:
            return -1.0
        again = style in self.styles_used
        self.styles_used.add(style)
        return -0.1 if again else 0.5

    def _claim(self, claim: int) -> float:
        again = claim in self.claims_open or claim in self.claims_proven
        if not again:
            self.claims_open.add(claim)
        return -0.1 if again else 0.0

    def _proof(self, claim: int) -> float:
        if claim not in self.claims_open:
            return -0.3
        self.claims_open.discard(claim)
        self.claims_proven.add(claim)
        return 1.0

    def _end(self, after_goodbye: bool) -> float:
        credit = -0.25 * len(self.claims_open)
        if self.expected != "phrase":
            credit -= 0.5
        if after_goodbye:
            credit += 1.0 if self.request.polite else -0.5
        return credit


def gold_credit(prompt: str, response: str, *, max_response_tokens: int = 48) -> list[float]:
    """True credit of every word of a response, ``<eos>`` included.

    Args:
        prompt: the user's message or the rendered prompt.
        response: words joined by spaces, ``<eos>`` kept; without it the response was cut at the limit.
        max_response_tokens: the token limit; it decides how many facts a topic has.

    Returns:
        One number a word, 0 after the first ``<eos>``; empty for an empty response.

    Raises:
        ValueError: the prompt is not of this language.

    Example: ``gold_credit("gardening no-slang politely", "gardens grow . <eos>") == [0, 1, 0, 0]``
    """
    words = response.split()
    end = words.index(EOS) + 1 if EOS in words else len(words)
    judge = _Judge(read_request(prompt), facts_in_reach(max_response_tokens))
    credit = [judge.credit(word) for word in words[:end]]
    if words and EOS not in words:
        credit[-1] -= 1.0
    return credit + [0.0] * (len(words) - end)


def gold_reward(prompt: str, response: str, *, max_response_tokens: int = 48) -> float:
    """Sum of `gold_credit`; as ``reward.gold = "r3hf_ray.instruments.toy.language:gold_reward"`` for 48 tokens."""
    return sum(gold_credit(prompt, response, max_response_tokens=max_response_tokens), 0.0)


gold_reward_24 = partial(gold_reward, max_response_tokens=24)
"""`gold_reward` of the world with responses of 24 tokens."""
gold_reward_96 = partial(gold_reward, max_response_tokens=96)
"""`gold_reward` of the world with responses of 96 tokens."""


def token_credit(prompt: str, tokens: Sequence[str], *, max_response_tokens: int = 48) -> list[float]:
    """`gold_credit` of a response given as tokens, of which each is one word: for ``reward.gold_credit``."""
    return gold_credit(prompt, " ".join(tokens), max_response_tokens=max_response_tokens)


token_credit_24 = partial(token_credit, max_response_tokens=24)
"""`token_credit` of the world with responses of 24 tokens."""
token_credit_96 = partial(token_credit, max_response_tokens=96)
"""`token_credit` of the world with responses of 96 tokens."""


def phrase_ids(response: str) -> list[int]:
    """Phrase of each word, from 0: a phrase ends with ``.`` or ``goodbye``, and ``<eos>`` is one of its own.

    Credit often lands a word early or late, so it is better judged by phrase than by word.
    """
    ids, phrase, closed = [], 0, False
    for place, word in enumerate(response.split()):
        phrase += place > 0 and (closed or word == EOS)
        closed = word in (STOP, GOODBYE, EOS)
        ids.append(phrase)
    return ids


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: ids are the places in `VOCABULARY`; words are joined by spaces; pad, bos and eos differ."""
    words = Tokenizer(WordLevel({word: token_id for token_id, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
