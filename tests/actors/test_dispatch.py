"""The parts of the dispatch that need no actor: whom to retry and how."""

import numpy as np

from r3hf_ray.actors.dispatch import Dispatch, Tally
from r3hf_ray.actors.fleet import Fleet
from r3hf_ray.actors.ledger import Ledger
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.types import Failure, Request


def make_dispatch(max_attempts: int = 3) -> Dispatch:
    timeline = Timeline()
    return Dispatch(Fleet([], [], max_gap=1e-3, timeline=timeline, outcome=Outcome(timeline)), max_attempts, Ledger())


def group(size: int, attempt: int = 0) -> list[Request]:
    ids = np.asarray([1, 2], np.int32)
    return [
        Request(row=10 + i, token_ids=ids, prompt_id=i, sample=0, seed=100 + i, attempt=attempt) for i in range(size)
    ]


def failures(*prompt_ids: int) -> list[Failure]:
    return [Failure(prompt_id=i, sample=0, call="score", reason=f"reason {i}") for i in prompt_ids]


def again(dispatch: Dispatch, requests: list[Request], *failed: int) -> tuple[list[list[tuple[int, int]]], Tally]:
    """Groups to try again, as (prompt_id, attempt)."""
    tally = Tally()
    groups = dispatch._again(tally, requests, failures(*failed), 1)
    return [[(request.prompt_id, request.attempt) for request in each] for each in groups], tally


def test_nothing_failed_nothing_again() -> None:
    assert again(make_dispatch(), group(3)) == ([], Tally())


def test_samples_that_failed_go_again_one_by_one() -> None:
    assert again(make_dispatch(), group(4), 1, 3) == ([[(1, 1)], [(3, 1)]], Tally(retried=2))


def test_a_whole_call_goes_again_whole_once_and_then_one_by_one() -> None:
    assert again(make_dispatch(), group(3), 0, 1, 2)[0] == [[(0, 1), (1, 1), (2, 1)]]
    assert again(make_dispatch(), group(3, attempt=1), 0, 1, 2)[0] == [[(0, 2)], [(1, 2)], [(2, 2)]]


def test_with_two_attempts_the_second_is_one_by_one_so_that_the_innocent_survive() -> None:
    assert again(make_dispatch(max_attempts=2), group(3), 0, 1, 2)[0] == [[(0, 1)], [(1, 1)], [(2, 1)]]


def test_the_last_attempt_is_followed_by_quarantine() -> None:
    dispatch = make_dispatch()
    assert again(dispatch, group(3, attempt=2), 1) == ([], Tally(quarantined=1))
    (event,) = dispatch.fleet.timeline.events
    assert {name: event[name] for name in ("event", "prompt_id", "row", "sample", "call", "reason")} == {
        "event": "quarantined",
        "prompt_id": 1,
        "row": 11,
        "sample": 0,
        "call": "score",
        "reason": "reason 1",
    }


def test_retries_keep_seed_and_prompt() -> None:
    first = group(2)
    ((retry,),) = make_dispatch()._again(Tally(), first, failures(1), 1)
    assert (retry.seed, retry.row, retry.prompt_id) == (first[1].seed, first[1].row, 1)
    assert retry.token_ids is first[1].token_ids
