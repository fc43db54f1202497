"""The fleet without actors: who counts as lost, how often a failing member is borne, and who leaves."""

import asyncio
import time
from typing import Any

import pytest

from r3hf_ray.actors.fleet import FAILURES_IN_A_ROW, Fleet
from r3hf_ray.actors.members import Member, MemberLost, Pool
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.actors.pulse import Pulse


def make_fleet(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> tuple[Fleet, list[str]]:
    """A fleet whose members serve, and the names of those that are asked for again."""
    timeline, watched = Timeline(), list[str]()
    fleet = Fleet(
        pools={"rollout": Pool("rollout", 32)},
        makers={},
        max_gap=1e-3,
        timeline=timeline,
        outcome=Outcome(timeline),
        deadlines={"rollout": 10.0},
    )
    for number in range(count):
        member = Member(f"rollout {number}", "rollout", None, serves=True, lives=1, moved=time.monotonic())
        fleet.rollouts.members.append(member)

    async def arrive(_: Fleet, member: Member, how: str) -> None:
        watched.append(member.name)

    monkeypatch.setattr(Fleet, "_arrive", arrive)
    monkeypatch.setattr("ray.kill", lambda handle, no_restart=True: watched.append("killed"))
    return fleet, watched


def told(fleet: Fleet) -> list[tuple[str, str]]:
    return [(event["event"], event["actor"]) for event in fleet.timeline.events]


def test_a_dead_actor_is_lost_once_and_what_it_held_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        fleet, watched = make_fleet(monkeypatch)
        work = await fleet.rollouts.take(0, 4)
        fleet.lost(work.member, "killed", 1)
        fleet.lost(work.member, "killed", 1)
        with pytest.raises(MemberLost, match="killed"):
            await work.answer
        await asyncio.sleep(0)
        assert watched == ["rollout 0"]
        assert told(fleet) == [("failure", "rollout 0")]
        assert (await fleet.rollouts.take(1, 4)).member.name == "rollout 1"

    asyncio.run(main())


def test_an_earlier_life_says_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _ = make_fleet(monkeypatch)
    (member, _) = fleet.rollouts.members
    member.lives = 2
    fleet.lost(member, "killed", 1)
    assert not member.lost and fleet.timeline.events == []


def test_failures_in_a_row_start_a_member_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        fleet, watched = make_fleet(monkeypatch)
        work = await fleet.rollouts.take(0, 4)
        for number in range(FAILURES_IN_A_ROW):
            assert not work.member.lost, number
            fleet.failed(work, "CUDA error")
        await asyncio.sleep(0)
        assert work.member.lost and "3 failures in a row, the last: CUDA error" in work.member.reason
        assert sorted(watched) == ["killed", "rollout 0"]

    asyncio.run(main())


@pytest.mark.parametrize(("moves", "state"), [(True, "slow"), (False, "lost"), (None, "busy")])
def test_past_its_deadline_who_gets_on_is_slow_and_who_does_not_is_replaced(
    monkeypatch: pytest.MonkeyPatch, moves: bool | None, state: str
) -> None:
    async def main() -> None:
        fleet, _ = make_fleet(monkeypatch)
        work = await fleet.rollouts.take(0, 4)
        member, past = work.member, time.monotonic() - (11.0 if moves is not None else 9.0)
        member.pulse, member.moved, work.since = Pulse(node="n", pid=1, progress=5), past, past
        fleet._judge(member, Pulse(node="n", pid=1, progress=6 if moves else 5))
        assert member.info.state == state
        expected: list[Any] = {"slow": ["slow"], "lost": ["failure"], "busy": []}[state]
        assert [event["event"] for event in fleet.timeline.events] == expected
        assert all("rollout.deadline" in event["reason"] for event in fleet.timeline.events)

    asyncio.run(main())


def test_those_that_do_not_work_yet_leave_first_and_then_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        fleet, watched = make_fleet(monkeypatch, 4)
        fleet.rollouts.members[1].serves = False
        held = await fleet.rollouts.take(0, 4)
        fleet.shrink("rollout", 2)
        assert [member.name for member in fleet.rollouts.members if member.leaves] == ["rollout 1", "rollout 3"]
        await asyncio.sleep(0.1)
        assert [member.name for member in fleet.rollouts.members] == ["rollout 0", "rollout 2"]
        assert watched == ["killed", "killed"] and not held.answer.done()

    asyncio.run(main())


def test_who_leaves_and_does_not_end_hands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        fleet, _ = make_fleet(monkeypatch, 1)
        fleet.patience = 0.1
        work = await fleet.rollouts.take(0, 4)
        fleet.shrink("rollout", 1)
        with pytest.raises(MemberLost, match="it leaves"):
            await asyncio.wait_for(work.answer, 5.0)

    asyncio.run(main())
