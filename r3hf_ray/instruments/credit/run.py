"""`r3hf credit`: load, measure, write the page and its numbers, and say the result in few lines."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r3hf_ray.errors import ConfigError
from r3hf_ray.flags import CreditFlags
from r3hf_ray.instruments.credit.marked import MarkedAnswer, Text, load_marked
from r3hf_ray.instruments.credit.marked_credit import (
    LOGPROB,
    UNTRAINED,
    blame,
    corrections_won,
    finding,
    measure_marked,
    with_marked_controls,
)
from r3hf_ray.instruments.credit.marked_page import coloured_marked_answers, marked_page
from r3hf_ray.instruments.credit.toy_credit import (
    first_advantages,
    measure_on_toy,
    requirements,
    toy_responses,
    with_toy_controls,
)
from r3hf_ray.instruments.credit.toy_page import coloured_responses, toy_page
from r3hf_ray.instruments.pages.parts import model_name
from r3hf_ray.instruments.pages.writing import write_page
from r3hf_ray.instruments.scored_answers import (
    Credit,
    Judge,
    credit_by_method,
    load_judge,
    r3hf_credit,
    reference_logprobs,
    score_answers,
    unit_of,
    untrained,
)

QA_FEEDBACK = ("dev_feedback.json", "qa_feedback.jsonl.gz", "qa_feedback.jsonl")
QA_FEEDBACK_URL = (
    "https://raw.githubusercontent.com/allenai/FineGrainedRLHF/main/tasks/qa_feedback/data/dev_feedback.json"
)


def run_credit(options: CreditFlags, console: Console) -> int:
    """Measure the credit of every method; 1 if a bar of the toy is missed, which too few responses cannot.

    Raises:
        ConfigError: a model or the data cannot be used.
    """
    judge = load_judge(options.reward_model, attention=True)
    return (_toy if options.benchmark == "toy" else _marked)(judge, options, console)


def _toy(judge: Judge, options: CreditFlags, console: Console) -> int:
    policy, count, seed = options.policy, options.limit or 400, options.seed
    responses = toy_responses(judge, policy, count=count, max_response_tokens=options.max_response_tokens, seed=seed)
    scored = score_answers(judge, [response.answer for response in responses], console=console)
    unit = unit_of(scored)
    paid = credit_by_method(judge, scored, unit)
    rows = measure_on_toy(with_toy_controls(paid, responses, seed=seed), responses)
    advantages = first_advantages(scored, responses, unit)
    bars = requirements(rows, advantages)
    coloured = coloured_responses(scored, responses, paid, judge.tokenizer, unit)
    author = f"sampled from {policy}" if policy else "by the toy's author"
    page = write_page(
        options.out,
        "credit",
        toy_page(
            rows, advantages, bars, coloured, title=model_name(judge.source), about=f"{count:,} toy responses {author}"
        ),
        {
            "reward_model": judge.source,
            "policy": policy,
            "responses": count,
            "seed": seed,
            "rows": rows,
            "first_advantages": advantages,
            "bars": bars,
        },
    )
    for row in rows:
        console.print(f"{row.method:<10} phrase AUC {row.phrase.auc}  token AUC {row.token.auc}", markup=False)
    for bar in bars:
        console.print(f"{bar.label}: {bar.sentence}", markup=False)
    console.print(f"page: {page}", markup=False)
    return 1 if any(bar.holds is False for bar in bars) else 0


def _marked(judge: Judge, options: CreditFlags, console: Console) -> int:
    source = _qa_feedback() if options.benchmark == "qa_feedback" else options.benchmark
    answers, report = load_marked(source, judge, limit=options.limit)
    console.print(report, markup=False)
    originals, count = [answer.original for answer in answers], len(answers)
    texts = [*originals, *(answer.corrected for answer in answers if answer.corrected is not None)]
    scored = score_answers(judge, [text.answer for text in texts], console=console)
    unit = unit_of(scored[:count])
    controls, totals = _controls(judge, texts, options, console)
    totals = {"reward model": [s.score for s in scored], **totals}
    paid = with_marked_controls(credit_by_method(judge, scored, unit), texts, seed=options.seed, more=controls)
    first = {method: credit[:count] for method, credit in paid.items()}
    rows = measure_marked(first, {method: credit[count:] for method, credit in paid.items()}, answers)
    amended = [answer for answer in answers if answer.corrected is not None]
    pairs = corrections_won({name: _margins(answers, values) for name, values in totals.items()}, amended)
    found, about = finding(rows), f"{count:,} marked answers of {source}"
    areas = [blame(credit, answer) for credit, answer in zip(first["r3hf"], answers, strict=True)]
    coloured = coloured_marked_answers(answers, scored[:count], first, areas, judge.tokenizer, unit)
    page = write_page(
        options.out,
        "credit",
        marked_page(rows, pairs, coloured, title=model_name(judge.source), about=about, report=report),
        {
            "reward_model": judge.source,
            "policy": options.policy,
            "data": source,
            "report": report,
            "seed": options.seed,
            "verdict": found,
            "rows": rows,
            "corrected_pairs": pairs,
        },
    )
    for row in rows:
        console.print(f"{row.method:<26} AUROC {row.auroc}  {row.auroc.count} questions", markup=False)
    console.print(f"{found.sentence}\npage: {page}", markup=False)
    return 0


def _controls(
    judge: Judge, texts: Sequence[Text], options: CreditFlags, console: Console
) -> tuple[dict[str, Credit], dict[str, list[float]]]:
    """What needs a model or a length: credit of every token, and a score of every text."""
    answers = [text.answer for text in texts]
    fresh = score_answers(untrained(judge, seed=options.seed), answers, console=console)
    unit = unit_of(fresh)
    credit = {UNTRAINED: r3hf_credit(fresh, unit)}
    totals = {UNTRAINED: [scored.score for scored in fresh]}
    if options.policy is not None:
        credit[LOGPROB] = reference_logprobs(judge, options.policy, answers, console=console)
        totals[f"{LOGPROB} a token"] = [float(logprobs.mean()) for logprobs in credit[LOGPROB]]
    totals["longer wins"] = [float(len(answer.response_ids)) for answer in answers]
    return credit, totals


def _margins(answers: Sequence[MarkedAnswer], values: Sequence[float]) -> list[float]:
    """What each corrected answer has more than its original; values are of all originals, then of all corrected."""
    before = [value for value, answer in zip(values, answers, strict=False) if answer.corrected is not None]
    return [after - first for first, after in zip(before, values[len(answers) :], strict=True)]


def _qa_feedback() -> str:
    folders = (Path(), Path("data"))
    found = next((folder / name for folder in folders for name in QA_FEEDBACK if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"qa_feedback: no {QA_FEEDBACK[0]} here or in data/; get it with `curl -O {QA_FEEDBACK_URL}` (Apache-2.0), "
            "or name a file of marked answers"
        )
    return str(found)
