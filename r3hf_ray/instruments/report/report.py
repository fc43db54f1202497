"""`report.html`: a run as one self-contained page that opens from disk, with no network.

Everything that comes from models, data or events is untrusted text. The template escapes it, the script sets it with
`textContent`, and a content security policy lets only this page's own two scripts run and nothing be loaded.
"""

import base64
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from r3hf_ray.instruments.report.cards import KNOWN, MARKS, notes_of, number
from r3hf_ray.instruments.report.credit import credit_cards, payment_of
from r3hf_ray.instruments.report.figures import (
    CREDIT,
    LEARNING,
    SYSTEM,
    UPDATE,
    Row,
    chart,
    drawable,
    series,
    sparkline,
)
from r3hf_ray.instruments.report.summary import INCIDENTS, duration, tiles, verdict
from r3hf_ray.records.jsonl import TIME, read_jsonl
from r3hf_ray.records.metrics import ATTEMPT, METRICS, STEP, describe, read_metrics
from r3hf_ray.records.provenance import redacted, versions
from r3hf_ray.records.samples import read_samples, sample_steps

TEMPLATES = Path(__file__).parent / "templates"
MAX_DUMPS = 8
MAX_TOKENS = 2000
MAX_EVENTS = 400
TOKEN_FIELDS = ("reward", "value", "advantage", "kl", "prefix_score", "logprob")


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder from what the folder holds so far, and return its path.

    A run without metrics, samples or config gets a report without those parts.

    Raises:
        ConfigError: a damaged line inside `metrics.jsonl` or `events.jsonl`.
    """
    rows = read_metrics(run_folder)
    events = read_jsonl(run_folder / "events.jsonl")
    config = _config(run_folder)
    script, plotly = script_of(TEMPLATES / "report.js"), get_plotlyjs()
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    payment = payment_of(config, events)
    cards = credit_cards(run_folder, payment)
    chapters = {chapter.id: (chapter, drawable(chapter, rows)) for chapter in (LEARNING, CREDIT, UPDATE, SYSTEM)}
    page = environment.get_template("report.html.jinja").render(
        name=run_folder.resolve().name,
        status="finished" if any(event.get("event") == "finished" for event in events) else "not finished",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdict=verdict(rows),
        tiles=tiles(rows, events),
        chapters=chapters,
        metrics=_metric_table(rows),
        settings=_settings(config),
        versions=_versions(events),
        events=_event_table(events),
        data={
            "charts": [chart(figure, rows) for _, figures in chapters.values() for figure in figures],
            "marks": [{"x": e["step"], "label": str(e["event"])} for e in events if _is_mark(e)],
            "dumps": _dumps(run_folder),
            "cards": cards,
        },
        payment=payment,
        notes=notes_of(cards),
        marks=MARKS if KNOWN in notes_of(cards) else {},
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup(script),
        plotly=Markup(plotly),
        script_hashes=[hash_of(script), hash_of(plotly)],
    )
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def script_of(own: Path) -> str:
    """A page's own script behind what all pages draw alike."""
    return (TEMPLATES / "drawing.js").read_text() + own.read_text()


def hash_of(script: str) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event.get("event") in ("restart", "failure") and isinstance(event.get("step"), int)


def _metric_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every metric that was logged: ours in the order of `METRICS`, then any other."""
    logged = dict.fromkeys(name for row in rows for name in row if name not in (STEP, ATTEMPT, TIME))
    table = []
    for name in [*(name for name in METRICS if name in logged), *(name for name in logged if name not in METRICS)]:
        _, values = series(rows, name)
        metric = describe(name)
        numbers = {"first": values[0], "last": values[-1], "min": min(values), "max": max(values)} if values else {}
        shown = {key: f"{number:.4g}" for key, number in numbers.items()}
        spark = sparkline(values) if values else ""
        table.append({"name": name, "metric": metric, "numbers": shown, "spark": spark})
    return table


def _config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "config.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def _settings(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}
    for section, value in redacted(config).items():
        fields = value if isinstance(value, dict) else {section: value}
        groups.setdefault(section if isinstance(value, dict) else "", {}).update({k: str(v) for k, v in fields.items()})
    return groups


def _versions(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """As the last `started` event tells them; without one, those of the program that writes the report."""
    told = [event["versions"] for event in events if isinstance(event.get("versions"), Mapping)]
    return {str(name): str(version) for name, version in (told[-1] if told else versions()).items()}


def _event_table(events: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Events as text, with the time since the first one: those that need attention, and the last of all."""
    start = float(events[0].get(TIME, 0.0)) if events else 0.0
    texts = [
        {
            "after": duration(float(event.get(TIME, start)) - start),
            "event": str(event.get("event", "")),
            "text": ", ".join(f"{k} {v}" for k, v in event.items() if k not in (TIME, "event", "versions")),
        }
        for event in events
    ]
    return {"incidents": [t for t in texts if t["event"] in INCIDENTS][-MAX_EVENTS:], "all": texts[-MAX_EVENTS:]}


def _dumps(run_folder: Path) -> list[dict[str, Any]]:
    """Sampled responses of at most `MAX_DUMPS` steps, the first and the last among them."""
    steps = sample_steps(run_folder)
    if len(steps) > MAX_DUMPS:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_DUMPS - 1))] for i in range(MAX_DUMPS)]
    return [{"step": step, "responses": [_response(r) for r in read_samples(run_folder, step)]} for step in steps]


def _response(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, shown = tokens[0], tokens[:MAX_TOKENS]
    return {
        **{key: first[key] for key in ("prompt_id", "sample", "prompt", "finish")},
        "score": number(first["score"]),
        "gold": number(first["gold"]),
        "total": number(sum(token["reward"] or 0.0 for token in tokens)),
        "length": len(tokens),
        "text": [token["token"] for token in shown],
        "id": [token["token_id"] for token in shown],
        **{field: [number(token[field]) for token in shown] for field in TOKEN_FIELDS},
    }
