"""What a run says where Ray cannot be joined or started, and where the coordinator ends it."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from r3hf_ray.actors.coordinator import Snapshot
from r3hf_ray.config import PPOConfig
from r3hf_ray.data.loading import Report
from r3hf_ray.driver import _Actors, _Follower
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.preflight import Plan
from r3hf_ray.session import ray_session, require_answer


@pytest.mark.usefixtures("no_ray")
def test_a_ray_that_does_not_start_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        assert options["address"] == "local"
        raise Exception("The current node timed out during startup.")  # what Ray 2.60 raises

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(RunFailed, match=r"Ray did not start: The current node timed out .*overloaded"),
        ray_session(1.0),
    ):
        pass


@pytest.mark.usefixtures("no_ray")
def test_a_cluster_that_is_not_there_is_named_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60 alone waits for ten minutes."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = "{}:{}".format(*nobody.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        what = f"RAY_ADDRESS: cannot join the cluster at {address}: .*[Rr]efused"
        with pytest.raises(ConfigError, match=what), ray_session(None):
            pass


@pytest.mark.parametrize("address", ["auto", "local", "ray://cluster"])
def test_only_a_host_and_port_are_tried(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", None)
    require_answer(address)


def test_a_run_that_fails_after_its_last_step_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation may break once the learner is done; out of `finish` that comes as an error of Ray."""
    reason = "calibration scored fewer than 2 responses"
    remote = RayTaskError("Coordinator.finish", "a traceback", RunFailed(reason)).as_instanceof_cause()
    assert isinstance(remote, RunFailed) and isinstance(remote, RayError)
    snapshots = iter([None, reason, reason])

    def poll(rows_seen: int, events_seen: int) -> Snapshot:
        return Snapshot(rows=[], events=[], stages={}, failed=next(snapshots))

    def get(answer: Any) -> Any:
        if answer is remote:
            raise remote
        return answer

    coordinator = SimpleNamespace(poll=SimpleNamespace(remote=poll), finish=SimpleNamespace(remote=lambda: remote))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    actors = _Actors(coordinator, None, [], [], threading.Thread())
    monkeypatch.setattr(_Follower, "_start", lambda follower: actors)
    config = PPOConfig(
        run={"name": "x"},
        model={"policy": "p", "reward_model": "r"},
        data={"source": "d"},
        tracking={"wandb": "disabled"},
    )
    plan = Plan(
        config=config,
        prompts=[],
        heldout=[],
        report=Report(source="d", unit="line"),
        eos_ids=(2,),
        reward_models={},
        max_model_len=8,
        probe_ids=[],
        warnings=[],
    )
    with (
        pytest.raises(RunFailed, match=f"^{reason}$"),
        _Follower(config, plan, tmp_path, Console(quiet=True), attempt=0) as follower,
    ):
        follower.follow()
