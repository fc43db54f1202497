"""Publications: how they are grouped and fingerprinted, and what counts as proof that one was loaded."""

from dataclasses import replace

import numpy as np
import pytest

from r3hf_ray.weights.contract import (
    Loaded,
    Probe,
    Publication,
    WeightTensor,
    buckets,
    fingerprint,
    fingerprint_of_all,
    objection,
    published,
)

PROBE = Probe(token_ids=[1, 2], logprobs=[-0.5])
PUBLICATION = Publication(version=3, parts=["a part"], fingerprint="17ab", num_bytes=48, probe=PROBE)
ANSWER = Loaded(version=3, fingerprint="17ab", probe_gap=1e-7, seconds=0.1)


def test_an_honest_answer_proves_a_load() -> None:
    assert objection(PUBLICATION, ANSWER, max_gap=1e-3) == ""
    broadcast = replace(PUBLICATION, parts=[], fingerprint="")
    assert objection(broadcast, replace(ANSWER, fingerprint=""), max_gap=1e-3) == ""


@pytest.mark.parametrize(
    ("publication", "answer", "words"),
    [
        (PUBLICATION, replace(ANSWER, version=2), "answered version 2"),
        (PUBLICATION, replace(ANSWER, fingerprint="17ac"), "another fingerprint"),
        (PUBLICATION, replace(ANSWER, probe_gap=0.1), "other logprobs than the learner"),
        (PUBLICATION, replace(ANSWER, probe_gap=float("nan")), "other logprobs than the learner"),
        (published(3, [], probe=PROBE), replace(ANSWER, fingerprint=fingerprint_of_all({})), "no content"),
        (replace(PUBLICATION, num_bytes=0), ANSWER, "no content"),
        (replace(PUBLICATION, fingerprint="", probe=None), replace(ANSWER, fingerprint=""), "no content to compare"),
    ],
    ids=["version", "fingerprint", "probe", "nan", "nothing published", "no bytes", "nothing to compare"],
)
def test_what_does_not_prove_a_load(publication: Publication, answer: Loaded, words: str) -> None:
    assert words in objection(publication, answer, max_gap=1e-3)


def test_a_fingerprint_does_not_know_the_order_of_tensors_but_all_else() -> None:
    of_each = {"a": "01", "b": "02", "c": "03"}
    whole = fingerprint_of_all(of_each)
    assert fingerprint_of_all(dict(reversed(of_each.items()))) == whole
    others = [{"a": "02", "b": "01", "c": "03"}, {"a": "01", "b": "02"}, {"a": "01", "b": "02", "d": "03"}]
    assert whole not in map(fingerprint_of_all, others)


def test_a_tensors_fingerprint_is_of_its_numbers_in_row_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    other = array.copy()
    other[2, 3] = np.nextafter(other[2, 3], np.float32(np.inf))
    assert fingerprint(array) == fingerprint(np.asfortranarray(array))
    assert fingerprint(array) != fingerprint(other)
    assert fingerprint(array) != fingerprint(array.T)


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"),
    [
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([4, 4, 4], 12, [[4, 4, 4]]),
        ([4, 20, 4], 8, [[4], [20], [4]]),
        ([20, 4, 4], 8, [[20], [4, 4]]),
        ([], 8, []),
    ],
)
def test_buckets_hold_all_in_order_up_to_their_size(
    sizes: list[int], max_bytes: int, expected: list[list[int]]
) -> None:
    items = [WeightTensor(name="w", dtype="uint8", array=np.zeros(size, np.uint8), fingerprint="") for size in sizes]
    grouped = list(buckets(items, max_bytes=max_bytes))
    assert [[tensor.array.nbytes for tensor in bucket] for bucket in grouped] == expected
    assert [tensor for bucket in grouped for tensor in bucket] == items
