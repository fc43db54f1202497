"""What the page of `r3hf credit` says about answers that people marked."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from r3hf_ray.instruments.pages.parts import Cell, Check, Page, Series, Table, Tile, estimates, table_of
from r3hf_ray.instruments.pages.texts import page_text, section
from r3hf_ray.instruments.scored_answers import Credit, Scored, ScoreUnit, scored_text
from r3hf_ray.methods import facts_of

TEXT = page_text(Path(__file__).with_suffix(".toml"))
SHOWN = 6
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
            section(TEXT, "found", checks=[Check("plain", "Data.", report)], charts=_areas(rows, pairs)),
            section(TEXT, "texts", answers=answers, underlines=UNDERLINES),
            section(TEXT, "numbers", tables=_tables(rows, pairs)),
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


def _areas(rows: Sequence[MarkedMeasures], pairs: Sequence[CorrectionAccuracy]) -> dict[str, list[Series]]:
    names, controls = [row.method for row in rows], [row.control for row in rows]
    main = [row for row in rows if row.method in ("r3hf", "segment", UNTRAINED, LOGPROB)]
    kinds = sorted(rows[0].by_kind, key=lambda kind: -rows[0].by_kind[kind].count)

    def by_kind(row: MarkedMeasures) -> Series:
        found = [row.by_kind[kind] for kind in kinds]
        places = [f"{kind} ({one.count})" for kind, one in zip(kinds, found, strict=True)]
        return estimates(row.method, places, found, quiet=row.control)

    ways, all_but_first = [pair.name for pair in pairs], [place > 0 for place in range(len(pairs))]
    return {
        "marks": [estimates("all marks", names, [row.auroc for row in rows], marks=controls)],
        "kinds": [by_kind(row) for row in main],
        "changes": [
            estimates("taken out", names, [row.removed for row in rows], marks=controls),
            estimates("brought in", names, [row.added for row in rows], marks=controls),
        ],
        "pairs": [estimates("accuracy", ways, [pair.accuracy for pair in pairs], marks=all_but_first)],
    }


def _tables(rows: Sequence[MarkedMeasures], pairs: Sequence[CorrectionAccuracy]) -> dict[str, Table]:
    def of_kind(kind: str) -> Callable[[MarkedMeasures], Cell]:
        return lambda row: f"{row.by_kind[kind]} ({row.by_kind[kind].count})"

    agreement = table_of(
        rows,
        [
            ("method", lambda row: row.method),
            ("AUROC", lambda row: str(row.auroc)),
            ("questions", lambda row: str(row.auroc.count)),
            ("marked − unmarked", lambda row: str(row.marked_minus_unmarked)),
            ("taken out", lambda row: str(row.removed)),
            ("brought in", lambda row: str(row.added)),
            *((kind, of_kind(kind)) for kind in rows[0].by_kind),
        ],
        quiet=lambda row: row.control,
    )
    corrected = table_of(
        pairs,
        [
            ("scored by", lambda pair: pair.name),
            ("corrected one higher", lambda pair: str(pair.accuracy)),
            ("questions", lambda pair: str(pair.accuracy.count)),
        ],
        quiet=lambda pair: pair is not pairs[0],
    )
    return {"agreement": agreement, "pairs": corrected}
