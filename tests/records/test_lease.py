"""`live.json`: two drivers on one folder are kept apart, and a driver that is gone holds nothing back."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from r3hf_ray.errors import ConfigError, RunFailed, Terminated
from r3hf_ray.records import lease as module
from r3hf_ray.records.lease import LIVE, Lease, hold, new_lease, read_lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "STALE_SECONDS", 1.0)


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Lease]:
    """`left(state=..., ...)`: a lease that another driver has left in the folder."""

    def leave(**facts: object) -> Lease:
        with hold(tmp_path, new_lease()):
            pass
        lease = replace(new_lease(), **({"host": "far", "job": "02000000", "pid": 7} | facts))
        module._put(tmp_path, lease)
        return lease

    return leave


def test_it_says_who_drives_and_how_it_ended(tmp_path: Path) -> None:
    with hold(tmp_path, new_lease(job="01000000", address="10.0.0.1:6379")) as held:
        held.update(namespace="run-1", attempt=2)
        live = json.loads((tmp_path / LIVE).read_text())
    assert live["state"] == "running" and live["pid"] == os.getpid()
    assert (live["job"], live["address"], live["namespace"], live["attempt"]) == (
        "01000000",
        "10.0.0.1:6379",
        "run-1",
        2,
    )
    assert read_lease(tmp_path).state == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIVE]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (RunFailed("no room"), "failed", "no room"),
        (KeyboardInterrupt(), "stopped", "Ctrl-C"),
        (Terminated(), "stopped", "SIGTERM"),
        (Terminated("after step 3"), "stopped", "after step 3"),
    ],
)
def test_an_end_has_its_reason(tmp_path: Path, error: BaseException, state: str, reason: str) -> None:
    with pytest.raises(type(error)), hold(tmp_path, new_lease()):
        raise error
    lease = read_lease(tmp_path)
    assert (lease.state, lease.reason) == (state, reason)


def test_the_heart_beats_and_no_file_is_ever_half_written(tmp_path: Path) -> None:
    with hold(tmp_path, new_lease()):
        beats, until = set(), time.monotonic() + 5.0
        while len(beats) < 4 and time.monotonic() < until:
            beats.add(read_lease(tmp_path).heartbeat)
    assert len(beats) >= 4


def test_a_second_driver_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    first = new_lease(job="01000000")
    what = rf"host {re.escape(first.host)}, pid {os.getpid()}, Ray job 01000000, last heartbeat \d+ s ago.*r3hf stop"
    with hold(tmp_path, first), pytest.raises(ConfigError, match=what), hold(tmp_path, new_lease()):
        pass
    assert read_lease(tmp_path).token == first.token


def test_a_driver_on_another_host_is_seen_by_its_heartbeat_whatever_the_clocks_say(
    tmp_path: Path, left: Callable[..., Lease]
) -> None:
    lease = left(heartbeat=time.time() - 3600)
    program = (
        "import sys, time; from dataclasses import replace; from pathlib import Path\n"
        "from r3hf_ray.records import lease as m\n"
        "folder = Path(sys.argv[1]); lease = m.read_lease(folder)\n"
        "while True:\n"
        "    lease = replace(lease, heartbeat=lease.heartbeat + 0.1); m._put(folder, lease); time.sleep(0.1)\n"
    )
    beating = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    try:
        until = time.monotonic() + 30.0
        while read_lease(tmp_path).heartbeat == lease.heartbeat and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(ConfigError, match="host far"), hold(tmp_path, new_lease()):
            pass
    finally:
        beating.kill()
        beating.wait()


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_what_has_ended_is_taken_at_once(tmp_path: Path, left: Callable[..., Lease], state: str) -> None:
    left(state=state)
    with hold(tmp_path, new_lease()) as held:
        held.check()


def test_a_heartbeat_that_stands_still_is_taken_over(tmp_path: Path, left: Callable[..., Lease]) -> None:
    left()
    start = time.monotonic()
    with hold(tmp_path, new_lease()):
        assert time.monotonic() - start >= 1.0


def test_a_job_that_ray_says_has_ended_is_taken_at_once(tmp_path: Path, left: Callable[..., Lease]) -> None:
    other = left()
    with hold(tmp_path, new_lease(), ended=lambda lease: lease.job == other.job):
        pass


@pytest.mark.parametrize("facts", [{"pid": 2**22 - 1}, {"pid": os.getpid(), "born": 5.0}])
def test_a_process_that_is_gone_on_this_machine_holds_nothing(
    tmp_path: Path, left: Callable[..., Lease], facts: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pid that another process has by now is no driver either."""
    monkeypatch.setattr(module, "STALE_SECONDS", 60.0)
    left(host=new_lease().host, **facts)
    start = time.monotonic()
    with hold(tmp_path, new_lease()):
        assert time.monotonic() - start < 5.0


def test_a_driver_that_was_taken_over_ends_itself_and_leaves_the_file_alone(tmp_path: Path) -> None:
    other = replace(new_lease(), host="far")
    with pytest.raises(RunFailed, match=r"another driver has taken this run over .host far"):  # noqa: SIM117
        with hold(tmp_path, new_lease()) as held:
            module._put(tmp_path, other)
            until = time.monotonic() + 10.0
            while time.monotonic() < until:
                held.check()
                time.sleep(0.02)
    assert read_lease(tmp_path) == other


def test_a_disk_that_is_full_for_a_while_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    with hold(tmp_path, new_lease()) as held, monkeypatch.context() as patch:
        patch.setattr(module, "_put", full)
        held.update(attempt=1)
        held.check()
    assert read_lease(tmp_path).attempt == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LIVE).write_text("{")
    with pytest.raises(ConfigError, match=r"live\.json: cannot be read"):
        read_lease(tmp_path)
