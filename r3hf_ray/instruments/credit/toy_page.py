"""What the page of `r3hf credit --benchmark toy` says."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.credit.toy_credit import ENOUGH_RESPONSES, LAMBDAS, Requirement, ToyMeasures, ToyResponse
from r3hf_ray.instruments.pages.coloured_answers import (
    TRUE_UNDERLINES,
    ColouredAnswer,
    ColourRow,
    ending_of,
    in_order,
    known_credit_row,
    mark_of,
    scale_of,
    spread_out,
)
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
            PageSection(
                id="bars",
                title="Does credit find what earned the reward?",
                intro="In the toy language the true worth of every word is known. A method is good if, within a "
                "response, the phrases that helped are paid more than the phrases that hurt.",
                checks=[Check(TONES[one.label], one.label, one.sentence) for one in required],
                charts=_charts(rows, advantages),
            ),
            PageSection(
                id="texts",
                title="The same response, paid by each method",
                intro="From the best response to the worst. Each row pays the same words by another method: blue words "
                "earned, orange ones lost, on one scale for all methods of a response. Underlines are the truth: where "
                "colour and underline agree, credit is right. The line under the words is the reward model's score of "
                "everything up to there. Point at a word for its numbers.",
                answers=answers,
                underlines=TRUE_UNDERLINES,
            ),
            PageSection(
                id="numbers", title="All numbers", intro="As in credit.json.", tables=_tables(rows, advantages)
            ),
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
        methods = [ColourRow(method, facts_of(method).note, paid[method][i], scale=scale) for method in in_order(paid)]
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


def _charts(rows: Sequence[ToyMeasures], advantages: Advantages) -> list[Chart]:
    names, controls = [row.method for row in rows], [row.control for row in rows]
    return [
        area_chart(
            "Known credit found within a response",
            "Chance that something that helped is paid more than something that hurt. The dashed line is "
            "chance; bars are 95% intervals over responses; controls are grey. Judge by phrase.",
            [
                estimates("by phrase", names, [row.phrase.auc for row in rows], marks=controls),
                estimates("by token", names, [row.token.auc for row in rows], marks=controls),
            ],
        ),
        area_chart(
            "The very first advantages",
            "What PPO would reinforce in its first step, before anything is learnt. Sparse reward with a "
            "critic loaded from the reward model is the same as r3hf with a zero critic; taking both counts it twice.",
            [
                Series(label=f"lambda {lam:g}", x=list(advantages), y=[found[lam] for found in advantages.values()])
                for lam in LAMBDAS
            ],
        ),
    ]


def _tables(rows: Sequence[ToyMeasures], advantages: Advantages) -> list[Table]:
    def cells(row: ToyMeasures) -> list[str]:
        sides = (row.phrase, row.token)
        within = [str(value) for value in (*(side.auc for side in sides), *(side.pearson for side in sides))]
        return [row.method, *within, *(f"{side.auc_pooled:.3f}" for side in sides)]

    return [
        Table(
            title="Agreement with the known credit",
            head=["method"]
            + [f"{side} {what}" for what in ("AUC", "r", "AUC, pooled") for side in ("phrase", "token")],
            rows=[TableRow(cells(row), quiet=row.control) for row in rows],
            note="Means over responses with 95% bootstrap intervals; grey rows are controls. Pooled over responses, a "
            "method that pays all tokens of a good response alike looks as if it knew where the good tokens are.",
        ),
        Table(
            title="AUC of the first advantages, pooled over responses",
            head=["reward and critic", *(f"lambda {lam:g}" for lam in LAMBDAS)],
            rows=[TableRow([arm, *(f"{found[lam]:.3f}" for lam in LAMBDAS)]) for arm, found in advantages.items()],
        ),
    ]
