"""The parts of the dispatch that need no actor: whom to retry, how, and when it is the sample's fault."""

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, OwnerDiedError, RayTaskError

from r3hf_ray.actors.dispatch import LOST_ACTORS, Dispatch, Job, Tally, _is_loss, _Scoring, _Unit
from r3hf_ray.actors.fleet import Fleet
from r3hf_ray.actors.ledger import Ledger
from r3hf_ray.actors.outcome import Outcome, Timeline
from r3hf_ray.types import Request


def make_dispatch(max_attempts: int = 3) -> Dispatch:
    timeline = Timeline()
    fleet = Fleet(pools={}, makers={}, max_gap=1e-3, timeline=timeline, outcome=Outcome(timeline))
    return Dispatch(fleet, max_attempts, Ledger())


def group(size: int, attempt: int = 0) -> list[Request]:
    ids = np.asarray([1, 2], np.int32)
    return [
        Request(row=10 + i, token_ids=ids, prompt_id=i, sample=0, seed=100 + i, attempt=attempt) for i in range(size)
    ]


def job() -> Job:
    return Job(tally=Tally(), number=0, label="step 1", step=1)


def as_rows(units: list[_Unit]) -> list[tuple[list[int], int, bool]]:
    """(prompt ids, attempt, alone) of each."""
    return [([r.prompt_id for r in unit.requests], unit.requests[0].attempt, unit.alone) for unit in units]


def test_an_engine_that_breaks_makes_suspects_and_counts_nothing_until_one_is_alone() -> None:
    dispatch, work = make_dispatch(), job()
    together = dispatch._suspects(work, _Unit(group(3)), "boom")
    assert as_rows(together) == [([0, 1, 2], 0, True)]
    apart = dispatch._suspects(work, together[0], "boom")
    assert as_rows(apart) == [([0], 0, True), ([1], 0, True), ([2], 0, True)]
    assert work.tally == Tally(retried=6)
    again = dispatch._suspects(work, apart[1], "boom")
    assert as_rows(again) == [([1], 1, True)]
    last = dispatch._suspects(work, _Unit(group(1, attempt=2), alone=True), "boom")
    assert (last, work.tally.quarantined) == ([], 1)


def test_the_death_of_an_actor_sends_a_group_again_as_it_is_and_makes_suspects_only_after_many() -> None:
    dispatch, work, unit = make_dispatch(), job(), _Unit(group(2))
    for _ in range(LOST_ACTORS):
        assert dispatch._after_death(work, unit, "killed") == [unit]
    assert as_rows(dispatch._after_death(work, unit, "killed")) == [([0, 1], 0, True)]
    alone = _Unit(group(2), alone=True)
    assert as_rows(dispatch._after_death(work, alone, "killed")) == [([0], 0, True), ([1], 0, True)]
    assert work.tally.quarantined == 0


def test_a_sample_over_which_actors_die_while_it_is_alone_is_given_up() -> None:
    dispatch, work, unit = make_dispatch(), job(), _Unit(group(1), alone=True)
    for _ in range(LOST_ACTORS):
        assert dispatch._after_death(work, unit, "killed") == [unit]
    assert dispatch._after_death(work, unit, "killed") == []
    (event,) = dispatch.fleet.timeline.events
    assert event["event"] == "quarantined" and event["reason"] == "6 actors died over it, the last: killed"


def test_the_last_attempt_is_followed_by_quarantine() -> None:
    dispatch, work = make_dispatch(), job()
    tried = group(3, attempt=2)
    assert dispatch._attempted(work, [(tried[1], "reason 1")], "score") == []
    assert work.tally == Tally(quarantined=1)
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
    (retry,) = make_dispatch()._attempted(job(), [(first[1], "x")], "generate")
    assert (retry.seed, retry.row, retry.prompt_id, retry.attempt) == (first[1].seed, first[1].row, 1, 1)
    assert retry.token_ids is first[1].token_ids


def test_a_scorer_that_dies_leaves_the_group_as_it_is_until_many_have() -> None:
    dispatch, work, state = make_dispatch(), job(), _Scoring({r.key: r for r in group(2)})
    keys = list(state.asked)
    for _ in range(LOST_ACTORS):
        assert dispatch._scorer_died(work, state, keys, "killed") == [keys]
    assert dispatch._scorer_died(work, state, keys, "killed") == [[keys[0]], [keys[1]]]
    for _ in range(LOST_ACTORS):
        assert dispatch._scorer_died(work, state, keys[:1], "killed") == [keys[:1]]
    assert dispatch._scorer_died(work, state, keys[:1], "killed") == []
    assert work.tally.quarantined == 1


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (ObjectLostError("00" * 28, None, ""), True),
        (OwnerDiedError("00" * 28, None, ""), True),
        (RayTaskError("score", "a traceback", ObjectLostError("00" * 28, None, "")), True),
        (RayTaskError("score", "a traceback", ValueError("x")), False),
    ],
)
def test_what_a_host_took_with_it_is_told_from_a_failure(error: Exception, loss: bool) -> None:
    assert _is_loss(error) is loss
