"""A run in a few numbers: the tiles and the sentence at the top of the report."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from r3hf_ray.instruments.pages.parts import Tile
from r3hf_ray.instruments.report.figures import MetricRows, series
from r3hf_ray.methods import TELESCOPING_TOLERANCE
from r3hf_ray.records.jsonl import TIME

INCIDENTS = ("restart", "failure", "quarantine", "quarantined", "warning")


def tiles(rows: MetricRows, events: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """The run at a glance; a tile whose metric was not logged is left out."""
    found = [
        _before_after(rows, "eval/heldout/gold/mean", "Gold reward, held-out", sem="eval/heldout/gold/sem")
        or _before_after(rows, "reward/gold/mean", "Gold reward, training"),
        _before_after(rows, "eval/heldout/score/mean", "Reward model score, held-out")
        or _before_after(rows, "reward/score/mean", "Reward model score, training"),
        _kl(rows),
        _endings(rows),
        _telescoping(rows),
        _weights(rows),
        _speed(rows, events),
        _incidents(rows, events),
    ]
    return [tile for tile in found if tile is not None]


def verdict(rows: MetricRows) -> str:
    """One sentence: what rose, from where to where, at what distance from the reference."""
    for metric, name in (
        ("eval/heldout/gold/mean", "held-out gold reward"),
        ("reward/gold/mean", "gold reward of the training batch"),
        ("eval/heldout/score/mean", "the reward model's score on held-out prompts"),
        ("reward/score/mean", "the reward model's score of the training batch"),
    ):
        steps, values = series(rows, metric)
        if len(values) >= 2:
            went = "rose" if values[-1] > values[0] else "fell" if values[-1] < values[0] else "stayed"
            _, kl = series(rows, "kl/ref/mean")
            moved = f", with the policy {kl[-1]:.1f} nats a response from its reference" if kl else ""
            return f"Over {steps[-1]} steps {name} {went} from {values[0]:.2f} to {values[-1]:.2f}{moved}."
    return "No step has finished yet." if not rows else "Too few steps for a verdict."


def duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `3m 40s`, `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _before_after(rows: MetricRows, metric: str, label: str, *, sem: str = "") -> Tile | None:
    _, values = series(rows, metric)
    if not values:
        return None
    if len(values) == 1:
        return Tile(label, f"{values[0]:.2f}", "measured once")
    _, errors = series(rows, sem)
    note = f"± {errors[0]:.2f} → ± {errors[-1]:.2f} (standard error)" if len(errors) > 1 else "first → last"
    rise = values[-1] - values[0]
    clear = abs(rise) > 2.0 * (errors[0] ** 2 + errors[-1] ** 2) ** 0.5 if len(errors) > 1 else rise != 0.0
    tone = "" if not clear else "good" if rise > 0 else "bad"
    return Tile(label, f"{values[0]:.2f} → {values[-1]:.2f}".replace("-", "−"), note, tone)


def _kl(rows: MetricRows) -> Tile | None:
    _, values = series(rows, "kl/ref/mean")
    return Tile("KL to the reference", f"{values[-1]:.1f} nats", "a response, last step") if values else None


def _endings(rows: MetricRows) -> Tile | None:
    _, ended = series(rows, "rollout/eos_frac")
    _, length = series(rows, "rollout/response_length/mean")
    if not ended:
        return None
    note = f"of responses, last step; {length[-1]:.0f} tokens long" if length else "of responses, last step"
    return Tile("Ended by the policy", f"{ended[-1]:.0%}", note)


def _telescoping(rows: MetricRows) -> Tile | None:
    _, errors = series(rows, "r3hf/telescoping_error/max")
    if not errors:
        return None
    tone = "good" if max(errors) <= TELESCOPING_TOLERANCE else "bad"
    return Tile("Token rewards sum to the score", f"{max(errors):.0e}", "largest relative error of the run", tone)


def _weights(rows: MetricRows) -> Tile | None:
    steps, mismatches = series(rows, "sync/mismatch")
    if not steps:
        return None
    proven = sum(mismatch == 0 for mismatch in mismatches)
    _, gaps = series(rows, "sync/probe_gap")
    note = f"largest probe gap {max(gaps):.0e} nats" if gaps else "tensor fingerprints compared after every sync"
    tone = "good" if proven == len(steps) else "bad"
    return Tile("Weights proven in vLLM", f"{proven} of {len(steps)} syncs", note, tone)


def _speed(rows: MetricRows, events: Sequence[Mapping[str, Any]]) -> Tile | None:
    times = [float(item[TIME]) for item in (*rows, *events) if TIME in item]
    if not times:
        return None
    _, steps = series(rows, "time/step")
    _, speed = series(rows, "perf/tokens_per_sec")
    notes = ([f"{median(steps):.1f} s a step"] if steps else []) + ([f"{median(speed):.0f} tokens/s"] if speed else [])
    return Tile("Wall clock", duration(max(times) - min(times)), ", ".join(notes) + (" (medians)" if notes else ""))


def _incidents(rows: MetricRows, events: Sequence[Mapping[str, Any]]) -> Tile:
    kinds = [str(event.get("event")) for event in events]
    _, failed = series(rows, "rollout/failed")
    _, retried = series(rows, "rollout/retried")
    parts = [_count(kinds.count("failure"), "failure"), _count(kinds.count("warning"), "warning")]
    parts += [f"{sum(retried):.0f} samples retried"] if any(retried) else []
    parts += [f"{sum(failed):.0f} quarantined"] if any(failed) else []
    return Tile("Incidents", _count(kinds.count("restart"), "restart"), ", ".join(parts))


def _count(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
