"""How a run stands, in words on one screen (layer 4)."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from r3hf_ray.operations.standing import TROUBLE, Live, Standing, is_gone, standing
from r3hf_ray.records.lease import LIVE

SERVES = ("ready", "busy", "slow")
SHOWN, RECENT = 8, 5
"""Members of a kind, and troubles, that are shown one by one."""


def paragraph(run: Standing) -> str:
    """All that is known of a run, on one screen.

    Example (its first lines)::

        runs/hh: step 12 of 60, 3.1 s a step; running
        driver   host gpu-1, pid 4711, Ray job hh, last heartbeat 2 s ago
        learner  waiting for the batch of step 13 (12 s)
        rollouts 1 of 2 serve, 32 responses under way, oldest 12 s
    """
    lines = [_headline(run)]
    if run.lease:
        lines.append(_row("driver", run.lease.who))
    if run.unreachable:
        lines.append(_row("", f"its coordinator was not asked: {run.unreachable}"))
    doing = run.lease.doing if run.lease and run.lease.is_fresh else {}
    lines += [_row(stage, words) for stage, words in doing.items()]
    if run.live:
        lines += _live(run, run.live)
    restarts = [event for event in run.events if event["event"] == "restart"]
    if restarts:
        lines.append(_row("restarts", f"{len(restarts)}; the last: {restarts[-1].get('reason', 'no reason')}"))
    lines += [_row("trouble", _event(event)) for event in _recent(run, TROUBLE)]
    lines += [_row("warning", _event(event)) for event in _recent(run, ("warning",))]
    lines.append(_row("look at", f"{run.folder}/events.jsonl, report.html; r3hf logs {run.folder} MEMBER"))
    return "\n".join(lines)


def overview(folder: Path) -> list[str]:
    """The runs below a folder, a line each, the one with the latest sign of life last."""
    runs = [path for path in folder.glob("*") if (path / LIVE).is_file() or (path / "config.toml").is_file()]
    return [_headline(standing(path)) for path in sorted(runs, key=lambda path: _touched(path))]


def _touched(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in (LIVE, "config.toml") if (folder / name).is_file())


def _headline(run: Standing) -> str:
    pace = f", {run.seconds:.1f} s a step" if run.seconds else ""
    of = f" of {run.steps}" if run.steps else ""
    return f"{run.folder}: step {run.step}{of}{pace}; {_state(run)}"


def _state(run: Standing) -> str:
    lease = run.lease
    if lease is None:
        ended = [event for event in run.events if event["event"] in ("finished", "failure", "stopped")]
        return ended[-1]["event"] if ended else "no driver is known"
    if is_gone(lease):
        return f"interrupted: its driver is gone, last heartbeat {_ago(lease.age)} ago; --resume goes on"
    reason = f": {lease.reason}" if lease.reason else ""
    return f"{lease.state}{reason}" + ("; --resume goes on" if lease.state in ("failed", "stopped") else "")


def _live(run: Standing, live: Live) -> Iterator[str]:
    for kind in ("rollout", "reward"):
        members = [member for member in live.members if member.kind == kind]
        yield _row(f"{kind}s", _pool(members))
        for member in sorted(members, key=_interest)[:SHOWN]:
            yield _row("", _member(member, run, live))
        if len(members) > SHOWN:
            yield _row("", f"and {len(members) - SHOWN} more")
    others = [name for name in live.pending if name.partition(" ")[0] not in run.asks]
    if others:
        yield _row("not placed", f"{', '.join(sorted(set(others)))}; free: {_amounts(live.free)}")


def _pool(members: list[Any]) -> str:
    ready = [member for member in members if member.state.value in SERVES]
    held = sum(member.requests for member in members)
    oldest = max((member.age for member in members if member.requests), default=0.0)
    under_way = f", {held} responses under way, oldest {oldest:.0f} s" if held else ", nothing under way"
    return f"{len(ready)} of {len(members)} serve{under_way}"


def _interest(member: Any) -> tuple[bool, float]:
    """Those in trouble first, then those that hold the oldest work."""
    return (member.state.value in SERVES[:2], -member.age)


def _member(member: Any, run: Standing, live: Live) -> str:
    facts = [f"{member.name}: {member.state.value}"]
    if member.name in live.pending:
        facts.append(f"not placed: asks {_amounts(run.asks[member.kind])}, free {_amounts(live.free)}")
    if member.version >= 0:
        facts.append(f"version {member.version}")
    if member.requests:
        facts.append(f"{member.requests} responses, oldest {member.age:.0f} s")
    if member.restarts or member.reason:
        facts.append(f"{member.restarts} restarts{', the last: ' + member.reason if member.reason else ''}")
    return ", ".join(facts)


def _recent(run: Standing, kinds: tuple[str, ...]) -> list[Any]:
    return [event for event in run.events if event["event"] in kinds and event["event"] != "restart"][-RECENT:]


def _event(event: Any) -> str:
    when = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S")
    who = event.get("actor") or (f"prompt {event['prompt_id']}" if "prompt_id" in event else "")
    what = event.get("reason") or event.get("text", "")
    return f"{when} {who}{': ' if who else ''}{what}"[:240]


def _amounts(resources: Any) -> str:
    named = [f"{amount:g} {name}" for name, amount in resources.items() if amount or name == "CPU"]
    return " and ".join(named)


def _ago(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"
