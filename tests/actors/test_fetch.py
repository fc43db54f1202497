"""A rank's share over real objects: what has come, and what is lost with its owner or never comes."""

from typing import Any

import pytest
import ray

from r3hf_ray.actors.shares import RankShare, fetch

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Owner:
    """Objects that it puts are lost with it."""

    def put(self, value: int) -> list[Any]:
        return [ray.put(value)]

    def never(self) -> None:
        import time

        time.sleep(1000)


def share_of(refs: list[Any]) -> RankShare:
    golds = {(number, 0): None for number in range(len(refs))}
    return RankShare(refs=refs, minibatch_of=[], responses=len(refs), golds=golds, metrics={})


def test_all_that_has_come_in_order(local_ray: None) -> None:
    assert fetch(share_of([ray.put(value) for value in (5, 6, 7)]), timeout=10.0) == ([5, 6, 7], [])


def test_what_is_lost_with_its_owner_or_does_not_come_is_named(local_ray: None) -> None:
    owner = Owner.remote()
    (lost,) = ray.get(owner.put.remote(6))
    late = Owner.remote()
    refs = [ray.put(5), lost, late.never.remote(), ray.put(8)]
    ray.kill(owner)
    assert fetch(share_of(refs), timeout=3.0) == ([5, 8], [(1, 0), (2, 0)])
    ray.kill(late)
