"""Commands about runs on a cluster: submit, jobs, status, logs, scale, stop (floor 6).

A run that lies here is read and reached from here. Any other is known to a job server by its name, and the same command
runs there, beside its folder.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from r3hf_ray.errors import ConfigError
from r3hf_ray.flags import JobsFlags, LogsFlags, ScaleFlags, StatusFlags, StopFlags, SubmitFlags
from r3hf_ray.settings import Command, command_of, load

if TYPE_CHECKING:
    from r3hf_ray.operations.jobs import Jobs

WATCH_SECONDS = 5.0


def submit(options: SubmitFlags, console: Console, *, schemas: dict[str, type[Command]]) -> int:
    """Check a job here and send it; with `follow`, the exit code is the driver's."""
    from r3hf_ray.operations.jobs import Jobs
    from r3hf_ray.operations.runs import prepared

    command = options.kind or command_of(options.job)
    run = dict(load(schemas[command], options.job, options.overrides))["run"]
    sent, size = prepared(options.job, command, run, options.overrides, resume=options.resume, keys=options.env_file)
    if options.dry_run:
        console.print(f"would send {size / 2**20:.1f} MiB and run: {sent.entrypoint}", markup=False)
        return 0
    jobs = Jobs(options.address)
    name = jobs.submit(sent)
    back = f"r3hf status {name}, r3hf logs {name} driver --follow, r3hf stop {name}"
    console.print(f"submitted {name} to {jobs.address} ({size / 2**20:.1f} MiB); {back}", markup=False)
    if not options.follow:
        return 0
    try:
        return jobs.follow(name, shower(console))
    except KeyboardInterrupt:
        console.print(f"\n{name} goes on without this shell; to come back: {back}", markup=False)
        return 130


def jobs(options: JobsFlags, console: Console) -> int:
    """A line for each run that was submitted."""
    from r3hf_ray.operations.jobs import Jobs, described

    server, table = Jobs(options.address), Table(box=None)
    for name in ("job", "command", "state", "for", "folder"):
        table.add_column(name, overflow="fold")
    for job in server.list():
        table.add_row(*described(job).values())
    console.print(table if table.row_count else f"no runs at {server.address}")
    return 0


def status(options: StatusFlags, console: Console) -> int:
    """One screen about a run, or a line for each."""
    from r3hf_ray.operations.paragraph import overview
    from r3hf_ray.operations.runs import stacked

    if not options.run:
        runs = overview(Path("runs"))
        console.print("\n".join(runs) if runs else "no runs below runs/; name a run's folder", markup=False)
        return 0
    folder = here(options.run)
    if folder is None:
        words = [*(["--watch"] if options.watch else []), *(["--stack", options.stack] if options.stack else [])]
        return there("status", options.run, options.address, words, console)
    if options.stack:
        console.print(stacked(folder, options.stack), markup=False)
        return 0
    return _watched(folder, console) if options.watch else _shown(folder, console)


def _shown(folder: Path, console: Console) -> int:
    from r3hf_ray.operations.runs import asked

    with asked(folder) as show:
        console.print(show(), markup=False)
    return 0


def _watched(folder: Path, console: Console) -> int:
    from r3hf_ray.operations.runs import asked
    from r3hf_ray.records.lease import read_lease

    with asked(folder) as show:
        while (lease := read_lease(folder)) and lease.is_fresh:
            if console.is_terminal:
                console.clear()
            console.print(show(), markup=False)
            time.sleep(WATCH_SECONDS)
        console.print(show(), markup=False)
    return 0


def logs(options: LogsFlags, console: Console) -> int:
    """What a member wrote."""
    from r3hf_ray.operations.jobs import Jobs
    from r3hf_ray.operations.runs import output

    folder = here(options.run)
    if options.member == "driver" and "/" not in options.run:
        server = Jobs(options.address)
        server.tail(str(server.find(options.run).submission_id), shower(console), follow=options.follow)
        return 0
    if folder is None:
        words = [options.member, *(["--follow"] if options.follow else [])]
        return there("logs", options.run, options.address, words, console)
    for line in output(folder, options.member, follow=options.follow):
        console.print(line, markup=False)
    return 0


def scale(options: ScaleFlags, console: Console) -> int:
    """Have so many actors from now on."""
    from r3hf_ray.operations.runs import scale as scaled

    folder = here(options.run)
    if folder is None:
        return there("scale", options.run, options.address, options.actors, console)
    console.print(scaled(folder, options.actors), markup=False)
    return 0


def stop(options: StopFlags, console: Console) -> int:
    """Save and end."""
    from r3hf_ray.operations.runs import stop as stopped

    if folder := here(options.run):
        console.print(stopped(folder), markup=False)
        return 0
    server = server_of(options.run, options.address)
    server.stop(str(server.find(options.run).submission_id), shower(console))
    return 0


def here(run: str) -> Path | None:
    """The folder of a run that lies on this machine, by its path or its name below `runs/`."""
    from r3hf_ray.records.lease import LIVE

    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.toml").is_file() or (folder / LIVE).is_file():
            return folder
    return None


def there(command: str, run: str, address: str | None, words: list[str], console: Console) -> int:
    """Run the same command on the cluster that has the run, beside its folder."""
    server = server_of(run, address)
    folder = (server.find(run).metadata or {})["r3hf_folder"]
    return server.relay(command, [folder, *words], Path.cwd(), shower(console))


def server_of(run: str, address: str | None) -> "Jobs":
    """The job server that may know a run that is not here.

    Raises:
        ConfigError: the run is a path, or no server answers.
    """
    from r3hf_ray.operations.jobs import Jobs

    if "/" in run:
        raise ConfigError(f"{run}: no run (no config.toml in it); name a run's folder, as runs/NAME")
    try:
        return Jobs(address)
    except ConfigError as error:
        raise ConfigError(f"{run}: no run of this name below runs/, and as a submitted one: {error}") from None


def shower(console: Console) -> Callable[[str], None]:
    """Prints what comes as it is."""
    return lambda text: console.print(text, end="", markup=False)
