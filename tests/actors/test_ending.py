"""A run that is to end: every rank hears it before the same step, whenever it asks."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from r3hf_ray.actors.ending import Ending


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10.0))


def test_a_step_that_one_rank_has_all_ranks_get() -> None:
    async def scene() -> None:
        ending = Ending()
        ending.begin(3)
        assert ending.gives(3), "rank 0"
        assert ending.ask(), "step 3 is under way, and worth saving"
        assert ending.gives(3), "rank 1 asks late"
        assert not ending.gives(4) and not ending.gives(4)

    run(scene())


def test_ranks_that_wait_for_a_batch_are_released() -> None:
    async def scene() -> None:
        ending, full = Ending(), asyncio.Event()
        ending.begin(0)
        assert ending.gives(0)
        waiting = [asyncio.create_task(ending.or_full(full)) for _ in range(2)]
        await asyncio.sleep(0)
        ending.ask()
        await asyncio.gather(*waiting)
        assert not ending.gives(1)

    run(scene())


def test_a_full_batch_is_no_end() -> None:
    async def scene() -> None:
        ending, full = Ending(), asyncio.Event()
        ending.begin(0)
        full.set()
        await ending.or_full(full)
        assert ending.gives(0) and ending.gives(1)

    run(scene())


def test_without_a_step_there_is_nothing_to_save() -> None:
    async def scene() -> None:
        ending = Ending()
        ending.begin(5)
        assert not ending.ask()
        assert not ending.gives(5)

    run(scene())


def test_a_group_that_starts_again_while_the_run_ends_does_no_step() -> None:
    async def scene() -> None:
        ending = Ending()
        ending.begin(0)
        assert ending.gives(0) and ending.ask()
        ending.begin(0)  # a rank died on its last step
        assert not ending.gives(0)

    run(scene())
