"""What the page of `r3hf credit` says about answers that people marked."""

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.credit.marked import MarkedAnswer, marked_characters
from r3hf_ray.instruments.credit.marked_credit import (
    CONTROLS,
    LOGPROB,
    UNTRAINED,
    CorrectionAccuracy,
    MarkedMeasures,
    finding,
)
from r3hf_ray.instruments.pages.coloured_answers import (
    ColouredAnswer,
    ColourRow,
    in_order,
    scale_of,
    spread_out,
)
from r3hf_ray.instruments.pages.intervals import Estimate
from r3hf_ray.instruments.pages.parts import (
    Chart,
    Check,
    Page,
    PageSection,
    Series,
    Table,
    TableRow,
    Tile,
    area_chart,
    estimates,
)
from r3hf_ray.instruments.scored_answers import Credit, Scored, ScoreUnit, scored_text
from r3hf_ray.methods import facts_of

SHOWN = 6
OF_MINUS_CREDIT = "AUROC of minus credit"
UNDERLINES = {"minus-mark": "people marked it as wrong"}
CONTROL_NOTES = {
    LOGPROB: "how likely the policy finds each token",
    UNTRAINED: "r3hf by a model of this shape with random weights",
}


def marked_page(
    rows: Sequence[MarkedMeasures],
    pairs: Sequence[CorrectionAccuracy],
    answers: Sequence[ColouredAnswer],
    *,
    title: str,
    about: str,
    report: str,
) -> Page:
    """The page of a benchmark on marked answers."""
    best = max((row for row in rows if not row.control), key=lambda row: np.nan_to_num(row.auroc.value))
    verdict = finding(rows)
    return Page(
        brand="r3hf_ray credit benchmark",
        title=title,
        verdict=verdict.sentence,
        status=verdict.status,
        tone="good" if verdict.good else "warn",
        about=about,
        tiles=[
            Tile("Best method", best.method, f"AUROC {best.auroc} over {best.auroc.count} questions"),
            Tile("Marked less unmarked", f"{best.marked_minus_unmarked.value:+.2f}", "credit in std; below 0 is right"),
            *(
                Tile(f"Corrected beats original: {pair.name}", f"{pair.accuracy.value:.0%}", str(pair.accuracy))
                for pair in pairs[:2]
            ),
        ],
        sections=[
            PageSection(
                id="found",
                title="Does credit find what people found wrong?",
                intro="People marked the wrong parts of these answers. A method is good if, within an answer, marked "
                "characters are paid less than unmarked ones. Each token's reward is shared out to its characters; the "
                "end token has none.",
                checks=[Check("plain", "Data.", report)],
                charts=_charts(rows, pairs),
            ),
            PageSection(
                id="texts",
                title="The same answer, paid by each method",
                intro="From the answer where r3hf finds the marks best to where it finds them worst. Each row pays the "
                "same words by another method: blue words earned, orange ones lost, on one scale for all methods of "
                "an answer (controls have their own). Dashed underlines are what people marked: where orange meets an "
                "underline, credit is right. The line under the words is the reward model's score of everything up to "
                "there. Point at a word for its numbers.",
                answers=answers,
                underlines=UNDERLINES,
            ),
            PageSection(id="numbers", title="All numbers", intro="As in credit.json.", tables=_tables(rows, pairs)),
        ],
    )


def coloured_marked_answers(
    answers: Sequence[MarkedAnswer],
    scored: Sequence[Scored],
    paid: Mapping[str, Credit],
    blame: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    unit: ScoreUnit,
) -> list[ColouredAnswer]:
    """Answers from where r3hf finds the marks best to where it finds them worst, coloured by each method.

    Args:
        answers: the marked answers.
        scored: the same, scored.
        paid: credit by method.
        blame: for each answer the area of r3hf; NaN where it has only one sort of text.
        tokenizer: of the reward model.
        unit: of all credit.
    """
    shown = {n: paid[n] for n in in_order(paid) if n not in CONTROLS or n in CONTROL_NOTES}
    notes = {**CONTROL_NOTES, "segment": "r3hf summed over sentences, shown shared over each"}
    coloured = {name: _about_mean(credit) if name == LOGPROB else credit for name, credit in shown.items()}
    known = [i for i, area in enumerate(blame) if not np.isnan(area)]
    known = [i for i in known if 0.15 < _marked_share(answers[i]) < 0.85] or known
    found = []
    for i in (known[k] for k in spread_out([blame[i] for i in known], SHOWN)):
        kinds = _kinds(answers[i])
        tags = ["" if t and kinds[t - 1] == kind else kind for t, kind in enumerate(kinds)]
        marks = [-1 if kind else 0 for kind in kinds]
        text = scored_text(scored[i], tokenizer, unit, marks=marks, words=kinds, tags=tags)
        scale = scale_of(credit[i] for name, credit in coloured.items() if name not in CONTROL_NOTES)
        score = f"{unit.of(scored[i].score):+.2f}"
        found.append(
            ColouredAnswer(
                label=f"row {answers[i].row}",
                facts=[("AUROC of r3hf", f"{blame[i]:.2f}"), ("score", score)],
                prompt=answers[i].question,
                texts=[text],
                rows=[
                    ColourRow("what people marked", "and what for", None, scale=1.0, tagged=True),
                    *(
                        ColourRow(
                            name,
                            notes.get(name) or facts_of(name).note,
                            credit[i],
                            scale=scale_of([credit[i]]) if name in CONTROL_NOTES else scale,
                            summed=name != LOGPROB,
                        )
                        for name, credit in coloured.items()
                    ),
                ],
            )
        )
    return found


