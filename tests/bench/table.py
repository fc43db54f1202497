"""Results as tables: for the terminal, for Markdown, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import (
    LEARNER_STAGES,
    REST,
    STEP_LOOPS,
    WORKER_STAGES,
    Results,
    SystemRun,
    Target,
    bare_costs,
    bare_stages,
    bare_sum,
    bare_threads,
    median_of,
    stage_seconds,
    step_seconds,
    targets,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One table: a title, a header, rows of text, and what a reader must know of it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def pages(results: Results) -> list[Page]:
    """The tables of a benchmark, in the order of reading."""
    return [_steps(results), _targets(targets(results)), _where_time_goes(results)]


def show(results: Results, console: Console) -> None:
    """Print them."""
    for page in pages(results):
        table = Table(title=page.title, title_justify="left", caption=page.note, caption_justify="left")
        for number, name in enumerate(page.header):
            table.add_column(name, justify="right" if number else "left")
        for row in page.rows:
            table.add_row(*row)
        console.print(table)


def markdown(results: Results, facts: Mapping[str, str]) -> str:
    """A page for `docs/`: the facts of the run, then the tables."""
    lines = [f"# Benchmark: {results.shape}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for page in pages(results):
        lines += ["", f"## {page.title}", "", *([page.note, ""] if page.note else []), _line(page.header)]
        lines += [_line(["---", *("---:" for _ in page.header[1:])]), *map(_line, page.rows)]
    return "\n".join(lines) + "\n"


def as_json(results: Results, facts: Mapping[str, str]) -> dict[str, Any]:
    """Every number of every repeat, the medians that are shown, and the targets."""
    return {
        "facts": dict(facts),
        "targets": [asdict(target) for target in targets(results)],
        "medians": {
            "bare": {name: asdict(cost) for name, cost in bare_costs(results.bare).items()},
            "bare_sum": asdict(bare_sum(results.bare)),
            "bare_threads": bare_threads(results.bare),
            "systems": {
                name: {"step": step_seconds(runs), "cpu": median_of(runs, lambda run: run.cpu)}
                for name, runs in results.systems.items()
            },
        },
        "measured": asdict(results),
    }


def _steps(results: Results) -> Page:
    whole, threads = bare_sum(results.bare), bare_threads(results.bare)
    loops = {
        name: [f"bare: {name}, {threads[name]} thread(s)", f"{cost.wall:.2f}", "", f"{cost.cpu:.2f}", "", "", ""]
        for name, cost in bare_costs(results.bare).items()
    }
    parts = [loops.pop(name) for name in STEP_LOOPS]
    total = ["bare: sum", f"{whole.wall:.2f}", "1.00", f"{whole.cpu:.2f}", "", "", ""]
    systems = [_system_row(name, runs, whole.wall) for name, runs in results.systems.items()]
    tokens = [run.tokens for runs in results.systems.values() for run in runs]
    return Page(
        title="A PPO step",
        header=["", "wall s", "x bare", "CPU s", "idle cores", "lowest - highest s", "first step s"],
        rows=[*parts, total, *loops.values(), *systems],
        note=(
            f"Medians. {len(results.bare)} passes of the bare loops, each on its better number of threads; "
            f"{len(results.systems['lag 0'])} runs at lag 0. "
            f"Mean response: {min(tokens):.1f} to {max(tokens):.1f} tokens; bare {results.bare[-1].tokens:.1f}."
        ),
    )


def _system_row(name: str, runs: Sequence[SystemRun], bare: float) -> list[str]:
    step, every = step_seconds(runs), [second for run in runs for second in run.steps]
    return [
        f"system: {name}",
        f"{step:.2f}",
        f"{step / bare:.2f}",
        f"{median_of(runs, lambda run: run.cpu):.2f}",
        f"{median_of(runs, lambda run: run.idle):.0%}",
        f"{min(every):.2f} - {max(every):.2f}",
        f"{median_of(runs, lambda run: run.first_step):.0f}",
    ]


def _targets(judged: Sequence[Target]) -> Page:
    return Page(
        title="Targets",
        header=["", "measured", "wanted", "met"],
        rows=[[target.what, target.measured, target.wanted, "yes" if target.met else "NO"] for target in judged],
    )


def _where_time_goes(results: Results) -> Page:
    columns = [bare_stages(results.bare), *map(stage_seconds, results.systems.values())]
    return Page(
        title="Where the time goes",
        header=["s", "bare", *results.systems],
        rows=[
            [name, *(f"{column[name]:.3f}" if name in column else "" for column in columns)]
            for name in (*LEARNER_STAGES, REST, *WORKER_STAGES)
        ],
        note=(
            "The first rows are a learner step, one after the other; what it waits for at lag 0 is in the last three, "
            "where parallel actors add up."
        ),
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
