"""What the page of `r3hf credit --benchmark toy` says."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.credit.toy_credit import ENOUGH_RESPONSES, LAMBDAS, Requirement, ToyMeasures, ToyResponse
from r3hf_ray.instruments.pages.coloured_answers import (
    TRUE_UNDERLINES,
    ColouredAnswer,
    ending_of,
    known_credit_row,
    mark_of,
    method_rows,
    scale_of,
    spread_out,
)
from r3hf_ray.instruments.pages.parts import Check, Page, Series, Table, TableRow, Tile, estimates, table_of
from r3hf_ray.instruments.pages.texts import page_text, section
from r3hf_ray.instruments.scored_answers import Credit, Scored, ScoreUnit, scored_text

TEXT = page_text(Path(__file__).with_suffix(".toml"))
SHOWN = 6
TONES = {"met": "good", "missed": "bad", "not judged": "plain"}
Advantages = Mapping[str, Mapping[float, float]]


def toy_page(
    rows: Sequence[ToyMeasures],
    advantages: Advantages,
    required: Sequence[Requirement],
    answers: Sequence[ColouredAnswer],
    *,
    title: str,
    about: str,
) -> Page:
    """The page of the toy benchmark."""
    r3hf = next(row for row in rows if row.method == "r3hf")
    verdict, status = _verdict(r3hf, required)
    lam, (dense, sparse) = LAMBDAS[0], (advantages[arm][LAMBDAS[0]] for arm in ("r3hf, V = 0", "terminal, V = 0"))
    return Page(
        brand="r3hf_ray credit benchmark",
        title=title,
        verdict=verdict,
        status=status,
        tone="good" if status == "bars met" else "warn",
        about=about,
        tiles=[
            Tile("Phrase AUC of r3hf", f"{r3hf.phrase.auc.value:.2f}", f"0.5 is chance; {r3hf.phrase.auc}"),
            Tile("Token AUC of r3hf", f"{r3hf.token.auc.value:.2f}", "credit often lands a token early or late"),
            Tile("Phrase correlation", f"{r3hf.phrase.pearson.value:.2f}", "of r3hf with the known credit"),
            Tile("First advantages", f"{dense:.2f}", f"AUC at lambda {lam:g}; sparse with a cold critic {sparse:.2f}"),
        ],
        sections=[
            section(
                TEXT,
                "bars",
                checks=[Check(TONES[one.label], one.label, one.sentence) for one in required],
                charts=_areas(rows, advantages),
            ),
            section(TEXT, "texts", answers=answers, underlines=TRUE_UNDERLINES),
            section(TEXT, "numbers", tables=_tables(rows, advantages)),
        ],
    )


def _verdict(r3hf: ToyMeasures, bars: Sequence[Requirement]) -> tuple[str, str]:
    """In one sentence, and in two words."""
    if any(bar.holds is None for bar in bars):
        count = r3hf.phrase.auc.count
        return (
            f"Not judged: too few responses. {count} have both phrases that helped and phrases that hurt, "
            f"{ENOUGH_RESPONSES} are needed: raise --limit."
        ), "not judged"
    missed = [bar.sentence for bar in bars if not bar.holds]
    if missed:
        return f"{len(missed)} of {len(bars)} bars missed: {'; '.join(missed)}.", "bars missed"
    return (
        f"All {len(bars)} bars are met: r3hf tells phrases that helped from phrases that hurt in "
        f"{r3hf.phrase.auc.value:.0%} of the cases (50% is chance)."
    ), "bars met"


def coloured_responses(
    scored: Sequence[Scored],
    responses: Sequence[ToyResponse],
    paid: Mapping[str, Credit],
    tokenizer: PreTrainedTokenizerBase,
    unit: ScoreUnit,
) -> list[ColouredAnswer]:
    """Responses from the best to the worst by known credit, coloured by each method and by the known credit."""
    golds = [float(response.gold.sum()) for response in responses]
    found = []
    for i in spread_out(golds, SHOWN):
        scale = scale_of(credit[i] for credit in paid.values())
        gold, answer = responses[i].gold, scored[i]
        marks = [mark_of(credit) for credit in gold.tolist()]
        text = scored_text(answer, tokenizer, unit, marks=marks)
        methods = method_rows({method: credit[i] for method, credit in paid.items()}, scale=scale)
        facts = [
            ("gold", f"{golds[i]:+.2f}"),
            ("score", f"{unit.of(answer.score):+.2f}"),
            ("tokens", str(len(gold))),
            ending_of(answer.finished),
        ]
        prompt = responses[i].request.text
        found.append(
            ColouredAnswer(label="", facts=facts, prompt=prompt, texts=[text], rows=[known_credit_row(gold), *methods])
        )
    return found


def _areas(rows: Sequence[ToyMeasures], advantages: Advantages) -> dict[str, list[Series]]:
    names, controls = [row.method for row in rows], [row.control for row in rows]
    return {
        "within": [
            estimates("by phrase", names, [row.phrase.auc for row in rows], marks=controls),
            estimates("by token", names, [row.token.auc for row in rows], marks=controls),
        ],
        "first": [
            Series(label=f"lambda {lam:g}", x=list(advantages), y=[found[lam] for found in advantages.values()])
            for lam in LAMBDAS
        ],
    }


def _tables(rows: Sequence[ToyMeasures], advantages: Advantages) -> dict[str, Table]:
    agreement = table_of(
        rows,
        [
            ("method", lambda row: row.method),
            ("phrase AUC", lambda row: str(row.phrase.auc)),
            ("token AUC", lambda row: str(row.token.auc)),
            ("phrase r", lambda row: str(row.phrase.pearson)),
            ("token r", lambda row: str(row.token.pearson)),
            ("phrase AUC, pooled", lambda row: f"{row.phrase.auc_pooled:.3f}"),
            ("token AUC, pooled", lambda row: f"{row.token.auc_pooled:.3f}"),
        ],
        quiet=lambda row: row.control,
    )
    first = [TableRow([arm, *(f"{found[lam]:.3f}" for lam in LAMBDAS)]) for arm, found in advantages.items()]
    head = ["reward and critic", *(f"lambda {lam:g}" for lam in LAMBDAS)]
    return {"agreement": agreement, "first": Table(head=head, rows=first)}
