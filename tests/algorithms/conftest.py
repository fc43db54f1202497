"""Batches of scores that many tests share."""

from collections.abc import Callable

import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from r3hf_ray.algorithms.redistribution import PrefixScores


@pytest.fixture(scope="session")
def ragged() -> Callable[..., tuple[PrefixScores, Bool[Tensor, "B T"]]]:
    """`ragged(seed=0, dtype=float64, lengths=((prompt, response), ...))`: scores and response mask, right-padded.

    The pooled score differs from the last prefix score.
    """

    def make(seed=0, dtype=torch.float64, lengths=((2, 5), (1, 1), (4, 3), (3, 9))):
        generator = torch.Generator().manual_seed(seed)
        width = max(prompt + response for prompt, response in lengths) + 2
        position = torch.arange(width)
        mask = torch.stack([(position >= p) & (position < p + n) for p, n in lengths])
        prefix = torch.randn(mask.shape, generator=generator, dtype=dtype).masked_fill(~mask, 0.0)
        prompt = torch.randn(len(lengths), generator=generator, dtype=dtype)
        pooled = 3 * torch.randn(len(lengths), generator=generator, dtype=dtype)
        return PrefixScores(prefix=prefix, prompt=prompt, pooled=pooled), mask

    return make
