"""Which driver works on a run's folder: `live.json`, written every few seconds, so that two never do (layer 4).

| state    | says                                                                                      |
|----------|-------------------------------------------------------------------------------------------|
| running  | a driver is there, if its heartbeat is young; its coordinator is found by this file       |
| finished | it came to its end                                                                        |
| failed   | it ended with `reason`                                                                    |
| stopped  | somebody ended it, and `--resume` goes on                                                 |

A lease is dead once Ray says that its job ended, once its process is gone on the same machine, or once its heartbeat
has stood still for 60 s. Clocks of two hosts may differ, so a heartbeat is watched and not only compared with ours.
"""

import fcntl
import json
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil

from r3hf_ray.errors import ConfigError, RunFailed, Terminated, sentence_of

LIVE = "live.json"
END = "end.json"
"""Left beside it by whoever wants the run to end: the token of the driver that is meant."""
BEAT_SECONDS, STALE_SECONDS = 5.0, 60.0
"""How often a driver writes, and after how long without it is counted as gone. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The driver of a run, as its folder names it.

    Example: ``Lease(state="running", host="gpu-3", pid=4711, job="02000000", address="10.0.0.3:6379", ...)``
    """

    state: str = "running"
    """`running`, `finished`, `failed` or `stopped`."""
    reason: str = ""
    """Why it failed or was stopped."""
    token: str
    """Tells this driver from every other."""
    host: str
    machine: str
    """Of the host's kernel and its processes' namespace: what a pid means something in."""
    pid: int
    born: float
    """When that process began, since pids are used again. [unix s]"""
    job: str = ""
    """Ray's id of the driver's job."""
    session: str = ""
    """Name of the Ray cluster's session."""
    address: str = ""
    """Of the Ray cluster, `host:port`."""
    submission: str = ""
    """Name under which the job was submitted, if it was."""
    namespace: str = ""
    """Of the run's named actors, once there are any."""
    attempt: int = 0
    doing: Mapping[str, str] = field(default_factory=dict)
    """What each stage does, in words."""
    started: float
    """[unix s]"""
    heartbeat: float
    """[unix s]"""

    @property
    def age(self) -> float:
        """Since the last heartbeat, by this host's clock. [s]"""
        return max(0.0, time.time() - self.heartbeat)

    @property
    def is_fresh(self) -> bool:
        """Whether it says running and its driver may still be there: the heartbeat is young, no pid is known gone."""
        return self.state == "running" and self.age < STALE_SECONDS and _process(self) is not False

    @property
    def who(self) -> str:
        """The driver in words."""
        job = f", Ray job {self.submission or self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}, last heartbeat {self.age:.0f} s ago"


def new_lease(**ray: Any) -> Lease:
    """A lease of this process; ``ray``: job, session, address and submission, where there is a Ray."""
    now = time.time()
    return Lease(
        token=secrets.token_hex(8),
        host=platform.node(),
        machine=_machine(),
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        started=now,
        heartbeat=now,
        **ray,
    )


def read_lease(folder: Path) -> Lease | None:
    """The lease of a run's folder; None where no driver has held it.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / LIVE
    try:
        table = json.loads(path.read_text())
        known = {one.name for one in fields(Lease)}
        return Lease(**{name: value for name, value in table.items() if name in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; remove it if no driver runs") from None


def ask_to_end(folder: Path, lease: Lease) -> None:
    """Ask the driver that a lease names to end; it does so as on SIGTERM, within a heartbeat."""
    (folder / END).write_text(json.dumps({"token": lease.token}) + "\n")


class Held:
    """A lease while it is held; a thread writes its heartbeat."""

    def __init__(self, folder: Path, lease: Lease) -> None:
        """Of a folder that `hold` has taken."""
        self._folder, self._lease = folder, lease
        self._lock, self._end = threading.Lock(), threading.Event()
        self._taken_by: Lease | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def update(self, **facts: Any) -> None:
        """Change what it says (`namespace`, `attempt`), at once."""
        with self._lock:
            self._lease = replace(self._lease, **facts)
            self._write()

    def note(self, doing: Mapping[str, str]) -> None:
        """What each stage does now: goes out with the next heartbeat."""
        with self._lock:
            self._lease = replace(self._lease, doing=doing)

    def check(self) -> None:
        """See that no other driver has taken the folder over, after this one stood still for a while.

        Raises:
            RunFailed: one has.
        """
        if self._taken_by:
            raise RunFailed(f"{self._folder}: another driver has taken this run over ({self._taken_by.who})")

    def end(self, state: str, reason: str) -> None:
        """Say how it ended."""
        self._end.set()
        self._thread.join()
        (self._folder / END).unlink(missing_ok=True)
        self.update(state=state, reason=reason)

    def _beat(self) -> None:
        asked = False
        while not self._end.wait(BEAT_SECONDS):
            self.update()
            if not asked and self._asked():
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _asked(self) -> bool:
        try:
            return bool(json.loads((self._folder / END).read_text())["token"] == self._lease.token)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self) -> None:
        with suppress(OSError, ConfigError):  # a disk that is full now may have room at the next beat
            other = read_lease(self._folder)
            if other is not None and other.token != self._lease.token:
                self._taken_by = other
            else:
                self._lease = replace(self._lease, heartbeat=time.time())
                _put(self._folder, self._lease)


@contextmanager
def hold(folder: Path, lease: Lease, *, ended: Callable[[Lease], bool] = lambda lease: False) -> Iterator[Held]:
    """Hold a run's folder; its state says how the block ended.

    Args:
        folder: of the run; made if it is missing.
        lease: of this process.
        ended: whether Ray says that the job of another lease is over.

    Raises:
        ConfigError: another driver holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            other = read_lease(folder)
            if other and _alive(folder, other, ended):
                raise ConfigError(
                    f"{folder}: another driver holds this run ({other.who}); wait for its end, end it with "
                    f"r3hf stop {folder}, or take another run.name"
                )
            _put(folder, lease)
    except OSError as error:
        raise ConfigError(f"run.folder: {folder} cannot be written: {error.strerror}") from None
    held = Held(folder, lease)
    try:
        yield held
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        how = "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
        held.end("stopped" if stopped else "failed", str(error) or (how if stopped else sentence_of(error)))
        raise
    held.end("finished", "")


def _alive(folder: Path, lease: Lease, ended: Callable[[Lease], bool]) -> bool:
    """Whether the driver of a lease still works; watches its heartbeat where nothing else tells."""
    there = _process(lease)
    if lease.state != "running" or there is False or ended(lease):
        return False
    if there and lease.age < STALE_SECONDS:
        return True
    until = time.monotonic() + max(2 * BEAT_SECONDS + 1, STALE_SECONDS - lease.age)
    while time.monotonic() < until:
        time.sleep(0.2)
        now = read_lease(folder)
        if now and now.heartbeat != lease.heartbeat:
            return now.state == "running"
    return False


def _process(lease: Lease) -> bool | None:
    """Whether the driver's process is there; None where this machine cannot tell."""
    if lease.machine != _machine() or lease.host != platform.node():
        return None
    try:
        process = psutil.Process(lease.pid)
        return abs(process.create_time() - lease.born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # nothing is known, so it is like no other


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time read and take a lease; where a file system has no locks, the next heartbeat tells."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another driver is just taking this run; take another run.name") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _put(folder: Path, lease: Lease) -> None:
    new = folder / f".{LIVE}.{lease.token}"
    new.write_text(json.dumps(asdict(lease), indent=1) + "\n")
    new.replace(folder / LIVE)