def _marked_share(answer: MarkedAnswer) -> float:
    return float(marked_characters(answer.original.text, answer.spans).mean())


def _about_mean(credit: Credit) -> Credit:
    """Log-probabilities are all negative; about their mean, unlikely tokens are orange."""
    return [paid - paid.mean() for paid in credit]


def _kinds(answer: MarkedAnswer) -> list[str]:
    """For each token the kind of the first mark that it touches, or nothing."""
    return [
        next((span.kind for span in answer.spans if start < span.end and end > span.start and end > start), "")
        for start, end in answer.original.offsets
    ]


def _series(label: str, rows: Sequence[MarkedMeasures], values: Sequence[Estimate]) -> Series:
    return estimates(label, [row.method for row in rows], values, marks=[row.control for row in rows])


def _charts(rows: Sequence[MarkedMeasures], pairs: Sequence[CorrectionAccuracy]) -> list[Chart]:
    main = [row for row in rows if row.method in ("r3hf", "segment", UNTRAINED, LOGPROB)]
    kinds = sorted(rows[0].by_kind, key=lambda kind: -rows[0].by_kind[kind].count)
    return [
        area_chart(
            "Marked characters are paid less",
            "Chance that a marked character is paid less than an unmarked one of the same answer. The dashed "
            "line is chance; bars are 95% bootstrap intervals over questions; controls are grey.",
            [_series("all marks", rows, [row.auroc for row in rows])],
            unit=OF_MINUS_CREDIT,
        ),
        area_chart(
            "By kind of mark",
            "One kind of mark against unmarked text. Kinds with few answers have wide intervals.",
            [
                estimates(
                    row.method,
                    [f"{kind} ({row.by_kind[kind].count})" for kind in kinds],
                    [row.by_kind[kind] for kind in kinds],
                    quiet=row.control,
                )
                for row in main
            ],
            unit=OF_MINUS_CREDIT,
        ),
        area_chart(
            "Credit at what the correction changed",
            "Words that the correction took out should be paid less than what it kept, and words that it "
            "brought in should be paid more than the rest of the corrected answer.",
            [
                _series("taken out", rows, [row.removed for row in rows]),
                _series("brought in", rows, [row.added for row in rows]),
            ],
        ),
        area_chart(
            "Is the corrected answer scored higher?",
            "Whole answers: how often the corrected one beats the original, by the reward model and "
            "by controls. Bars are 95% bootstrap intervals over questions; one without width says only that all agree.",
            [
                estimates(
                    "accuracy",
                    [pair.name for pair in pairs],
                    [pair.accuracy for pair in pairs],
                    marks=[k > 0 for k in range(len(pairs))],
                )
            ],
            unit="share of pairs",
        ),
    ]


def _tables(rows: Sequence[MarkedMeasures], pairs: Sequence[CorrectionAccuracy]) -> list[Table]:
    kinds = list(rows[0].by_kind)
    return [
        Table(
            title="Agreement with people's marks",
            head=["method", "AUROC", "questions", "marked − unmarked", "taken out", "brought in", *kinds],
            rows=[
                TableRow(
                    [
                        *(row.method, str(row.auroc), str(row.auroc.count)),
                        *(str(row.marked_minus_unmarked), str(row.removed), str(row.added)),
                        *(f"{row.by_kind[kind]} ({row.by_kind[kind].count})" for kind in kinds),
                    ],
                    quiet=row.control,
                )
                for row in rows
            ],
            note="AUROC of minus credit within an answer, mean over questions with 95% bootstrap intervals; 0.5 is "
            "chance. Marked − unmarked: mean credit of marked less that of unmarked stretches, in standard deviations "
            "within the answer; negative is right. Grey rows are controls; the place in the answer is one in both "
            "directions.",
        ),
        Table(
            title="Corrected against original answers",
            head=["scored by", "corrected one higher", "questions"],
            rows=[TableRow([p.name, str(p.accuracy), str(p.accuracy.count)], quiet=k > 0) for k, p in enumerate(pairs)],
            note="Share of pairs, mean over questions with 95% bootstrap intervals; a tie counts one half.",
        ),
    ]
