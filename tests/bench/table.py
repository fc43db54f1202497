"""Results as tables: for the terminal, for Markdown, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import rich.table
from rich.console import Console

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
from r3hf_ray.instruments.pages.parts import Page, PageSection, Table, TableRow, Tile


def tables(results: Results) -> list[Table]:
    """In the order of reading."""
    return [_steps(results), _targets(targets(results)), _where_time_goes(results)]


def show(results: Results, console: Console) -> None:
    """Print them."""
    for table in tables(results):
        shown = rich.table.Table(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for number, name in enumerate(table.head):
            shown.add_column(name, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*map(str, row.cells))
        console.print(shown)


def page(results: Results, facts: Mapping[str, str]) -> Page:
    """The page of a benchmark: the facts of the run, then the tables."""
    judged = targets(results)
    met = sum(target.met for target in judged)
    known = [TableRow(fact) for fact in facts.items()]
    sections = [
        PageSection(
            id=f"part-{number}", title=table.title, intro=table.note, tables=[replace(table, title="", note="")]
        )
        for number, table in enumerate(tables(results))
    ]
    return Page(
        brand="r3hf_ray benchmark",
        title=f"Benchmark: {results.shape}",
        verdict=f"{met} of {len(judged)} targets are met.",
        status="targets met" if met == len(judged) else "targets missed",
        tone="good" if met == len(judged) else "warn",
        about="the system against bare loops of the same work",
        tiles=[Tile(target.what, target.measured, target.wanted, "good" if target.met else "bad") for target in judged],
        sections=[
            PageSection(
                id="facts",
                title="Facts",
                intro="",
                tables=[Table(head=["", "of this run"], rows=known, styles={"of this run": "text"})],
            ),
            *sections,
        ],
    )


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


def _steps(results: Results) -> Table:
    whole, threads = bare_sum(results.bare), bare_threads(results.bare)
    loops = {
        name: [f"bare: {name}, {threads[name]} thread(s)", f"{cost.wall:.2f}", "", f"{cost.cpu:.2f}", "", "", ""]
        for name, cost in bare_costs(results.bare).items()
    }
    parts = [loops.pop(name) for name in STEP_LOOPS]
    total = ["bare: sum", f"{whole.wall:.2f}", "1.00", f"{whole.cpu:.2f}", "", "", ""]
    systems = [_system_row(name, runs, whole.wall) for name, runs in results.systems.items()]
    tokens = [run.tokens for runs in results.systems.values() for run in runs]
    return Table(
        title="A PPO step",
        head=["", "wall s", "x bare", "CPU s", "idle cores", "lowest - highest s", "first step s"],
        rows=[TableRow(row) for row in (*parts, total, *loops.values(), *systems)],
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


def _targets(judged: Sequence[Target]) -> Table:
    return Table(
        title="Targets",
        head=["", "measured", "wanted", "met"],
        rows=[TableRow([one.what, one.measured, one.wanted, "yes" if one.met else "NO"]) for one in judged],
    )


def _where_time_goes(results: Results) -> Table:
    columns = [bare_stages(results.bare), *map(stage_seconds, results.systems.values())]
    return Table(
        title="Where the time goes",
        head=["s", "bare", *results.systems],
        rows=[
            TableRow([name, *(f"{column[name]:.3f}" if name in column else "" for column in columns)])
            for name in (*LEARNER_STAGES, REST, *WORKER_STAGES)
        ],
        note=(
            "The first rows are a learner step, one after the other; what it waits for at lag 0 is in the last three, "
            "where parallel actors add up."
        ),
    )
