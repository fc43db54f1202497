"""What the page of `r3hf audit` shows: verdict, settings to start with, curves, and pairs in colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.audit.advice import HALF, Advice
from r3hf_ray.instruments.audit.measures import PARTS, Audit
from r3hf_ray.instruments.pages.coloured_answers import ColouredAnswer, ColourRow, scale_of, spread_out
from r3hf_ray.instruments.pages.intervals import Estimate
from r3hf_ray.instruments.pages.parts import Check, Page, Series, Table, TableRow, Tile, estimates
from r3hf_ray.instruments.pages.texts import page_text, section
from r3hf_ray.instruments.scored_answers import Scored, r3hf_credit, scored_text
from r3hf_ray.methods import facts_of

TEXT = page_text(Path(__file__).with_suffix(".toml"))
SHOWN_PAIRS = 8
SHOWN_DOTS = 600
Pairs = Sequence[tuple[Scored, Scored]]
STATUS = {
    "likely": "signal likely",
    "weak": "weak signal",
    "unlikely": "signal unlikely",
    "none": "does not rank",
    "unknown": "too few pairs",
}
CAUTION = Check(
    "plain",
    "What pairs cannot show.",
    "They say which answer is better, never which words: run r3hf credit on text with known mistakes before you trust "
    "token rewards.",
)


def audit_page(
    audit: Audit, advice: Advice, pairs: Pairs, tokenizer: PreTrainedTokenizerBase, *, title: str, about: str
) -> Page:
    """The page of an audit."""
    settings = [
        ("reward.mode", f'"{advice.mode}"'),
        ("critic.init", f'"{advice.critic_init}"'),
        ("ppo.gae_lambda", f"{advice.gae_lambda:g}"),
    ]
    words = {
        "answers": audit.length.correlation,
        "pairs": audit.length.difference_correlation,
        "dots": f", the first {SHOWN_DOTS} of {2 * audit.pairs:,}" if 2 * audit.pairs > SHOWN_DOTS else "",
    }
    checks = [*(Check("warn", "Note.", note) for note in advice.notes), CAUTION]
    return Page(
        brand="r3hf_ray reward model audit",
        title=title,
        verdict=advice.sentence,
        status=STATUS[advice.signal],
        tone="good" if advice.signal == "likely" else "warn",
        about=about,
        tiles=_tiles(audit),
        sections=[
            section(TEXT, "start", settings=settings, reason=advice.reason, checks=checks),
            section(TEXT, "prefixes", charts=_prefix_curves(audit)),
            section(TEXT, "credit", words, charts=_credit_by_place_and_length(audit, pairs)),
            section(TEXT, "texts", answers=_coloured_pairs(pairs, tokenizer, audit)),
            section(TEXT, "numbers", tables={"all": _table(audit)}),
        ],
    )


def _coloured_pairs(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, audit: Audit) -> list[ColouredAnswer]:
    """Pairs from the clearest right ranking to the clearest wrong one, both answers coloured by r3hf."""
    margins = np.array([chosen.score - rejected.score for chosen, rejected in pairs]) / audit.score_std
    picked = spread_out(margins, SHOWN_PAIRS)
    credit = [r3hf_credit(pairs[i], audit.unit) for i in picked]
    scale = scale_of([paid for both in credit for paid in both])
    return [
        ColouredAnswer(
            label="ranked right" if margins[i] > 0 else "ranked wrong",
            facts=[("lead of the chosen answer", f"{margins[i]:+.2f} std")],
            prompt=str(tokenizer.decode(pairs[i][0].answer.prompt_ids)),
            texts=[
                scored_text(
                    answer,
                    tokenizer,
                    audit.unit,
                    title=name,
                    note=f"score {audit.unit.of(answer.score):+.2f}, {len(answer.prefix)} tokens",
                )
                for name, answer in zip(("chosen", "rejected"), pairs[i], strict=True)
            ],
            rows=[ColourRow("r3hf", facts_of("r3hf").note, paid, scale=scale, of=k) for k, paid in enumerate(both)],
        )
        for i, both in zip(picked, credit, strict=True)
    ]


def _tiles(audit: Audit) -> list[Tile]:
    half, length, ending = audit.places[HALF].agrees, audit.length, audit.ending
    return [
        _accuracy("Ranks pairs right", audit.accuracy),
        _accuracy("Already half-way", half),
        Tile(
            "Up and down",
            f"{audit.abs_credit:.1f}",
            f"sum of |token reward| an answer; {audit.noise:.1f} × a steady one",
        ),
        Tile("Credit on the end token", f"{ending.share:.0%}", f"of all; {ending.finished:.0%} of answers end"),
        Tile("Prompt's own score", f"{audit.prompt_offset:.2f}", "std over prompts, of the score's std"),
        Tile(
            "Prefers the longer answer",
            _percent(length.longer_preferred.value),
            f"people: {_percent(length.longer_chosen.value)}; score and length r = {length.correlation:.2f}",
        ),
    ]


def _accuracy(label: str, found: Estimate) -> Tile:
    tone = "good" if found.low > 0.5 else "bad"
    return Tile(label, f"{found.value:.1%}", f"95% interval {found.low:.1%} to {found.high:.1%}", tone)


def _prefix_curves(audit: Audit) -> dict[str, list[Series]]:
    places, read = audit.places, [place.read for place in audit.places]
    low, high = [place.low for place in places], [place.high for place in places]
    return {
        "ahead": [estimates("chosen ahead", read, [place.agrees for place in places])],
        "drift": [
            Series(label="change since the prompt", x=read, y=[place.drift for place in places], low=low, high=high)
        ],
        "foretelling": [
            Series(label="foretells the outcome", x=read, y=[place.foretells for place in places]),
            Series(label="spread", x=read, y=[place.spread for place in places], quiet=True),
        ],
    }


def _credit_by_place_and_length(audit: Audit, pairs: Pairs) -> dict[str, list[Series]]:
    answers = [answer for pair in pairs for answer in pair][:SHOWN_DOTS]
    places = [f"{10 * i}–{10 * i + 10}%" for i in range(PARTS)]
    shares, end_apart = [*audit.credit_by_part, audit.ending.share], [*[False] * PARTS, True]
    lengths, scores = [len(a.prefix) for a in answers], [audit.unit.of(a.score) for a in answers]
    return {
        "place": [Series(label="share", x=[*places, "end"], y=shares, marks=end_apart)],
        "length": [Series(label="answer", x=lengths, y=scores)],
    }


def _table(audit: Audit) -> Table:
    length, ending = audit.length, audit.ending
    rows = [
        ("pairs", f"{audit.pairs:,}", ""),
        ("pair accuracy", str(audit.accuracy), "ties count one half; 95% Wilson interval"),
        *(
            (f"ahead after {p.read:.0%}", str(p.agrees), f"drift {p.drift:+.2f}, spread {p.spread:.2f}")
            for p in audit.places
        ),
        ("mean and std of the score", f"{audit.score_mean:.3f}, {audit.score_std:.3f}", "the reward model's own units"),
        ("sum of |token reward|", f"{audit.abs_credit:.2f}", "mean over answers, in std of the score"),
        ("the same, of a steady walk", f"{audit.noise:.2f} ×", "1: no step is taken back later"),
        ("credit on the first token", f"{audit.first_share:.1%}", "of all"),
        (
            "credit on the end token",
            f"{ending.share:.1%}",
            f"of all; template text behind it {ending.template_share:.1%}",
        ),
        ("change at the end token", f"{ending.mean:+.2f}", "mean, in std of the score"),
        ("answers that end", f"{ending.finished:.1%}", "the others were cut"),
        ("std of R(prompt)", f"{audit.prompt_offset:.2f}", "in std of the score; Bradley-Terry never sees it"),
        ("score and length", f"{length.correlation:.2f}", "correlation over answers"),
        ("differences of both", f"{length.difference_correlation:.2f}", "correlation over pairs"),
        ("'the longer one wins'", str(length.longer_chosen), "accuracy of that rule"),
        ("prefers the longer one", str(length.longer_preferred), "the reward model"),
        ("mean length", f"{audit.mean_tokens:.1f}", "tokens of an answer"),
        ("telescoping error", f"{audit.telescoping_error:.1e}", "token rewards against R(x, y) − R(x, empty)"),
    ]
    return Table(head=["what", "value", "of what"], rows=[TableRow(row) for row in rows], styles={"of what": "meaning"})


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.0%}"
