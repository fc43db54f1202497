"""`report.html`: a run as one self-contained page, from what its folder holds."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r3hf_ray.instruments.pages.parts import Page, PageSection, Table, TableRow
from r3hf_ray.instruments.pages.texts import section
from r3hf_ray.instruments.pages.writing import write_html
from r3hf_ray.instruments.report.credit import payment_of
from r3hf_ray.instruments.report.figures import TEXT, MetricRows, chapter_sections, series, thinned
from r3hf_ray.instruments.report.sampled import methods_section, responses_section
from r3hf_ray.instruments.report.summary import INCIDENTS, duration, tiles, verdict
from r3hf_ray.records.jsonl import TIME, read_jsonl
from r3hf_ray.records.metrics import ATTEMPT, METRICS, STEP, describe, read_metrics
from r3hf_ray.records.provenance import redacted, versions

MAX_EVENTS = 400
WITH_INCIDENTS = "Restarts, failures, quarantined prompts and warnings; times are counted from the start of the run."
WITHOUT = "No restart, failure, quarantined prompt or warning."
Events = Sequence[Mapping[str, Any]]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder from what the folder holds so far, and return its path.

    A run without metrics, samples or config gets a report without those parts.

    Raises:
        ConfigError: a damaged line inside `metrics.jsonl` or `events.jsonl`.
    """
    rows = read_metrics(run_folder)
    events = read_jsonl(run_folder / "events.jsonl")
    path = run_folder / "config.toml"
    config = tomllib.loads(path.read_text()) if path.exists() else {}
    payment = payment_of(config, events)
    finished = any(event.get("event") == "finished" for event in events)
    broken = [e["step"] for e in events if e.get("event") in ("restart", "failure") and isinstance(e.get("step"), int)]
    curves = chapter_sections(rows, broken)
    page = Page(
        brand="r3hf_ray run report",
        title=run_folder.resolve().name,
        verdict=verdict(rows),
        status="finished" if finished else "not finished",
        tone="good" if finished else "warn",
        tiles=tiles(rows, events),
        sections=[
            *curves[:1],
            *responses_section(run_folder, payment),
            *methods_section(run_folder, payment),
            *curves[1:],
            _metrics_section(rows),
            _settings_section(config, events),
            *_events_section(events),
        ],
    )
    return write_html(run_folder / "report.html", page)


def _metrics_section(rows: MetricRows) -> PageSection:
    """Every metric that was logged: ours in the order of `METRICS`, then any other."""
    logged = dict.fromkeys(name for row in rows for name in row if name not in (STEP, ATTEMPT, TIME))
    lines = []
    for name in [*(name for name in METRICS if name in logged), *(name for name in logged if name not in METRICS)]:
        _, values = series(rows, name)
        ends = [f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values))] if values else ["–"] * 4
        metric = describe(name)
        lines.append(TableRow([name, thinned(values), *ends, metric.unit, metric.meaning]))
    head = ["metric", "over the run", "first", "last", "min", "max", "unit", "what it is"]
    return section(TEXT, "metrics", tables={"metrics": Table(head=head, rows=lines)})


def _settings_section(config: Mapping[str, Any], events: Events) -> PageSection:
    """Versions are those of the last `started` event; without one, of the program that writes the report."""
    told = [event["versions"] for event in events if isinstance(event.get("versions"), Mapping)]
    groups = {"versions": told[-1] if told else versions()}
    for name, value in redacted(config).items():
        groups.setdefault(name if isinstance(value, dict) else "top level", {}).update(
            value if isinstance(value, dict) else {name: value}
        )
    told_of = {title: {key: str(value) for key, value in fields.items()} for title, fields in groups.items()}
    return section(TEXT, "settings", groups=told_of)


def _events_section(events: Events) -> list[PageSection]:
    """Events as text, with the time since the first one: those that need attention, and the last of all."""
    if not events:
        return []
    start = float(events[0].get(TIME, 0.0))
    rows = [
        TableRow(
            [
                duration(float(event.get(TIME, start)) - start),
                str(event.get("event", "")),
                ", ".join(f"{k} {v}" for k, v in event.items() if k not in (TIME, "event", "versions", "log")),
            ]
        )
        for event in events
    ]
    incidents = [row for row in rows if row.cells[1] in INCIDENTS]
    tables = {"all": _table("All events", rows)}
    if incidents:
        tables = {"incidents": _table("Incidents", incidents)} | tables
    return [section(TEXT, "events", intro=WITH_INCIDENTS if incidents else WITHOUT, tables=tables)]


def _table(title: str, rows: Sequence[TableRow]) -> Table:
    """The last `MAX_EVENTS` rows; the title says how many that is of how many."""
    count = str(len(rows)) if len(rows) <= MAX_EVENTS else f"the last {MAX_EVENTS} of {len(rows):,}"
    return Table(head=["after", "event", "what"], rows=rows[-MAX_EVENTS:], title=f"{title} ({count})")
