"""Where a run ends that somebody has asked to end: all ranks leave before the same step, and save what they have."""

import asyncio


class Ending:
    """Known to the coordinator alone, which hands out the steps."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._first = self._before = 0
        self._given = -1

    def begin(self, step: int) -> None:
        """A learner group (re)starts at a step; where the run is to end, it does so there."""
        self._first = self._before = step
        self._given = step - 1

    def ask(self) -> bool:
        """End before the first step that no rank was given; whether a step was given that is worth saving."""
        self._before = self._given + 1
        self._asked.set()
        return self._given >= self._first

    async def or_full(self, full: asyncio.Event) -> None:
        """Wait for a batch, or until the run is to end."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (full, self._asked)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    def gives(self, step: int) -> bool:
        """Whether a rank may have its share of a step, which all other ranks then get too."""
        if self._asked.is_set() and step >= self._before:
            return False
        self._given = max(self._given, step)
        return True
