"""Who gets the next piece of work; no actor is needed for that."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from r3hf_ray.actors.members import Member, MemberLost, MemberState, Pool, Work

SOON = 0.02
"""A moment, so that tasks get on. [s]"""


def pool_of(count: int, *, room: int = 32, **options: bool) -> Pool:
    pool = Pool("rollout", room, **options)
    for number in range(count):
        pool.members.append(Member(f"rollout {number}", "rollout", None, serves=True, lives=1))
    return pool


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 10.0))


async def names(pool: Pool, *sizes: int, **options: Any) -> list[str]:
    return [(await pool.take(number, size, **options)).member.name for number, size in enumerate(sizes)]


def test_the_least_loaded_gets_it_and_the_first_of_equals() -> None:
    async def scene() -> None:
        assert await names(pool_of(3), 4, 2, 1, 1, 1, 4) == [f"rollout {n}" for n in (0, 1, 2, 1 + 1, 1, 2)]

    play(scene)


def test_whoever_finds_no_room_waits_in_order_and_a_lower_number_overtakes() -> None:
    async def scene() -> None:
        pool = pool_of(1, room=16)
        first = await pool.take(5, 16)
        served: list[int] = []

        async def ask(number: int) -> Work:
            work = await pool.take(number, 8)
            served.append(number)
            return work

        waiting = [asyncio.create_task(ask(number)) for number in (9, 8, 2)]
        await asyncio.sleep(SOON)
        assert served == []
        pool.done(first)
        await asyncio.sleep(SOON)
        assert sorted(served) == [2, 8]
        pool.done(waiting[2].result())
        await asyncio.sleep(SOON)
        assert set(served) == {2, 8, 9}

    play(scene)


def test_a_group_that_is_larger_than_all_room_goes_where_nothing_else_is() -> None:
    async def scene() -> None:
        assert await names(pool_of(2, room=4), 9, 3) == ["rollout 0", "rollout 1"]

    play(scene)


def test_what_must_go_at_once_needs_no_room() -> None:
    async def scene() -> None:
        assert await names(pool_of(1, room=4), 4, 4, 4, at_once=True) == ["rollout 0"] * 3

    play(scene)


def test_groups_of_a_scorer_are_counted_and_not_their_responses() -> None:
    async def scene() -> None:
        pool = pool_of(2, room=2, single=True)
        assert await names(pool, 99, 1, 1, 1) == ["rollout 0", "rollout 1", "rollout 0", "rollout 1"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.take(4, 1), SOON)

    play(scene)


def test_fixed_is_by_number_and_waits_for_the_member_that_starts() -> None:
    async def scene() -> None:
        pool = pool_of(2, fixed=True)
        assert await names(pool, 1, 1, 1, 1) == ["rollout 0", "rollout 1", "rollout 0", "rollout 1"]
        pool.members[1].serves = False
        waiting = asyncio.create_task(pool.take(5, 1))
        assert (await pool.take(6, 1)).member.name == "rollout 0", "who comes behind is not held back"
        assert not waiting.done()
        pool.members[1].serves = True
        pool.serve()
        assert (await waiting).member.name == "rollout 1"
        pool.members[1].lost = True
        pool.lose(pool.members[1], "killed")
        assert (await pool.take(7, 1)).member.name == "rollout 0"

    play(scene)


def test_a_suspect_is_alone_and_others_go_on_elsewhere() -> None:
    async def scene() -> None:
        pool = pool_of(2)
        busy = [await pool.take(0, 4), await pool.take(1, 2)]
        suspect = asyncio.create_task(pool.take(0, 1, alone=True))
        await asyncio.sleep(SOON)
        assert [(await pool.take(n, 1)).member.name for n in (3, 4)] == ["rollout 0"] * 2, "rollout 1 is kept for it"
        pool.done(busy[1])
        work = await suspect
        assert (work.member.name, work.member.held) == ("rollout 1", {work.number: work})
        assert (await pool.take(5, 1)).member.name == "rollout 0"
        pool.done(work)
        assert (await pool.take(6, 1)).member.name == "rollout 1"

    play(scene)


def test_a_suspect_whose_member_dies_meanwhile_goes_to_another() -> None:
    async def scene() -> None:
        pool = pool_of(2)
        busy = [await pool.take(0, 4), await pool.take(1, 2)]
        suspect = asyncio.create_task(pool.take(0, 1, alone=True))
        await asyncio.sleep(SOON)
        pool.lose(pool.members[1], "killed")
        pool.done(busy[0])
        assert (await suspect).member.name == "rollout 0"
        with pytest.raises(MemberLost, match="killed"):
            await busy[1].answer

    play(scene)


def test_who_failed_at_it_gets_it_only_if_there_is_no_other() -> None:
    async def scene() -> None:
        pool = pool_of(2)
        await pool.take(0, 4)
        failed = pool.members[1]
        assert (await pool.take(1, 1, avoid=failed)).member.name == "rollout 0"
        failed_too = pool.members[0]
        pool.lose(failed, "killed")
        assert (await pool.take(2, 1, avoid=failed_too)).member.name == "rollout 0"

    play(scene)


def test_a_waiter_that_is_cancelled_takes_no_room() -> None:
    async def scene() -> None:
        pool = pool_of(1, room=4)
        first = await pool.take(0, 4)
        waiting = asyncio.create_task(pool.take(1, 4))
        await asyncio.sleep(0)
        pool.done(first)  # it is given in this moment
        waiting.cancel()
        await asyncio.sleep(SOON)
        assert pool.members[0].held == {} and pool.members[0].load == 0

    play(scene)


@pytest.mark.parametrize("gone", ["leaves", "drained"])
def test_who_leaves_gets_no_new_work_and_is_called_draining(gone: str) -> None:
    async def scene() -> None:
        pool = pool_of(2)
        leaver = pool.members[0]
        if gone == "leaves":
            leaver.leaves = True
        else:
            leaver.drained = True
        assert await names(pool, 1, 1) == ["rollout 1"] * 2
        assert (leaver.info.state, pool.members[1].info.state) == (MemberState.DRAINING, MemberState.BUSY)
        assert (pool.members[1].info.groups, pool.members[1].info.requests) == (2, 2)

    play(scene)
