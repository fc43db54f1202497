"""How a run stands: the first reason, whoever waits, and the words of each kind of actor."""

import asyncio

import pytest

from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.errors import RunFailed


def test_the_first_reason_stands() -> None:
    timeline = Timeline()
    outcome = Outcome(timeline)
    outcome.check()
    for sentence in ("first", "second"):
        with pytest.raises(RunFailed, match="first"):
            outcome.fail(sentence)
    with pytest.raises(RunFailed, match="first"):
        outcome.check()
    assert [event["reason"] for event in timeline.events] == ["first"]


def test_a_background_task_that_breaks_ends_the_run_with_its_reason() -> None:
    async def main() -> None:
        outcome = Outcome(Timeline())

        async def broken() -> None:
            raise KeyError("missing")

        with pytest.raises(RunFailed):
            await outcome.guard(broken())
        assert outcome.sentence == "the coordinator broke: KeyError: 'missing'"

    asyncio.run(main())


def test_a_cancelled_task_is_no_failure() -> None:
    async def main() -> None:
        outcome = Outcome(Timeline())
        task = asyncio.create_task(outcome.guard(asyncio.sleep(10)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outcome.check()

    asyncio.run(main())


def test_waiting_ends_with_the_run() -> None:
    async def main() -> None:
        outcome = Outcome(Timeline())
        done = asyncio.Event()
        done.set()
        await outcome.or_failure(done.wait())
        waiting = asyncio.create_task(outcome.or_failure(asyncio.Event().wait()))
        await asyncio.sleep(0)
        with pytest.raises(RunFailed):
            outcome.fail("over")
        with pytest.raises(RunFailed, match="over"):
            await asyncio.wait_for(waiting, 1.0)

    asyncio.run(main())


def test_actors_say_what_they_do_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("r3hf_ray.actors.outcome.time.time", lambda: clock[0])
    timeline = Timeline()
    timeline.now("reward", "idle")
    clock[0] += 7
    timeline.now("reward", "idle")
    timeline.now("rollout", "generating")
    assert timeline.doing() == {"reward": "idle (7 s)", "rollout": "generating (0 s)"}
    timeline.now("reward", "scoring")
    assert timeline.doing()["reward"] == "scoring (0 s)"
