"""`r3hf audit`: load, measure, write the page and its numbers, and say the result in few lines."""

from rich.console import Console

from r3hf_ray.data.loading import load_pairs
from r3hf_ray.flags import AuditFlags
from r3hf_ray.instruments.audit.advice import advise
from r3hf_ray.instruments.audit.measures import audit_numbers
from r3hf_ray.instruments.audit.page import audit_page
from r3hf_ray.instruments.pages.parts import model_name
from r3hf_ray.instruments.pages.writing import write_page
from r3hf_ray.instruments.scored_answers import Answer, load_judge, score_answers
from r3hf_ray.sections.data import DataSection


def run_audit(options: AuditFlags, console: Console) -> int:
    """Audit a reward model on preference pairs, of lengths up to its window; 0, whatever the verdict.

    Raises:
        ConfigError: the model or the data cannot be used.
    """
    data, judge = options.data, load_judge(options.reward_model)
    any_length = data.model_copy(update={"max_prompt_tokens": judge.window})
    loaded = load_pairs(any_length, judge.tokenizer, max_tokens=judge.window)
    console.print(str(loaded.report), markup=False)
    answers = [Answer(pair.prompt_ids, ids) for pair in loaded.train for ids in (pair.chosen_ids, pair.rejected_ids)]
    scored = score_answers(judge, answers, console=console)
    judged = list(zip(scored[::2], scored[1::2], strict=True))
    audit = audit_numbers(judged)
    advice = advise(audit)
    about = f"{audit.pairs:,} pairs of {selection(data)}"
    page = write_page(
        options.out,
        "audit",
        audit_page(audit, advice, judged, judge.tokenizer, title=model_name(options.reward_model), about=about),
        {
            "reward_model": options.reward_model,
            "data": data.model_dump(exclude_defaults=True),
            "report": str(loaded.report),
            "verdict": advice,
            "audit": audit,
        },
    )
    console.print(advice.sentence, markup=False)
    for note in advice.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"page: {page}", markup=False)
    return 0


def selection(data: DataSection) -> str:
    """A data source in words, with what was set to find and read its rows.

    Example: ``PKU-Alignment/PKU-SafeRLHF (split test, format safe_rlhf_cost)``
    """
    given = data.model_dump(exclude_defaults=True, include={"config", "data_dir", "split", "format"})
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{data.source} ({words})" if words else data.source
