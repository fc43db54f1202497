"""A plan as tables for a terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from r3hf_ray.planning.placement import Cluster
from r3hf_ray.planning.plan import RunPlan
from r3hf_ray.planning.processes import GIB, Process

SMALL = 0.05
"""Parts below this are left out of a line. [GiB]"""


def show(plan: RunPlan, cluster: Cluster, counts: list[tuple[str, str]], console: Console) -> None:
    """Print a plan: counts, memory by process, moments of the learner, transfers, placement, and what to change."""
    _grid(counts, console)
    console.print("memory of one process at its largest moment, in GiB:")
    _grid([row for process in plan.processes for row in _rows(process, plan.verdicts.get(process.name, ""))], console)
    learner = plan.processes[0]
    moments = "  ".join(f"{name} {parts.total() / GIB:.1f}" for name, parts in learner.device.items())
    grid = [("moments of a learner rank (GiB)", moments)]
    for name, transfer in (("one weight sync", plan.sync), ("one checkpoint", plan.checkpoint)):
        steps = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in transfer.seconds.items() if seconds)
        grid.append((name, f"{transfer.size / 1e9:.2f} GB: {steps}"))
    _grid(grid, console)
    _placement(plan, cluster, console)
    for name, changes in plan.changes.items():
        console.print(f"[red]{name} does not fit[/red]; what would have to change, each on top of those before it:")
        for sentence in changes:
            console.print(f"  {sentence}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    console.print("the run fits" if plan.fits else "[red]the run does not fit[/red]")


def _rows(process: Process, verdict: str) -> Iterator[tuple[str, ...]]:
    moment, parts = process.at_most
    name = f"{process.name} x {process.count}"
    if process.gpus:
        yield name, "GPU", f"{process.on_gpu / GIB:.1f}", verdict, f"{moment}: {_parts(parts)}"
        yield "", "host", f"{process.on_host / GIB:.1f}", "", _parts(process.host)
    else:
        yield name, "host", f"{process.on_host / GIB:.1f}", verdict, f"{moment}: {_parts(parts + process.host)}"


def _parts(parts: Counter[str]) -> str:
    said = [f"{name} {size / GIB:.1f}" for name, size in parts.most_common() if size / GIB >= SMALL]
    return ", ".join(said) or "all small"


def _placement(plan: RunPlan, cluster: Cluster, console: Console) -> None:
    rows = []
    for number, node in enumerate(plan.nodes):
        held = ", ".join(f"{count} {name}" for name, count in node.holds.items()) or "nothing"
        memory = f"host {node.on_host / GIB:.1f} of {cluster.cpu_bytes / GIB:.0f} GiB"
        fullest = (
            f", fullest GPU {max(node.on_gpu) / GIB:.1f} of {cluster.gpu_bytes / GIB:.0f} GiB" if node.on_gpu else ""
        )
        rows.append((f"node {number}", f"{held}; {memory}{fullest}"))
    _grid(rows, console)
    for name, count in plan.without.items():
        console.print(f"[red]no place for {count} {name}[/red]: more nodes, or fewer of them")
    if plan.verdicts["host memory"] != "fits":
        console.print(f"host memory of the fullest node: {plan.verdicts['host memory']}")


def _grid(rows: Sequence[tuple[str, ...]], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    console.print(table)
