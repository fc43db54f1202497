"""Seeds, prompt order and dealing as pure integers, so no rank, pid or clock decides anything (layer 0)."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from r3hf_ray.sections.actors import RolloutSection
from r3hf_ray.types import Request


def seed_of(*parts: int | str) -> int:
    """A 31-bit seed from what identifies the draw, e.g. (run seed, "sample", prompt_id, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def stream_row(seed: int, prompt_id: int, rows: int) -> int:
    """The row of prompt `prompt_id`: a seeded permutation for each epoch, so a resumed run sees the same order."""
    epoch, position = divmod(prompt_id, rows)
    return int(_permutation(seed, epoch, rows)[position])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def step_requests(prompts: Sequence[np.ndarray], rollout: RolloutSection, *, seed: int, step: int) -> list[Request]:
    """The samples that PPO step `step` (from 0) trains on, in order of (prompt_id, sample)."""
    requests = []
    for prompt_id in range(step * rollout.prompts_per_step, (step + 1) * rollout.prompts_per_step):
        row = stream_row(seed, prompt_id, len(prompts))
        for sample in range(rollout.samples_per_prompt):
            draw = seed_of(seed, "sample", prompt_id, sample)
            requests.append(Request(row=row, token_ids=prompts[row], prompt_id=prompt_id, sample=sample, seed=draw))
    return requests


def stream_requests(prompts: Sequence[np.ndarray], count: int, *, seed: int, stream: str) -> list[Request]:
    """`count` samples outside the training stream (`heldout`, `calibration`), one a prompt, over again if need be."""
    rows = [number % len(prompts) for number in range(count)]
    return [
        Request(row=row, token_ids=prompts[row], prompt_id=number, sample=0, seed=seed_of(seed, stream, number))
        for number, row in enumerate(rows)
    ]


def groups_of(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Consecutive requests in groups of `size`, the last of what is left: fixed by what they are, not by arrival."""
    return [list(requests[start : start + size]) for start in range(0, len(requests), size)]


def length_blocks(lengths: Sequence[int], minibatches: int) -> list[list[int]]:
    """Indices sorted by length, cut in blocks of `minibatches`: each block gives one item to each minibatch.

    A minibatch then holds every length, and since blocks are dealt to ranks whole, both its composition and the
    balance over ranks are good for any number of ranks.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + minibatches] for i in range(0, len(order), minibatches)]


def deal_to_ranks(lengths: Sequence[int], *, minibatches: int, ranks: int) -> list[list[int]]:
    """Which items each rank trains on: blocks dealt there and back (0 1 1 0 0 1 ...), so token counts match."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for number, block in enumerate(length_blocks(lengths, minibatches)):
        lap, position = divmod(number, ranks)
        shares[position if lap % 2 == 0 else ranks - 1 - position].extend(block)
    return [sorted(share) for share in shares]


def minibatch_of(lengths: Sequence[int], *, minibatches: int, seed: int, step: int, epoch: int) -> list[int]:
    """The minibatch of each item in one epoch; it does not depend on the number of ranks."""
    rng = np.random.default_rng([seed, step, epoch])
    assignment = [0] * len(lengths)
    for block in length_blocks(lengths, minibatches):
        for item, minibatch in zip(block, rng.permutation(minibatches), strict=False):
            assignment[item] = int(minibatch)
    return assignment
