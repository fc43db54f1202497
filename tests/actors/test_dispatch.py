"""The parts of the pipeline that need no actor: the verdict, the stages' words, whom to retry and how."""

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from r3hf_ray.actors.dispatch import Events, Member, Pipeline, Tally, Verdict, members
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.types import Failure, Request


def make_pipeline(max_attempts: int = 3) -> Pipeline:
    events = Events()
    return Pipeline([], [], max_attempts=max_attempts, max_gap=1e-3, events=events, verdict=Verdict(events))


def group(size: int, attempt: int = 0) -> list[Request]:
    ids = np.asarray([1, 2], np.int32)
    return [
        Request(row=10 + i, token_ids=ids, prompt_id=i, sample=0, seed=100 + i, attempt=attempt) for i in range(size)
    ]


def failures(*prompt_ids: int) -> list[Failure]:
    return [Failure(prompt_id=i, sample=0, stage="score", reason=f"reason {i}") for i in prompt_ids]


def again(pipeline: Pipeline, requests: list[Request], *failed: int) -> tuple[list[list[tuple[int, int]]], Tally]:
    """Groups to try again, as (prompt_id, attempt)."""
    tally = Tally()
    groups = pipeline._again(tally, requests, failures(*failed))
    return [[(request.prompt_id, request.attempt) for request in each] for each in groups], tally


def test_nothing_failed_nothing_again() -> None:
    assert again(make_pipeline(), group(3)) == ([], Tally())


def test_samples_that_failed_go_again_one_by_one() -> None:
    assert again(make_pipeline(), group(4), 1, 3) == ([[(1, 1)], [(3, 1)]], Tally(retried=2))


def test_a_whole_call_goes_again_whole_once_and_then_one_by_one() -> None:
    assert again(make_pipeline(), group(3), 0, 1, 2)[0] == [[(0, 1), (1, 1), (2, 1)]]
    assert again(make_pipeline(), group(3, attempt=1), 0, 1, 2)[0] == [[(0, 2)], [(1, 2)], [(2, 2)]]


def test_with_two_attempts_the_second_is_one_by_one_so_that_the_innocent_survive() -> None:
    assert again(make_pipeline(max_attempts=2), group(3), 0, 1, 2)[0] == [[(0, 1)], [(1, 1)], [(2, 1)]]


def test_the_last_attempt_is_followed_by_quarantine() -> None:
    pipeline = make_pipeline()
    assert again(pipeline, group(3, attempt=2), 1) == ([], Tally(quarantined=1))
    (event,) = pipeline.events.list
    assert {name: event[name] for name in ("event", "prompt_id", "row", "sample", "stage", "reason")} == {
        "event": "quarantined",
        "prompt_id": 1,
        "row": 11,
        "sample": 0,
        "stage": "score",
        "reason": "reason 1",
    }


def test_retries_keep_seed_and_prompt() -> None:
    first = group(2)
    ((retry,),) = make_pipeline()._again(Tally(), first, failures(1))
    assert (retry.seed, retry.row, retry.prompt_id) == (first[1].seed, first[1].row, 1)
    assert retry.token_ids is first[1].token_ids


def test_one_working_member_is_picked_in_turn() -> None:
    pipeline = make_pipeline()
    three = members("rollout", ["a", "b", "c"])

    async def pick(number: int) -> str:
        return (await pipeline._pick(three, number)).name

    assert [asyncio.run(pick(number)) for number in range(4)] == ["rollout 0", "rollout 1", "rollout 2", "rollout 0"]
    three[1].alive = False
    assert [asyncio.run(pick(number)) for number in range(4)] == ["rollout 0", "rollout 2", "rollout 2", "rollout 0"]


