"""How a rank ends a run and what Ray Train's controller makes of it, without Ray; groups are in `test_end_to_end`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from r3hf_ray.actors import learner
from r3hf_ray.actors.learner import LearnerSettings, RestartGuard, train_loop
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import DivergenceError, ModelError, RunFailed


class FakeCoordinator:
    """The handle of a coordinator in this process: `fail` ends the run, `poll` says whether it has ended."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.fail = SimpleNamespace(remote=self._fail)
        self.group_lost = SimpleNamespace(remote=self._group_lost)
        self.losses: list[str] = []

    def _fail(self, sentence: str) -> None:
        self.failed = sentence
        raise RunFailed("a remote traceback")

    def _group_lost(self, reason: str) -> str:
        self.losses.append(reason)
        return self.failed or ""


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.get_actor` finds."""
    named: dict[str, Any] = {"coordinator": FakeCoordinator(), "weight_store": None}

    def get_actor(name: str, namespace: str) -> Any:
        if name not in named:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return named[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return named


@pytest.fixture
def settings(tmp_path: Path) -> LearnerSettings:
    config = PPOConfig(run={"name": "x"}, model={"policy": "p", "reward_model": "r"}, data={"source": "d"})
    return LearnerSettings(
        config=config, run_folder=tmp_path, namespace="x", probe_ids=[], write_samples=print, token="x.host"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ModelError("critic: no trained weights"), "critic: no trained weights"),
        (DivergenceError("policy/loss nan"), "policy/loss nan"),
        (TypeError("unsupported operand"), f"the learner broke (TypeError in {__file__}, line "),
    ],
    ids=["model", "divergence", "code"],
)
def test_what_would_happen_again_ends_the_run_where_a_rank_is_built_too(
    actors: dict[str, Any],
    settings: LearnerSettings,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    sentence: str,
) -> None:
    def build(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(learner, "_Rank", build)
    with pytest.raises(RunFailed, match=r"^(?!a remote)"):
        train_loop({"learner": settings})
    assert actors["coordinator"].failed.startswith(sentence)
    with pytest.raises(RunFailed):
        RestartGuard("x").after_exception(None, {0: error})


def test_a_lost_process_is_no_end(
    actors: dict[str, Any], settings: LearnerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any) -> None:
        raise RuntimeError("Connection closed by peer")  # what gloo says

    monkeypatch.setattr(learner, "_Rank", build)
    with pytest.raises(RuntimeError, match="closed by peer"):
        train_loop({"learner": settings})
    assert actors["coordinator"].failed is None
    RestartGuard("x").after_exception(None, {1: RuntimeError("Connection closed by peer"), 0: RuntimeError("on a")})
    assert actors["coordinator"].losses == ["rank 0: on a; rank 1: Connection closed by peer"]


def test_a_rank_without_a_coordinator_is_not_broken_code(actors: dict[str, Any], settings: LearnerSettings) -> None:
    """The driver has taken the coordinator away, so the group is not started again."""
    del actors["coordinator"]
    with pytest.raises(ValueError, match="look up actor"):
        train_loop({"learner": settings})
    with pytest.raises(RunFailed, match="the coordinator is gone"):
        RestartGuard("x").after_exception(None, {0: ValueError()})


def test_a_rank_that_finds_no_weight_store_is_started_again(actors: dict[str, Any], settings: LearnerSettings) -> None:
    del actors["weight_store"]
    with pytest.raises(ValueError, match="look up actor"):
        train_loop({"learner": settings})
    RestartGuard("x").after_exception(None, {0: ValueError()})
