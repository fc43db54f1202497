"""What the page of `r3hf audit` says: verdict, settings to start with, curves, and pairs in colour."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.audit.advice import HALF, Advice
from r3hf_ray.instruments.audit.measures import Audit
from r3hf_ray.instruments.pages.coloured_answers import ColouredAnswer, ColourRow, scale_of, spread_out
from r3hf_ray.instruments.pages.intervals import Estimate
from r3hf_ray.instruments.pages.parts import Chart, Check, Page, PageSection, Series, Table, TableRow, Tile, estimates
from r3hf_ray.instruments.scored_answers import Scored, r3hf_credit, scored_text
from r3hf_ray.methods import facts_of

SHOWN_PAIRS = 8
SHOWN_DOTS = 600
Pairs = Sequence[tuple[Scored, Scored]]
STATUS = {
    "likely": ("signal likely", "good"),
    "weak": ("weak signal", "warn"),
    "unlikely": ("signal unlikely", "warn"),
    "none": ("does not rank", "warn"),
    "unknown": ("too few pairs", "warn"),
}


def audit_page(
    audit: Audit, advice: Advice, pairs: Pairs, tokenizer: PreTrainedTokenizerBase, *, title: str, about: str
) -> Page:
    """The page of an audit."""
    status, tone = STATUS[advice.signal]
    settings = [
        ("reward.mode", f'"{advice.mode}"'),
        ("critic.init", f'"{advice.critic_init}"'),
        ("ppo.gae_lambda", f"{advice.gae_lambda:g}"),
    ]
    caution = Check(
        "plain",
        "What pairs cannot show.",
        "They say which answer is better, never which words: run r3hf credit on text with known mistakes before you "
        "trust token rewards.",
    )
    notes = [Check("warn", "Note.", note) for note in advice.notes]
    return Page(
        brand="r3hf_ray reward model audit",
        title=title,
        verdict=advice.sentence,
        status=status,
        tone="good" if tone == "good" else "warn",
        about=about,
        tiles=_tiles(audit),
        sections=[
            PageSection(
                id="start",
                title="What to start with",
                intro="Settings for a first run, from the numbers below. They are a start, not a proof.",
                settings=settings,
                reason=advice.reason,
                checks=[*notes, caution],
            ),
            PageSection(
                id="prefixes",
                title="Does half an answer already have a score?",
                intro="Reward models are trained on whole answers. Redistribution reads them after every token, so "
                "what they say of beginnings decides what tokens are paid. Scores are in standard deviations of the "
                "final score.",
                charts=_prefix_charts(audit),
            ),
            PageSection(
                id="credit",
                title="Where does the credit fall?",
                intro="What r3hf would pay: each token gets the change it makes in the score.",
                charts=_credit_charts(audit, pairs),
            ),
            PageSection(
                id="texts",
                title="Pairs, token by token",
                intro="From the clearest right ranking to the clearest wrong one. Blue tokens raised the score, orange "
                "ones lowered it; point at one for its numbers. The line under the words is the score of everything up "
                "to there, on one scale for both answers; the dotted line is where the prompt left it.",
                answers=_coloured_pairs(pairs, tokenizer, audit),
            ),
            PageSection(id="numbers", title="All numbers", intro="As in audit.json.", tables=[_table(audit)]),
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


def _prefix_charts(audit: Audit) -> list[Chart]:
    read = [place.read for place in audit.places]

    def chart(title: str, unit: str, sentence: str, series: Sequence[Series], reference: float | None = None) -> Chart:
        return Chart(
            title=title,
            unit=unit,
            sentence=sentence,
            kind="lines",
            series=series,
            reference=reference,
            x_title="share of the answer read",
            percent=True,
        )

    return [
        chart(
            "When is the better answer ahead?",
            "share of pairs",
            "How often the chosen answer already scores higher when this much of both has been read. At 50% the model "
            "is guessing; a line that leaves it early means that beginnings carry signal. The band is the 95% "
            "interval.",
            [estimates("chosen ahead", read, [p.agrees for p in audit.places])],
            reference=0.5,
        ),
        chart(
            "How far do scores drift?",
            "standard deviations",
            "Mean change of the score since the prompt; the band holds 80% of the answers. A drift before the end pays "
            "or charges every token for being there; a step at the end is the end token.",
            [
                Series(
                    label="change since the prompt",
                    x=read,
                    y=[p.drift for p in audit.places],
                    low=[p.low for p in audit.places],
                    high=[p.high for p in audit.places],
                )
            ],
            reference=0.0,
        ),
        chart(
            "How much does a beginning foretell?",
            "correlation, standard deviations",
            "Correlation of the change so far with the whole change, and the spread of prefix scores over answers (1 "
            "at the end). High early: the score is settled early. Spread far above 1: prefixes are scored wildly.",
            [
                Series(label="foretells the outcome", x=read, y=[p.foretells for p in audit.places]),
                Series(label="spread", x=read, y=[p.spread for p in audit.places], quiet=True),
            ],
        ),
    ]


def _credit_charts(audit: Audit, pairs: Pairs) -> list[Chart]:
    answers = [answer for pair in pairs for answer in pair][:SHOWN_DOTS]
    places = [f"{10 * i}–{10 * i + 10}%" for i in range(10)]
    return [
        Chart(
            title="Share of the credit by place",
            unit="of all |token reward|",
            sentence="Each tenth of the answers, and the end token apart (orange; it takes the template text behind it "
            "along). A tall end token means that redistribution changes little.",
            kind="bars",
            series=[
                Series(
                    label="share",
                    x=[*places, "end"],
                    y=[*audit.credit_by_part, audit.ending.share],
                    marks=[*[False] * 10, True],
                )
            ],
            x_title="place in the answer",
        ),
        Chart(
            title="Score and length",
            unit="one dot an answer",
            sentence=f"Over answers the correlation is {audit.length.correlation:.2f}; over pairs, of the differences, "
            f"it is {audit.length.difference_correlation:.2f}. A model that likes length will be given length.",
            kind="scatter",
            series=[
                Series(
                    label="answer",
                    x=[len(a.prefix) for a in answers],
                    y=[audit.unit.of(a.score) for a in answers],
                )
            ],
            x_title="tokens of the answer",
            y_title="score",
        ),
    ]


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
