"""What a person does to a run: send it to a cluster, look at it, change it, end it (layer 4)."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from r3hf_ray.errors import ConfigError, RunFailed, sentence_of
from r3hf_ray.operations.jobs import Submission
from r3hf_ray.operations.logs import place_of, read_output, stack, written
from r3hf_ray.operations.package import refuse_secrets, require_packable
from r3hf_ray.operations.paragraph import paragraph
from r3hf_ray.operations.standing import ANSWER_SECONDS, Standing, ask, standing
from r3hf_ray.records.lease import Lease, ask_to_end, read_lease
from r3hf_ray.sections.runs import RunSection
from r3hf_ray.session import ray_session

END_SECONDS = 150.0
"""How long a run may take to save and end. [s]"""


def prepared(
    job: Path, command: str, run: RunSection, words: list[str], *, resume: bool, keys: Path | None
) -> tuple[Submission, int]:
    """What a job file is sent as, and its size in bytes; everything that can be wrong with it here is said.

    Args:
        job: the TOML file, which has been read.
        command: that it is for.
        run: its section of that name, with the overrides.
        words: overrides.
        resume: whether the run may be there already.
        keys: a file of them on the nodes.

    Raises:
        ConfigError: its folder is relative, something looks like a key, or it cannot be packed.
    """
    here = Path.cwd()
    size = require_packable(here, job)
    refuse_secrets({"the job file": job.read_text()} | _named(words))
    if not run.folder.is_absolute():
        raise ConfigError(
            f"run.folder: {run.folder} is relative, and a job runs in a copy of this folder that goes with it: name an "
            "absolute one that all nodes share, as --run.folder /runs"
        )
    return (
        Submission(
            run=run.name,
            command=command,
            words=(str(job.resolve().relative_to(here)), *(["--resume"] if resume else []), *words),
            root=str(run.folder / run.name),
            folder=here,
            env_file=str(keys or ""),
        ),
        size,
    )


@contextmanager
def joined(lease: Lease) -> Iterator[None]:
    """Join the cluster that a lease names.

    Raises:
        ConfigError: it cannot be joined from here.
    """
    try:
        with ray_session(None, lease.address):
            yield
    except RunFailed as error:
        raise ConfigError(f"{lease.address}: cannot be joined from host {platform.node()}: {error}") from None


@contextmanager
def asked(folder: Path) -> Iterator[Callable[[], str]]:
    """Gives what tells how the run in a folder stands: by its coordinator, as long as one can be reached."""
    lease, why = read_lease(folder), ""
    with ExitStack() as stack:
        if lease and lease.is_fresh:
            try:
                stack.enter_context(joined(lease))
            except ConfigError as error:
                why = str(error)
        yield lambda: paragraph(_stands(folder, why))


def _stands(folder: Path, why: str) -> Standing:
    lease, live = read_lease(folder), None
    if lease and lease.is_fresh and not why:
        live = ask(lease.namespace, lease.job) if lease.namespace else None
        if live is None:
            why = (
                "it gives no answer" if lease.namespace else "it has not begun: the driver prepares, or waits for nodes"
            )
    return standing(folder, live=live, unreachable=why)


def output(folder: Path, member: str, *, follow: bool) -> Iterator[str]:
    """What a member wrote, line by line; from its node, where that is another one.

    Raises:
        ConfigError: there is no such member, or the cluster cannot be joined.
        RunFailed: the member's node is gone.
    """
    place, lease = place_of(folder, member), read_lease(folder)
    if place.host == platform.node() and not follow and Path(place.logs).is_dir():
        yield from read_output(place.logs, place.pid, None)
    elif lease:
        with joined(lease):
            yield from written(place, follow=follow)


def stacked(folder: Path, member: str) -> str:
    """What every thread of a member does now; kept in the run's folder too.

    Raises:
        ConfigError: there is no such member, or the cluster cannot be joined.
        RunFailed: py-spy is not there, or may not look.
    """
    place = place_of(folder, member)
    with joined(_running(folder)):
        text = stack(place)
    kept = folder / "stacks" / f"{place.actor.replace(' ', '_')}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(text)
    return f"{text}\n(kept in {kept})"


def _running(folder: Path) -> Lease:
    lease = read_lease(folder)
    if lease is None or not lease.is_fresh:
        how = "no driver was ever here" if lease is None else f"it is {lease.state} ({lease.who})"
        raise ConfigError(f"{folder}: does not run: {how}")
    return lease


def scale(folder: Path, wanted: list[str]) -> str:
    """Have so many actors from now on, `rollout=4`; returns what was done.

    Raises:
        ConfigError: something else was asked, the run cannot be reached, or it refuses.
    """
    counts = {}
    for word in wanted:
        kind, equals, number = word.partition("=")
        if kind not in ("rollout", "reward") or not equals or not number.isdigit():
            raise ConfigError(f"{word}: say rollout=NUMBER or reward=NUMBER")
        counts[kind] = int(number)
    lease = _running(folder)
    with joined(lease):
        try:
            coordinator = ray.get_actor("coordinator", lease.namespace)
            refusal = ray.get(coordinator.scale.remote(**counts), timeout=ANSWER_SECONDS)
        except (ValueError, RayError) as error:  # none is there, or it is busy with something else
            raise ConfigError(f"{folder}: its coordinator does not answer: {sentence_of(error)}") from None
    if refusal:
        raise ConfigError(f"{folder}: {refusal}")
    return (
        f"{folder}: {', '.join(f'{kind} {count}' for kind, count in counts.items())}; r3hf status {folder} shows them"
    )


def stop(folder: Path) -> str:
    """End the run in a folder, whoever drives it; returns how it ended.

    Raises:
        ConfigError: nobody drives it.
        RunFailed: its driver does not end.
    """
    lease = _running(folder)
    ask_to_end(folder, lease)
    deadline = time.monotonic() + END_SECONDS
    while (now := read_lease(folder)) and now.state == "running" and now.token == lease.token:
        if time.monotonic() > deadline or not now.is_fresh:
            raise RunFailed(f"{folder}: was asked to end and has not within {END_SECONDS:.0f} s ({now.who})")
        time.sleep(0.2)
    return f"{folder}: {now.state}; {now.reason}" if now else f"{folder}: ended"


def _named(words: list[str]) -> dict[str, str]:
    """Overrides by name: `--a.b 3` and `--a.b=3` alike."""
    named, last = {}, ""
    for word in words:
        if word.startswith("--"):
            last, _, value = word.partition("=")
            named[last] = value
        else:
            named[last] = f"{named.get(last, '')} {word}"
    return named
