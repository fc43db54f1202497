"""What the terminal shows while a run goes on: a live display, or plain lines where there is no terminal."""

import math
import re
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HEADLINES: dict[str, tuple[str, str]] = {
    "reward/score/mean": ("reward", "{:.2f}"),
    "reward/gold/mean": ("gold", "{:.2f}"),
    "kl/ref/mean": ("KL", "{:.2f} nats"),
    "rollout/response_length/mean": ("length", "{:.0f} tok"),
    "perf/tokens_per_sec": ("speed", "{:.0f} tok/s"),
    "time/step": ("step time", "{:.1f} s"),
}
"""Metrics worth a glance during a run, with their label and format."""

_SECONDS_AT_END = re.compile(r"\s*\((\d+(?:\.\d+)?) ?s\)$")
_WAITING = re.compile(r"^(idle|waiting)\b")


class Progress:
    """Shows snapshots of a run: a live display on a terminal, otherwise one line a step and a heartbeat.

    A snapshot is a plain dict:
    ``{"step": 3, "steps": 60, "metrics": {"kl/ref/mean": 0.4}, "doing": {"rollout": "generating chunk 3 (12 s)"}}``.
    ``step`` counts finished steps. A text that ends in ``(12 s)`` has its own clock; for others the time since it
    last changed is shown.
    """

    def __init__(
        self, console: Console | None = None, *, heartbeat: float = 20.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console()
        self._heartbeat = heartbeat
        self._clock = clock
        self._start = self._last_line = clock()
        self._last_step = -1
        self._since: dict[str, tuple[str, float]] = {}
        self._snapshot: Mapping[str, Any] = {"step": 0, "steps": 1, "metrics": {}, "doing": {}}
        self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Progress":
        self._start = self._last_line = self._clock()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, snapshot: Mapping[str, Any]) -> None:
        """Show a snapshot; cheap, meant to be called at every poll."""
        self._snapshot = snapshot
        for name, text in snapshot["doing"].items():
            doing = _SECONDS_AT_END.sub("", text)
            if self._since.get(name, ("", 0.0))[0] != doing:
                self._since[name] = (doing, self._clock())
        step = snapshot["step"]
        if step > self._last_step and step > 0:
            self._finished_step(step)
        elif self._clock() - self._last_line >= self._heartbeat:
            self._beat()
        self._last_step = step

    def note(self, text: str) -> None:
        """Print one line above the display (a restart, a warning)."""
        self._console.print(Text(text), soft_wrap=True)
        self._last_line = self._clock()

    def _finished_step(self, step: int) -> None:
        if not self._console.is_terminal:
            values = "  ".join(f"{label} {value}" for label, value in _headlines(self._snapshot["metrics"]))
            self.note(f"step {step}/{self._snapshot['steps']}  {values}".rstrip())

    def _beat(self) -> None:
        if self._console.is_terminal:
            return
        quiet = self._clock() - self._last_line
        doing = " | ".join(f"{name}: {doing} ({seconds:.0f} s)" for name, doing, seconds in self._doing())
        step = f"step {self._snapshot['step'] + 1}/{self._snapshot['steps']}"
        self.note(f"{step} still running, quiet for {quiet:.0f} s  {doing}".rstrip())

    def _doing(self) -> list[tuple[str, str, float]]:
        """Who, what it does, and for how many seconds."""
        rows = []
        for name, text in self._snapshot["doing"].items():
            doing, since = self._since.get(name, (text, self._clock()))
            own_clock = _SECONDS_AT_END.search(text)
            rows.append((name, doing, float(own_clock[1]) if own_clock else self._clock() - since))
        return rows

    def _display(self) -> Panel:
        snapshot = self._snapshot
        step, steps = snapshot["step"], snapshot["steps"]
        elapsed = self._clock() - self._start
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(ProgressBar(total=max(steps, 1), completed=step), Text(f"{step}/{steps}  {_minutes(elapsed)}"))

        numbers = Text("   ").join(
            Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in _headlines(snapshot["metrics"])
        )
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
        table.add_column(justify="right", no_wrap=True, style="dim")
        for name, doing, seconds in self._doing():
            table.add_row(name, Text(doing, style="dim" if _WAITING.match(doing) else ""), f"{seconds:.0f} s")
        return Panel(Group(bar, numbers, Text(), table), title="r3hf_ray", title_align="left", border_style="dim")


def row_printer(console: Console, *, seconds: float = 0.0) -> Callable[[Mapping[str, Any]], None]:
    """Prints rows of metrics of `r3hf sft` and `r3hf reward` as lines, at most one in so many seconds."""
    last = -math.inf

    def show(row: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            known = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float) and "/" in name]
            console.print(f"step {row['train/global_step']}  {'  '.join(known)}", markup=False)

    return show


def _headlines(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(label, form.format(metrics[name])) for name, (label, form) in HEADLINES.items() if name in metrics]


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
