"""`r3hf compare`: every arm with every seed through `run_ppo`, one after another, then the page and the table.

Nothing is done twice: a finished run is only read, an interrupted one goes on from its last checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from r3hf_ray.config import PPOConfig
from r3hf_ray.driver import run_ppo
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.compare.arm_runs import MeasuredRun, PlannedRun, is_finished, outcome_of, read_run
from r3hf_ray.instruments.compare.baselines import lacking
from r3hf_ray.instruments.compare.comparison_page import write_comparison
from r3hf_ray.instruments.compare.expectations import results_of
from r3hf_ray.instruments.compare.schedules import Schedule, check_schedules, parse_schedule
from r3hf_ray.instruments.compare.screening import check_in_process, screened
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.instruments.report.report import write_report
from r3hf_ray.instruments.toy.trained_models import ToyModels
from r3hf_ray.preflight import with_absolute_models
from r3hf_ray.records.jsonl import JsonlLog, read_jsonl
from r3hf_ray.records.run_folder import PPO_MAY_CHANGE, check_run
from r3hf_ray.session import ray_session
from r3hf_ray.settings import load

EVENTS = "comparison.jsonl"
"""What became of each run at each call, in the comparison's folder."""


def compare(config: CompareConfig, *, only: Sequence[str], report_only: bool, console: Console) -> int:
    """Run what is missing and write ``comparison.html``, ``.md`` and ``.json`` into `run.folder/run.name`.

    Args:
        config: of the comparison.
        only: names of arms to run; empty: all. The page shows every arm there is.
        report_only: run nothing.
        console: for progress.

    Returns:
        1 if a run failed in this call, else 0; a missed expectation is a result, not a failure.

    Raises:
        ConfigError: the comparison, its job or an arm's settings cannot be used, or what it has done so far was done
            with others; nothing was started.
        RunFailed: the shared models could not be trained.
    """
    plan = plan_runs(config)
    unknown = sorted(set(only) - {arm.name for arm in config.arms})
    if unknown:
        names = ", ".join(arm.name for arm in config.arms)
        raise ConfigError(f"--only: no arm is called {', '.join(unknown)}; there are {names}")
    if config.toy:
        ToyModels(config.toy, config.root).check()
    for run in plan:
        check_finished(config, run)
    chosen = [run for run in plan if not only or run.arm in only]
    failed = [] if report_only else _run_missing(config, chosen, plan, console)
    page = write_results(config, plan, console)
    console.print(f"page: {page}", markup=False)
    for run in failed:
        console.print(f"failed: {run.folder.name} (see {config.root / EVENTS})", markup=False)
    return 1 if failed else 0


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """Every run with its whole configuration: all arms of the first seed, then of the next.

    So a comparison that is stopped early has something of every arm.

    Raises:
        ConfigError: an arm's settings are not those of `r3hf ppo`.
    """
    root = str(config.root)
    shared = [*(ToyModels(config.toy, config.root).overrides() if config.toy else ()), *config.compare.overrides]
    longest = max(len(config.seeds_of(arm)) for arm in config.arms)
    places = [(arm, place) for place in range(longest) for arm in config.arms if place < len(config.seeds_of(arm))]
    runs = []
    for arm, place in places:
        seed = config.seeds_of(arm)[place]
        own = ["--run.folder", root, "--run.name", f"{arm.name}-s{seed}", "--run.seed", str(seed)]
        own += [word.replace("{folder}", root) for word in (*shared, *arm.overrides)]
        try:
            ppo = load(PPOConfig, config.compare.job, own)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None
        ppo = with_absolute_models(ppo)  # as a run's config.toml has it
        schedules = tuple(map(parse_schedule, arm.schedules))
        _check_arm(config, arm.name, ppo, schedules)
        runs.append(PlannedRun(arm=arm.name, seed=seed, config=ppo, schedules=schedules))
    return runs


def read_runs(config: CompareConfig, plan: Sequence[PlannedRun]) -> list[MeasuredRun]:
    """The runs as their folders show them; a run that could not even begin has its reason from an earlier call."""
    last = {(event["arm"], event["seed"]): event for event in read_jsonl(config.root / EVENTS)}
    runs = []
    for planned in plan:
        run, event = read_run(planned, config.compare), last.get((planned.arm, planned.seed), {})
        if run.status in ("not run", "unfinished") and event.get("event") == "failed":
            run = replace(run, status="failed", reason=str(event["reason"]))
        runs.append(run)
    return runs


