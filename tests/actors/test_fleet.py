"""The fleet without actors: who is picked, who counts as lost, and that what ends a group's thread is never lost."""

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from r3hf_ray.actors.fleet import Fleet, Member, TrainGroup
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.errors import RunFailed


def make_fleet() -> Fleet:
    timeline = Timeline()
    return Fleet([], [], max_gap=1e-3, timeline=timeline, outcome=Outcome(timeline))


def members(*names: str) -> list[Member]:
    return [Member(name, f"handle of {name}", alive=True) for name in names]


def test_one_working_member_is_picked_in_turn() -> None:
    fleet = make_fleet()
    three = members("rollout 0", "rollout 1", "rollout 2")

    async def pick(number: int) -> str:
        return (await fleet.pick(three, number)).name

    assert [asyncio.run(pick(number)) for number in range(4)] == ["rollout 0", "rollout 1", "rollout 2", "rollout 0"]
    three[1].alive = False
    assert [asyncio.run(pick(number)) for number in range(4)] == ["rollout 0", "rollout 2", "rollout 2", "rollout 0"]


def test_whoever_needs_an_actor_waits_until_one_is_back_or_the_run_is_over() -> None:
    async def main() -> None:
        fleet = make_fleet()
        (only,) = members("reward 0")
        only.alive = False
        waiting = asyncio.create_task(fleet.pick([only], 0))
        await asyncio.sleep(0.01)
        fleet.came_back.set()  # somebody else's
        await asyncio.sleep(0.01)
        assert not waiting.done()
        only.alive = True
        fleet.came_back.set()
        assert await asyncio.wait_for(waiting, 1.0) is only

        only.alive = False
        waiting = asyncio.create_task(fleet.pick([only], 0))
        await asyncio.sleep(0.01)
        with pytest.raises(RunFailed):
            fleet.outcome.fail("over")
        with pytest.raises(RunFailed, match="over"):
            await asyncio.wait_for(waiting, 1.0)

    asyncio.run(main())


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("busy", None), RayActorError()])
def test_a_dead_actor_is_lost_once(error: RayActorError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        fleet = make_fleet()
        watched: list[Member] = []

        async def arrive(_: Fleet, member: Member, how: str) -> None:
            watched.append(member)

        monkeypatch.setattr(Fleet, "_arrive", arrive)
        (member,) = members("rollout 0")
        assert [fleet.lost(member, error, 0), fleet.lost(member, error, 0)] == [1, 1]
        await asyncio.sleep(0)
        assert watched == [member]
        assert not member.alive
        assert [(event["event"], event["actor"]) for event in fleet.timeline.events] == [("failure", "rollout 0")]

    asyncio.run(main())


def test_an_ordinary_failure_loses_no_actor() -> None:
    fleet = make_fleet()
    (member,) = members("rollout 0")
    for error in (RayTaskError("f", "Traceback\nValueError: x", ValueError("x")), ObjectLostError("00" * 28, None, "")):
        assert fleet.lost(member, error, 0) == 0
    assert member.alive
    assert fleet.timeline.events == []


def ended(fit: Callable[[], None]) -> TrainGroup:
    """A group whose `fit` has ended."""
    group = TrainGroup(fit)
    group.start()
    group.join(10.0)
    assert not group.is_alive()
    return group


@pytest.mark.parametrize("error", [ActorDiedError(), KeyError("controller"), SystemExit(1)])
def test_whatever_ends_a_group_is_kept(error: BaseException) -> None:
    """A controller that is killed is no `TrainingFailedError`; a command that knew only those said it was finished."""

    def fit() -> None:
        raise error

    assert ended(fit).error is error


def test_a_group_that_came_to_its_end_has_no_error() -> None:
    assert ended(lambda: None).error is None
