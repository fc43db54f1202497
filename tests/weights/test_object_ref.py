"""Publications: what they are made of, who keeps them, and that they outlive the process that made them."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError

from r3hf_ray.weights.contract import Probe, Publication, WeightTensor, fingerprint
from r3hf_ray.weights.object_ref import WeightStore, publish


class OpenStore(WeightStore):
    """A store that shows what it holds."""

    def held(self) -> dict[int, int]:
        return {version: len(refs) for version, refs in self._versions.items()}


class Publisher:
    """A learner rank that may die."""

    def publish(self, store: Any, version: int) -> Publication:
        return publish(store, version, tensors(version), probe=None, max_bytes=20)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def tensors(version: int) -> Iterator[WeightTensor]:
    for i in range(3):
        array = np.full(4, version + i / 10, np.float32)
        yield WeightTensor(name=f"layer.{i}", dtype="float32", array=array, fingerprint=fingerprint(array))


@pytest.fixture
def store(local_ray: None) -> Iterator[Any]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor = ray.remote(OpenStore).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_two_versions_are_kept_and_older_ones_dropped(store: Any) -> None:
    for version, held in [(0, {0: 3}), (1, {0: 3, 1: 3}), (2, {1: 3, 2: 3}), (3, {2: 3, 3: 3})]:
        publication = publish(store, version, tensors(version), probe=None, max_bytes=20)
        assert (publication.version, publication.num_bytes, len(publication.parts)) == (version, 48, 3)
        assert ray.get(store.held.remote()) == held
        assert [tensor.array[0] for (tensor,) in ray.get(publication.parts)] == pytest.approx(
            [version, version + 0.1, version + 0.2]
        )


@pytest.mark.ray
def test_an_interrupted_publication_leaves_nothing(store: Any) -> None:
    publish(store, 4, tensors(4), probe=None, max_bytes=20)
    ray.get(store.put.remote(5, list(tensors(5))[:1]))
    publish(store, 5, tensors(5), probe=None, max_bytes=20)
    assert ray.get(store.held.remote()) == {4: 3, 5: 3}


@pytest.mark.ray
def test_a_learner_that_begins_again_publishes_over_later_versions(store: Any) -> None:
    for version in (4, 5, 3):
        publish(store, version, tensors(version), probe=None, max_bytes=20)
    assert ray.get(store.held.remote()) == {3: 3}


@pytest.mark.ray
def test_a_publication_outlives_its_publisher(store: Any) -> None:
    publisher = ray.remote(Publisher).options(num_cpus=0).remote()
    publication = ray.get(publisher.publish.remote(store, 7))
    with pytest.raises(RayActorError):
        ray.get(publisher.die.remote())
    arrived = [tensor for bucket in ray.get(publication.parts, timeout=20) for tensor in bucket]
    sent = list(tensors(7))
    assert [(tensor.name, tensor.fingerprint) for tensor in arrived] == [(t.name, t.fingerprint) for t in sent]
    for ours, theirs in zip(arrived, sent, strict=True):
        np.testing.assert_array_equal(ours.array, theirs.array)


@pytest.mark.ray
def test_the_probe_travels_with_its_publication(store: Any) -> None:
    probe = Probe(token_ids=[1, 2, 3], logprobs=[-0.5, -0.25])
    assert publish(store, 1, tensors(1), probe=probe, max_bytes=20).probe == probe