def test_whoever_needs_an_actor_waits_until_one_is_back_or_the_run_is_over() -> None:
    async def main() -> None:
        pipeline = make_pipeline()
        (only,) = members("reward", ["handle"])
        only.alive = False
        waiting = asyncio.create_task(pipeline._pick([only], 0))
        await asyncio.sleep(0.01)
        pipeline.came_back.set()  # somebody else's
        await asyncio.sleep(0.01)
        assert not waiting.done()
        only.alive = True
        pipeline.came_back.set()
        assert await asyncio.wait_for(waiting, 1.0) is only

        only.alive = False
        waiting = asyncio.create_task(pipeline._pick([only], 0))
        await asyncio.sleep(0.01)
        with pytest.raises(RunFailed):
            pipeline.verdict.fail("over")
        with pytest.raises(RunFailed, match="over"):
            await asyncio.wait_for(waiting, 1.0)

    asyncio.run(main())


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("busy", None), RayActorError()])
def test_a_dead_actor_is_lost_once(error: RayActorError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pipeline = make_pipeline()
        watched: list[Member] = []

        async def recover(_: Pipeline, member: Member) -> None:
            watched.append(member)

        monkeypatch.setattr(Pipeline, "_recover", recover)
        (member,) = members("rollout", ["handle"])
        assert [pipeline.lost(member, error), pipeline.lost(member, error)] == [1, 1]
        await asyncio.sleep(0)
        assert watched == [member]
        assert not member.alive
        assert [(event["event"], event["actor"]) for event in pipeline.events.list] == [("failure", "rollout 0")]

    asyncio.run(main())


def test_an_ordinary_failure_loses_no_actor() -> None:
    pipeline = make_pipeline()
    (member,) = members("rollout", ["handle"])
    for error in (RayTaskError("f", "Traceback\nValueError: x", ValueError("x")), ObjectLostError("00" * 28, None, "")):
        assert pipeline.lost(member, error) == 0
    assert member.alive
    assert pipeline.events.list == []


# ---------------------------------------------------------------------- the verdict


def test_the_first_reason_stands() -> None:
    events = Events()
    verdict = Verdict(events)
    verdict.check()
    for sentence in ("first", "second"):
        with pytest.raises(RunFailed, match="first"):
            verdict.fail(sentence)
    with pytest.raises(RunFailed, match="first"):
        verdict.check()
    assert [event["reason"] for event in events.list] == ["first"]


def test_a_background_task_that_breaks_ends_the_run_with_its_reason() -> None:
    async def main() -> None:
        verdict = Verdict(Events())

        async def broken() -> None:
            raise KeyError("missing")

        with pytest.raises(RunFailed):
            await verdict.guard(broken())
        assert verdict.sentence == "the coordinator broke: KeyError: 'missing'"

    asyncio.run(main())


def test_a_cancelled_task_is_no_failure() -> None:
    async def main() -> None:
        verdict = Verdict(Events())
        task = asyncio.create_task(verdict.guard(asyncio.sleep(10)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        verdict.check()

    asyncio.run(main())


def test_waiting_ends_with_the_run() -> None:
    async def main() -> None:
        verdict = Verdict(Events())
        done = asyncio.Event()
        done.set()
        await verdict.or_failure(done.wait())
        waiting = asyncio.create_task(verdict.or_failure(asyncio.Event().wait()))
        await asyncio.sleep(0)
        with pytest.raises(RunFailed):
            verdict.fail("over")
        with pytest.raises(RunFailed, match="over"):
            await asyncio.wait_for(waiting, 1.0)

    asyncio.run(main())


def test_stages_say_what_they_do_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("r3hf_ray.actors.dispatch.time.time", lambda: clock[0])
    events = Events()
    events.stage("reward", "idle")
    clock[0] += 7
    events.stage("reward", "idle")
    events.stage("rollout", "generating")
    assert events.stages() == {"reward": "idle (7 s)", "rollout": "generating (0 s)"}
    events.stage("reward", "scoring")
    assert events.stages()["reward"] == "scoring (0 s)"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("Traceback ...\n  File x\nKeyError: 'a'\n\n"), "KeyError: 'a'"),
        (ValueError(""), "ValueError"),
        (ValueError("r3hf_ray.actors.dispatch.RunFailed: no weights"), "no weights"),
        (ValueError("plain"), "plain"),
    ],
)
def test_the_sentence_of_an_error_is_its_last_line(error: Any, sentence: str) -> None:
    assert sentence_of(error) == sentence
