"""Each sample's life as the coordinator sees it: dispatched, generated, scored, then trained or quarantined.

Kept in columns of numbers, by the step that the samples are for, and handed over when the step is closed: 16,384
samples make 65,536 entries, well under a megabyte on disk.
"""

import time
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from r3hf_ray.types import Request, TrajectoryInfo


class State(IntEnum):
    """What happened to a sample; the order of a life."""

    DISPATCHED = 0
    """Sent to a rollout actor, for the first time or again."""
    GENERATED = 1
    SCORED = 2
    TRAINED = 3
    """Its step was taken and its weights were published."""
    QUARANTINED = 4
    """Given up after `rollout.max_attempts`; never trained on."""


UNTRAINED = 0
"""In place of a step: samples of calibration and evaluation, of which no ledger is kept."""
COLUMNS = ("prompt_id", "sample", "dispatch", "state", "version", "at")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLedger:
    """Every entry of the samples of one step, in the order they were made.

    Example, one sample that was dispatched twice: ``prompt_id=[7, 7, 7, 7, 7], sample=[0, 0, 0, 0, 0],
    dispatch=[0, 1, 1, 1, 1], state=[0, 0, 1, 2, 3], version=[-1, -1, 4, 4, 5]``.
    """

    step: int
    """PPO steps done with it, from 1."""
    attempt: int
    """Of the learner group."""
    began_at: int
    """Steps done when that attempt began: it takes back every later step of an earlier attempt."""
    columns: dict[str, np.ndarray]
    """By `COLUMNS`, of equal length; ``version`` is the policy's that sampled it, of a trained one the learner's after
    the step, -1 where there is none yet; ``at`` in unix seconds."""


@dataclass(slots=True)
class Ledger:
    """The open steps; one writer, the coordinator."""

    _open: dict[int, dict[str, "array[Any]"]] = field(default_factory=dict)
    _dispatches: dict[int, Counter[tuple[int, int]]] = field(default_factory=dict)

    def dispatched(self, step: int, requests: Iterable[Request]) -> None:
        """Requests go to a rollout actor."""
        counts = self._dispatches.setdefault(step, Counter())
        keys = [(request.prompt_id, request.sample) for request in requests]
        self._add(step, keys, State.DISPATCHED, [-1] * len(keys), count=True)
        counts.update(keys)

    def generated(self, step: int, infos: Iterable[TrajectoryInfo]) -> None:
        """Responses were sampled."""
        self._of(step, infos, State.GENERATED)

    def scored(self, step: int, infos: Iterable[TrajectoryInfo]) -> None:
        """Their token rewards are there."""
        self._of(step, infos, State.SCORED)

    def quarantined(self, step: int, requests: Iterable[Request]) -> None:
        """They are given up."""
        keys = [(request.prompt_id, request.sample) for request in requests]
        self._add(step, keys, State.QUARANTINED, [-1] * len(keys))

    def close(self, step: int, keys: Iterable[tuple[int, int]], *, attempt: int, began_at: int) -> StepLedger:
        """These samples were trained on in step ``step``; its entries leave the ledger."""
        trained = list(keys)
        self._add(step, trained, State.TRAINED, [step] * len(trained))
        self._dispatches.pop(step, None)
        columns = {name: np.array(values) for name, values in self._open.pop(step).items()}
        return StepLedger(step=step, attempt=attempt, began_at=began_at, columns=columns)

    def pending(self) -> dict[int, list[tuple[int, int]]]:
        """(prompt_id, sample) of all that was dispatched and not yet trained on, by step."""
        return {step: sorted(counts) for step, counts in self._dispatches.items()}

    def drop(self) -> None:
        """The learner group begins again: whatever is open will be dispatched anew."""
        self._open.clear()
        self._dispatches.clear()

    def _of(self, step: int, infos: Iterable[TrajectoryInfo], state: State) -> None:
        infos = list(infos)
        keys = [(info.prompt_id, info.sample) for info in infos]
        self._add(step, keys, state, [info.policy_version for info in infos])

    def _add(
        self, step: int, keys: list[tuple[int, int]], state: State, versions: list[int], *, count: bool = False
    ) -> None:
        if step == UNTRAINED:
            self._dispatches.pop(step, None)
            return
        columns = self._open.get(step)
        if columns is None:
            columns = self._open[step] = {name: array("d" if name == "at" else "q") for name in COLUMNS}
        counts, now = self._dispatches.setdefault(step, Counter()), time.time()
        columns["prompt_id"].extend([prompt_id for prompt_id, _ in keys])
        columns["sample"].extend([sample for _, sample in keys])
        columns["dispatch"].extend([counts[key] - (0 if count else 1) for key in keys])
        columns["state"].extend([int(state)] * len(keys))
        columns["version"].extend(versions)
        columns["at"].extend([now] * len(keys))
