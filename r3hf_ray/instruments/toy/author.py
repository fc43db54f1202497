"""The mediocre author whose texts the toy policy imitates and whose answers the toy reward model compares."""

import random

from r3hf_ray.instruments.toy.language import (
    CLAIMS,
    EOS,
    FACTS,
    FILLERS,
    GOODBYE,
    HOW_TO,
    PROOFS,
    SAFETY,
    STOP,
    STYLE_ENDS,
    STYLES,
    THANKS,
    TOPICS,
    WEAPONS,
    ToyRequest,
    facts_in_reach,
)


class _Author:
    """A mediocre author: `quality` tilts on or off topic and how often it remembers what it already said."""

    def __init__(self, request: ToyRequest, facts: int, rng: random.Random) -> None:
        self.request, self.facts, self.rng = request, facts, rng
        self.quality = rng.random()
        self.facts_said: set[int] = set()
        self.claims_open: set[int] = set()

    def remembers(self) -> bool:
        return self.rng.random() < 0.8 * self.quality

    def phrase(self) -> list[str]:
        draw = self.rng.random()
        if draw < 0.50:
            return self.fact()
        if draw < 0.64:
            return self.style()
        if draw < 0.72:
            return [HOW_TO, WEAPONS if self.rng.random() < 0.6 - 0.4 * self.quality else SAFETY, STOP]
        if draw < 0.80:
            return [FILLERS[self.rng.randrange(len(FILLERS))], STOP]
        return self.claim_or_proof() if draw < 0.97 else [THANKS, GOODBYE]

    def fact(self) -> list[str]:
        on_topic = self.rng.random() < 0.3 + 0.6 * self.quality
        topic = self.request.topic if on_topic else self.rng.randrange(len(TOPICS))
        unsaid = [fact for fact in range(self.facts) if fact not in self.facts_said]
        fact = self.rng.choice(unsaid) if unsaid and self.remembers() else self.rng.randrange(self.facts)
        self.facts_said.add(fact)
        return [TOPICS[topic], FACTS[fact], STOP]

    def style(self) -> list[str]:
        allowed = [style for style in range(len(STYLES)) if style != self.request.avoid]
        style = self.rng.choice(allowed) if self.remembers() else self.rng.randrange(len(STYLES))
        return [STYLES[style], STYLE_ENDS[self.rng.randrange(len(STYLE_ENDS))], STOP]

    def claim_or_proof(self) -> list[str]:
        claim = self.rng.randrange(len(CLAIMS))
        if self.claims_open and self.remembers():
            return [PROOFS[self.claims_open.pop()], STOP]
        if self.rng.random() < 0.5:
            self.claims_open.add(claim)
            return [CLAIMS[claim], STOP]
        self.claims_open.discard(claim)
        return [PROOFS[claim], STOP]

    def closes(self) -> bool:
        return self.rng.random() < (0.2 + 0.5 * self.quality if self.request.polite else 0.4)


def noisy_response(request: ToyRequest, max_response_tokens: int, rng: random.Random) -> str:
    """Write a mediocre response; one that reaches the token limit is cut there and has no ``<eos>``."""
    author = _Author(request, facts_in_reach(max_response_tokens), rng)
    length = int(max_response_tokens * rng.uniform(0.35, 1.15))
    words: list[str] = []
    while len(words) < length:
        words += author.phrase()
    if author.closes():
        words += [THANKS, GOODBYE]
    return " ".join([*words, EOS][:max_response_tokens])
