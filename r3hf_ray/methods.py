"""The facts of every redistribution method, without torch; its function is in `algorithms.redistribution`.

Whoever must know what a method is like asks here and never for its name; a test holds each function to its facts. A new
method is an entry here and its function there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFacts:
    """What a method is like.

    Example, `segment`: ``MethodFacts(note="r3hf summed over spans, paid at the end of each", total="R - P_0",
    reads_prefixes=True, potential_based=True, needs=("span_ends",))``
    """

    note: str
    """What it does, for a reader who has not seen the code."""
    total: Literal["R", "R - P_0", "anything"]
    """What it pays a response in all: the score, or the score minus the prompt's."""
    reads_prefixes: bool
    """Whether the scores of prefixes matter, and not the final score only; then the reward model must be causal."""
    potential_based: bool
    """Whether a token is paid for what has happened up to it, so that at gamma = 1 the optimum and, with a critic that
    knows the potential, every advantage stay."""
    pays_shares: bool = False
    """Whether each token earns a share of the score itself, so that to centre it is to centre the score."""
    needs: tuple[Literal["attention", "span_ends"], ...] = ()
    """What its function reads besides scores and mask, by keyword."""
    mixed_by: Literal["beta_c", "abc_beta", ""] = "beta_c"
    """Field of `[reward]` that says what share of the reward it pays; empty: all of it is paid at the last token."""

    @property
    def pays_differences(self) -> bool:
        """Whether a token earns the step that the score of the prefix takes, or a span the sum of its steps."""
        return self.reads_prefixes and self.potential_based


METHODS: dict[str, MethodFacts] = {
    "r3hf": MethodFacts(
        note="each token gets the change it makes in the score",
        total="R - P_0",
        reads_prefixes=True,
        potential_based=True,
    ),
    "segment": MethodFacts(
        note="r3hf summed over sentences or other spans, paid at the end of each",
        total="R - P_0",
        reads_prefixes=True,
        potential_based=True,
        needs=("span_ends",),
    ),
    "abc": MethodFacts(
        note="parts of the score by the reward model's attention",
        total="R",
        reads_prefixes=False,
        potential_based=False,
        pays_shares=True,
        needs=("attention",),
        mixed_by="abc_beta",
    ),
    "uniform": MethodFacts(
        note="an equal part of the score for every token",
        total="R",
        reads_prefixes=False,
        potential_based=False,
        pays_shares=True,
    ),
    "terminal": MethodFacts(
        note="the whole score at the end: the ordinary sparse reward",
        total="R",
        reads_prefixes=False,
        potential_based=True,
        mixed_by="",
    ),
}
"""By the name in `reward.mode`, in the order in which they are shown."""

OWN = MethodFacts(
    note="a method of your own",
    total="anything",
    reads_prefixes=True,
    potential_based=False,
)
"""Of a user's ``package.module:function``, of which nothing is known."""


TELESCOPING_TOLERANCE = 1e-4
"""Largest relative error of what a response is paid in all; float32 gives 1e-7, a shift by one token 1e-2 and more."""


def facts_of(mode: str) -> MethodFacts:
    """The facts of a name in `METHODS`, or of a user's own function."""
    return METHODS.get(mode, OWN)


def methods_that(hold: Callable[[MethodFacts], bool]) -> str:
    """Names of the methods whose facts are so, for a sentence.

    Example: ``methods_that(lambda facts: facts.potential_based)`` is ``"r3hf, segment or terminal"``
    """
    *names, last = (name for name, facts in METHODS.items() if hold(facts))
    return f"{', '.join(names)} or {last}" if names else last