def write_results(config: CompareConfig, plan: Sequence[PlannedRun], console: Console) -> Path:
    """Write page, table and numbers from what the folders hold, and say what became of the expectations."""
    results = results_of(config, read_runs(config, plan), lacking(plan))
    page = write_comparison(config.root, results)
    for one in results.expectations:
        console.print(f"{one.verdict}: {one.sentence}: {one.found}", markup=False)
    return page


def _run_missing(
    config: CompareConfig, chosen: Sequence[PlannedRun], plan: Sequence[PlannedRun], console: Console
) -> list[PlannedRun]:
    """Run what has not finished; returns what failed. The page is written again after every run."""
    waiting = [run for run in chosen if not is_finished(run)]
    console.print(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are finished; {len(waiting)} to go")
    failed: list[PlannedRun] = []
    if not waiting:
        return failed
    with JsonlLog(config.root / EVENTS) as events:
        for run, outcome in _outcomes(config, waiting, console):
            events.write({"arm": run.arm, "seed": run.seed, **outcome})
            if outcome["event"] == "failed":
                failed.append(run)
                console.print(f"failed: {outcome['reason']}; going on with the next", markup=False)
            write_results(config, plan, Console(quiet=True))
    return failed


def _outcomes(
    config: CompareConfig, waiting: Sequence[PlannedRun], console: Console
) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
    """Each run with what became of it, after the models they share."""
    models = ToyModels(config.toy, config.root) if config.toy else None
    processes = config.compare.in_process
    if not processes or (models and not models.complete()):  # a screening that is resumed needs no Ray
        with ray_session(config.run.cpus):
            if models:
                models.prepare(console)
            for number, run in enumerate([] if processes else waiting, start=1):
                console.rule(f"[bold]{run.folder.name}[/bold]  run {number} of {len(waiting)}", align="left")
                yield run, outcome_of(partial(_reported, run, console))
    for number, (run, outcome) in enumerate(screened(waiting, processes=processes) if processes else (), start=1):
        console.print(f"{run.folder.name}: {outcome['seconds']} s, {number} of {len(waiting)}", markup=False)
        yield run, outcome


def _reported(run: PlannedRun, console: Console) -> None:
    write_report(run_ppo(run.config, resume=run.folder.exists(), console=console).folder)


def _check_arm(config: CompareConfig, arm: str, ppo: PPOConfig, schedules: tuple[Schedule, ...]) -> None:
    judge, weights = config.compare.judge, {further.name: further.weight for further in ppo.model.rewards}
    try:
        if judge is None and ppo.reward.gold is None:
            raise ConfigError("nothing tells the arms apart: set reward.gold in the job, or compare.judge")
        if judge is not None and weights.get(judge) != 0.0:
            raise ConfigError(f"compare.judge = {judge} must be one of [[model.rewards]] with weight 0")
        if config.compare.in_process:
            check_in_process(ppo)
        check_schedules(ppo, schedules)
    except ConfigError as error:
        raise ConfigError(f"arm {arm}: {error}") from None


def check_finished(config: CompareConfig, run: PlannedRun) -> None:
    """See that a finished run is the one that is asked for now; else the page would call it what it is not.

    Raises:
        ConfigError: it had other settings, another schedule, or was run in the other way.
    """
    if not is_finished(run):
        return
    events = read_jsonl(run.folder / "events.jsonl")
    started = next((event for event in events if event["event"] == "started"), {})
    own = (bool(config.compare.in_process), list(map(str, run.schedules)))
    was = (bool(started.get("in_process", False)), started.get("schedules", []))
    if was != own:
        raise ConfigError(
            f"{run.folder}: was {_way(*was)} and is now to be {_way(*own)}; set it back, remove it, or call the "
            "arm or the comparison something else"
        )
    may_change = (PPO_MAY_CHANGE | {"weights"}) - {"ppo.steps", "evaluation"}  # how weights travel changes no number
    if run.config.critic.init == "auto":  # the run wrote down what that came to, which follows from the models
        may_change |= {"critic.init"}
    check_run(run.config, run.config.run, resume=True, may_change=may_change)


def _way(in_process: bool, schedules: Sequence[str]) -> str:
    return ("screened" if in_process else "run by the system") + (f" with {', '.join(schedules)}" if schedules else "")
