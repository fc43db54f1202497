"""What the page of `r3hf credit --benchmark toy` says."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from r3hf_ray.instruments.audit.answers import Credit, Scored
from r3hf_ray.instruments.audit.scored_text import scored_text
from r3hf_ray.instruments.credit.toy_credit import ENOUGH_RESPONSES, LAMBDAS, Bar, ToyResponse, ToyRow
from r3hf_ray.instruments.pages.coloured_answers import (
    TRUE_UNDERLINES,
    ColouredAnswer,
    colour_row,
    ending_of,
    in_order,
    known_credit_row,
    mark_of,
    scale_of,
    spread_out,
)
from r3hf_ray.instruments.pages.parts import Chart, Check, Page, PageSection, Series, Table, TableRow, Tile, estimates
from r3hf_ray.methods import facts_of

SHOWN = 6
TONES = {"met": "good", "missed": "bad", "not judged": "plain"}
Advantages = Mapping[str, Mapping[float, float]]


def toy_page(
    rows: Sequence[ToyRow],
    advantages: Advantages,
    bars: Sequence[Bar],
    answers: Sequence[ColouredAnswer],
    *,
    title: str,
    about: str,
) -> Page:
    """The page of the toy benchmark."""
    r3hf = next(row for row in rows if row.method == "r3hf")
    verdict, status = _verdict(r3hf, bars)
    dense, sparse = (advantages[arm][LAMBDAS[0]] for arm in ("r3hf, V = 0", "terminal, V = 0"))
    return Page(
        brand="r3hf_ray credit benchmark",
        title=title,
        verdict=verdict,
        status=status,
        tone="good" if status == "bars met" else "warn",
        about=about,
        tiles=[
            Tile("Phrase AUC of r3hf", f"{r3hf.phrase_auc.value:.2f}", f"0.5 is chance; {r3hf.phrase_auc}"),
            Tile("Token AUC of r3hf", f"{r3hf.token_auc.value:.2f}", "credit often lands a token early or late"),
            Tile("Phrase correlation", f"{r3hf.phrase_pearson.value:.2f}", "of r3hf with the known credit"),
            Tile(
                "First advantages",
                f"{dense:.2f}",
                f"AUC at lambda {LAMBDAS[0]:g}; sparse with a cold critic {sparse:.2f}",
            ),
        ],
        sections=[
            PageSection(
                id="bars",
                title="Does credit find what earned the reward?",
                intro="In the toy language the true worth of every word is known. A method is good if, within a "
                "response, the phrases that helped are paid more than the phrases that hurt.",
                checks=[Check(TONES[bar.label], bar.label, bar.sentence) for bar in bars],
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


def _verdict(r3hf: ToyRow, bars: Sequence[Bar]) -> tuple[str, str]:
    """In one sentence, and in two words."""
    if any(bar.holds is None for bar in bars):
        count = r3hf.phrase_auc.count
        return (
            f"Not judged: too few responses. {count} have both phrases that helped and phrases that hurt, "
            f"{ENOUGH_RESPONSES} are needed: raise --limit."
        ), "not judged"
    missed = [bar.sentence for bar in bars if not bar.holds]
    if missed:
        return f"{len(missed)} of {len(bars)} bars missed: {'; '.join(missed)}.", "bars missed"
    return (
        f"All {len(bars)} bars are met: r3hf tells phrases that helped from phrases that hurt in "
        f"{r3hf.phrase_auc.value:.0%} of the cases (50% is chance)."
    ), "bars met"


def coloured_responses(
    scored: Sequence[Scored],
    responses: Sequence[ToyResponse],
    paid: Mapping[str, Credit],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mean: float,
    std: float,
) -> list[ColouredAnswer]:
    """Responses from the best to the worst by known credit, coloured by each method and by the known credit."""
    golds = [float(response.gold.sum()) for response in responses]
    found = []
    for i in spread_out(golds, SHOWN):
        scale = scale_of(credit[i] for credit in paid.values())
        gold, answer = responses[i].gold, scored[i]
        text = scored_text(
            answer,
            tokenizer,
            mean=mean,
            std=std,
            marks=[mark_of(credit) for credit in gold.tolist()],
        )
        methods = [colour_row(method, facts_of(method).note, paid[method][i], scale=scale) for method in in_order(paid)]
        facts = [
            ("gold", f"{golds[i]:+.2f}"),
            ("score", f"{(answer.score - mean) / std:+.2f}"),
            ("tokens", str(len(gold))),
            ending_of(answer.finished),
        ]
        prompt = responses[i].request.text
        found.append(
            ColouredAnswer(label="", facts=facts, prompt=prompt, texts=[text], rows=[known_credit_row(gold), *methods])
        )
    return found


def _charts(rows: Sequence[ToyRow], advantages: Advantages) -> list[Chart]:
    names = [row.method for row in rows]
    quiet = [row.control for row in rows]
    areas = [("by phrase", [row.phrase_auc for row in rows]), ("by token", [row.token_auc for row in rows])]
    return [
        Chart(
            title="Known credit found within a response",
            unit="area under the curve",
            sentence="Chance that something that helped is paid more than something that hurt. The dashed line is "
            "chance; bars are 95% intervals over responses; controls are grey. Judge by phrase.",
            kind="dots",
            series=[estimates(label, names, means, marks=quiet) for label, means in areas],
            reference=0.5,
            y_title="area under the curve",
        ),
        Chart(
            title="The very first advantages",
            unit="area under the curve",
            sentence="What PPO would reinforce in its first step, before anything is learnt. Sparse reward with a "
            "critic loaded from the reward model is the same as r3hf with a zero critic; taking both counts it twice.",
            kind="dots",
            series=[
                Series(label=f"lambda {lam:g}", x=list(advantages), y=[found[lam] for found in advantages.values()])
                for lam in LAMBDAS
            ],
            reference=0.5,
            y_title="area under the curve",
        ),
    ]


def _tables(rows: Sequence[ToyRow], advantages: Advantages) -> list[Table]:
    return [
        Table(
            title="Agreement with the known credit",
            head=[
                "method",
                "phrase AUC",
                "token AUC",
                "phrase r",
                "token r",
                "phrase AUC, pooled",
                "token AUC, pooled",
            ],
            rows=[
                TableRow(
                    [
                        row.method,
                        *map(str, (row.phrase_auc, row.token_auc, row.phrase_pearson, row.token_pearson)),
                        f"{row.phrase_auc_pooled:.3f}",
                        f"{row.token_auc_pooled:.3f}",
                    ],
                    quiet=row.control,
                )
                for row in rows
            ],
            note="Means over responses with 95% bootstrap intervals; grey rows are controls. Pooled over responses, a "
            "method that pays all tokens of a good response alike looks as if it knew where the good tokens are.",
        ),
        Table(
            title="AUC of the first advantages, pooled over responses",
            head=["reward and critic", *(f"lambda {lam:g}" for lam in LAMBDAS)],
            rows=[TableRow([arm, *(f"{found[lam]:.3f}" for lam in LAMBDAS)]) for arm, found in advantages.items()],
        ),
    ]
