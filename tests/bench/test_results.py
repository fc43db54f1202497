"""Medians, noise and targets of made-up measurements, and the tables they become."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from bench.results import (
    LEARNER_STAGES,
    REST,
    WORKER_STAGES,
    BareStep,
    Cost,
    Results,
    SystemRun,
    bare_costs,
    bare_stages,
    bare_sum,
    bare_threads,
    noise,
    spread,
    step_seconds,
    targets,
)
from bench.table import as_json, page, show, tables
from r3hf_ray.instruments.pages.writing import markdown

LOOPS = ("generate", "score", "learn", "load weights")


def bare(walls: tuple[float, ...], cpu: float = 2.0, threads: int = 2) -> BareStep:
    costs = {name: Cost(wall=wall, cpu=cpu) for name, wall in zip(LOOPS, walls, strict=True)}
    return BareStep(threads=threads, costs=costs, stages={"time/evaluate": walls[2] / 4}, tokens=62.0)


def run(*steps: float, first: float = 30.0) -> SystemRun:
    stages = {name: 0.25 for name in (*LEARNER_STAGES, REST, *WORKER_STAGES)}
    return SystemRun(
        steps=list(steps), cpu=3.5, idle=0.125, first_step=first, stages=stages, tokens=61.5, staleness=0.0
    )


@pytest.fixture
def results() -> Results:
    """Bare loops of 0.5 + 0.25 + 1 + 0.25 = 2 s, medians of three; systems at 2.5, 2.25 and 2.5 s."""
    loops = [bare((0.5, 0.25, 1.0, 0.25)), bare((0.5, 0.25, 1.0, 0.25), cpu=3.0), bare((9.0, 0.125, 1.0, 0.25))]
    return Results(
        shape="tiny",
        overhead=1.3,
        bare=loops,
        systems={
            "lag 0": [run(2.5, 2.5, 9.0), run(2.25, 2.5, 2.75), run(2.75, first=41.0)],
            "lag 1": [run(2.25)] * 3,
            "terminal": [run(2.5)] * 3,
        },
    )


def met(results: Results) -> list[bool]:
    return [target.met for target in targets(results)]


def test_medians_are_taken_of_each_loop_and_then_summed(results: Results) -> None:
    assert bare_costs(results.bare)["generate"] == Cost(wall=0.5, cpu=2.0), "one slow pass does not count"
    assert bare_sum(results.bare) == Cost(wall=2.0, cpu=8.0)


def test_each_loop_counts_on_its_better_number_of_threads(results: Results) -> None:
    single = [bare((0.25, 0.5, 2.0, 0.25), threads=1), bare((0.25, 0.5, 0.75, 0.25), cpu=1.0, threads=1)]
    both = [*results.bare, *single]
    assert bare_threads(both) == {"generate": 1, "score": 2, "learn": 2, "load weights": 1}
    assert bare_costs(both)["generate"] == Cost(wall=0.25, cpu=1.5)
    assert bare_sum(both).wall == 0.25 + 0.25 + 1.0 + 0.25
    assert bare_stages(both)["time/evaluate"] == 0.25, "of the passes that count for learning"


def test_a_step_is_the_median_over_repeats_of_medians(results: Results) -> None:
    assert step_seconds(results.systems["lag 0"]) == 2.5
    assert step_seconds([run(1.0), run(4.0, 4.0, 1.0), run(2.0)]) == 2.0
    assert spread(results.systems["lag 0"]) == 0.25


def test_noise_is_the_larger_spread_and_never_nothing() -> None:
    calm, wild = [run(2.0), run(2.0)], [run(1.5), run(2.5)]
    assert noise(calm, wild) == noise(wild, calm) == 1.0
    assert noise(calm, calm) == pytest.approx(0.06)


def test_all_targets_met(results: Results) -> None:
    assert met(results) == [True] * 4
    assert [target.measured for target in targets(results)] == ["1.25", "-0.25 s", "+0.00 s", "41 s"]


@pytest.mark.parametrize(
    ("missed", "variant", "runs"),
    [
        ([0], "lag 0", [run(2.75), run(2.5), run(2.75)]),
        ([1], "lag 1", [run(3.0), run(3.0)]),
        ([2], "terminal", [run(2.0), run(2.0)]),
        ([2], "terminal", [run(3.0), run(3.0)]),
        ([], "terminal", [run(2.0), run(3.0)]),
        ([3], "lag 0", [run(2.5, first=20.0), run(2.5, first=60.0)]),
    ],
)
def test_each_target_can_be_missed(results: Results, missed: list[int], variant: str, runs: list[SystemRun]) -> None:
    changed = replace(results, systems={**results.systems, variant: runs})
    assert [number for number, held in enumerate(met(changed)) if not held] == missed


def test_lag_1_may_be_any_amount_faster(results: Results) -> None:
    assert met(replace(results, systems={**results.systems, "lag 1": [run(0.5)] * 3}))[1]


def test_stages_of_the_bare_loops_carry_the_systems_names(results: Results) -> None:
    stages = bare_stages(results.bare)
    assert stages == {"time/evaluate": 0.25, "time/rollout": 0.5, "time/reward": 0.25, "sync/seconds": 0.25}


def test_tables_show_what_was_measured(results: Results) -> None:
    steps, judged, stages = tables(results)
    rows = {row.cells[0]: row.cells[1:] for row in steps.rows}
    assert rows["bare: sum"][:3] == ["2.00", "1.00", "8.00"]
    assert rows["system: lag 0"] == ["2.50", "1.25", "3.50", "12%", "2.25 - 9.00", "30"]
    assert [row.cells[-1] for row in judged.rows] == ["yes"] * 4
    assert len({len(row.cells) for row in stages.rows} | {len(stages.head)}) == 1
    console = Console(record=True, width=160)
    show(results, console)
    assert "Where the time goes" in console.export_text()


def test_markdown_and_json_hold_facts_targets_and_every_number(results: Results) -> None:
    text = markdown(page(results, {"command": "`make bench`", "git commit": "0123456789ab"}))
    assert text.startswith("# Benchmark: tiny\n\n4 of 4 targets are met.\n")
    assert "| command | `make bench` |\n| git commit | 0123456789ab |\n" in text
    assert "Medians. 3 passes of the bare loops" in text
    assert "| step at lag 0 / sum of the bare loops | 1.25 | at most 1.3 | yes |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)
    read = json.loads(json.dumps(as_json(results, {"took": "300 s"})))
    assert read["measured"]["systems"]["lag 0"][0]["steps"] == [2.5, 2.5, 9.0]
    assert read["medians"]["systems"]["lag 0"] == {"step": 2.5, "cpu": 3.5}
    assert [target["met"] for target in read["targets"]] == [True] * 4
