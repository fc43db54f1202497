"""How a screening ends when something goes wrong: at once, with a sentence, and with nothing left running."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import RunFailed
from r3hf_ray.instruments.compare import screening
from r3hf_ray.instruments.compare.arm_runs import PlannedRun
from r3hf_ray.instruments.compare.screening import screened

MakeJob = Callable[..., PPOConfig]


class Pool:
    """The first run ends well; of the second it is said how it ends."""

    def __init__(self, end: Callable[[Future[Any]], None]) -> None:
        self.end, self.futures, self.shut = end, [], {}

    def submit(self, function: Callable[..., Any], run: PlannedRun) -> Future[Any]:
        future: Future[Any] = Future()
        self.futures.append(future)
        if len(self.futures) == 1:
            future.set_result({"event": "finished", "seconds": 1.0})
        else:
            self.end(future)
        return future

    def shutdown(self, **how: bool) -> None:
        self.shut = how


@pytest.fixture
def runs(small_job: MakeJob) -> list[PlannedRun]:
    config = small_job()
    return [PlannedRun(arm=name, seed=0, config=config) for name in ("a", "b")]


def test_a_process_that_died_is_one_sentence(runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(lambda future: future.set_exception(BrokenProcessPool("gone")))
    monkeypatch.setattr(screening, "ProcessPoolExecutor", lambda *_, **__: pool)
    with pytest.raises(RunFailed, match="one of the 2 processes of the screening died"):
        list(screened(runs, processes=2))
    assert pool.shut == {"wait": False, "cancel_futures": True}


def test_whoever_stops_listening_stops_the_runs(runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(lambda future: None)
    monkeypatch.setattr(screening, "ProcessPoolExecutor", lambda *_, **__: pool)
    outcomes = screened(runs, processes=2)
    run, outcome = next(outcomes)
    assert (run.arm, outcome["event"]) == ("a", "finished") and not pool.shut
    outcomes.close()  # what Ctrl-C and an error of the caller come to
    assert pool.shut == {"wait": False, "cancel_futures": True}


@pytest.mark.parametrize(("error", "reason"), [(TypeError("no"), "TypeError: no"), (RunFailed("so"), "so")])
def test_a_run_that_breaks_is_an_outcome(
    runs: list[PlannedRun], error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise error

    monkeypatch.setattr(screening, "_workbench", Broken)
    outcome = screening._run(runs[0])
    assert (outcome["event"], outcome["reason"]) == ("failed", reason)
