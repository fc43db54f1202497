"""What a run says where Ray cannot be joined or started, and where the coordinator ends it."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from rich.console import Console

from r3hf_ray.actors.shares import Snapshot
from r3hf_ray.actors.train_group import TrainGroup
from r3hf_ray.config import PPOConfig
from r3hf_ray.data.loading import Report
from r3hf_ray.driver import _Actors, _Follower
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.preflight import Plan
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.lease import hold, new_lease
from r3hf_ray.scoring.scorer import ScoringSettings
from r3hf_ray.sections.actors import EngineFacts
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


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Follow a run to its end, with a coordinator and a learner group that are not there."""
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
        engine=EngineFacts(model="p", max_model_len=8, eos_ids=(2,), medium="object_ref"),
        scoring=ScoringSettings(reward=config.reward, model=config.model, temperature=1.0),
        probe_ids=[],
        warnings=[],
    )
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "kill", lambda actor: None)

    def run(fit: Callable[[], None], *, failed: list[str | None], finish: object = None) -> None:
        snapshots = iter(failed)

        def poll(rows_seen: int, events_seen: int) -> Snapshot:
            return Snapshot(rows=[], events=[], doing={}, failed=next(snapshots), ledgers=[])

        def get(answer: Any) -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(ray, "get", get)
        coordinator = SimpleNamespace(poll=SimpleNamespace(remote=poll), finish=SimpleNamespace(remote=lambda: finish))
        learner = TrainGroup(fit)
        learner.start()
        learner.join(10.0)
        actors = _Actors(coordinator, SimpleNamespace(ping=SimpleNamespace(remote=lambda: None)), learner, None)
        monkeypatch.setattr(_Follower, "_start", lambda follower: actors)
        with (
            hold(tmp_path, new_lease()) as held,
            _Follower(config, plan, tmp_path, Console(quiet=True), held, attempt=0) as follower,
        ):
            follower.follow()

    return run


def test_a_run_that_fails_after_its_last_step_says_why(follow: Callable[..., None]) -> None:
    """The last evaluation may break once the learner is done; out of `finish` that comes as an error of Ray."""
    reason = "calibration scored fewer than 2 responses"
    remote = RayTaskError("Coordinator.finish", "a traceback", RunFailed(reason)).as_instanceof_cause()
    assert isinstance(remote, RunFailed) and isinstance(remote, RayError)
    with pytest.raises(RunFailed, match=f"^{reason}$"):
        follow(lambda: None, failed=[None, reason, reason], finish=remote)


@pytest.mark.parametrize("error", [ActorDiedError(), OSError("no space left on device"), KeyError("x")])
def test_a_learner_group_that_ends_in_any_error_is_a_failed_run(
    follow: Callable[..., None], error: Exception, tmp_path: Path
) -> None:
    """Only errors of Ray and of Ray Train were noticed."""

    def fit() -> None:
        raise error

    with pytest.raises(RunFailed, match=r"^the learner failed: "):
        follow(fit, failed=[None])
    assert read_jsonl(tmp_path / "events.jsonl")[-1]["event"] == "failure"


def test_a_run_without_a_model_is_not_finished(follow: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"model: no complete model: config\.json cannot be read"):
        follow(lambda: None, failed=[None, None])
    assert [event["event"] for event in read_jsonl(tmp_path / "events.jsonl")] == ["settings", "failure"]
