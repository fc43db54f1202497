"""Credit methods under screening: what each pays, token by token, and that all keep R3HF's sum."""

import pytest
import torch

from r3hf_ray.algorithms.redistribution import PrefixScores, RedistributionInputs, r3hf
from r3hf_ray.instruments.compare.candidates import agreed, smoothed
from r3hf_ray.types import MAIN

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)


def scores(seed: int) -> PrefixScores:
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randn(2, 4, generator=generator).masked_fill(~MASK, 0.0)
    prompt, pooled = torch.randn(2, 2, generator=generator)
    return PrefixScores(prefix=prefix, prompt=prompt, pooled=pooled)


def inputs(*others: PrefixScores) -> RedistributionInputs:
    own, nothing = scores(0), torch.zeros(2, 4)
    return RedistributionInputs(
        scores=own,
        response_mask=MASK,
        token_ids=nothing.long(),
        finished=torch.tensor([True, True]),
        behavior_logprobs=nothing,
        ref_logprobs=nothing,
        by_model={MAIN: own} | {f"other{i}": other for i, other in enumerate(others)},
    )


@pytest.mark.parametrize("method", [smoothed, agreed])
def test_the_sum_is_that_of_r3hf_and_padding_earns_nothing(method) -> None:
    given = inputs(scores(1))
    rewards = method(given)
    torch.testing.assert_close(rewards.sum(1), given.scores.pooled - given.scores.prompt)
    assert not torch.equal(rewards, r3hf(given.scores, MASK))
    assert rewards[~MASK].abs().sum() == 0


def test_smoothed_pays_half_of_what_is_new() -> None:
    given, own = inputs(), scores(0)
    rewards = smoothed(given)
    torch.testing.assert_close(rewards[0, 1], (own.prefix[0, 1] - own.prompt[0]) / 2)
    torch.testing.assert_close(rewards[0, 2], (own.prefix[0, 2] - rewards[0, 1] - own.prompt[0]) / 2)


def test_agreed_is_r3hf_where_all_agree_and_half_where_they_differ_by_as_much_as_they_say() -> None:
    own = scores(0)
    torch.testing.assert_close(agreed(inputs(own, own)), r3hf(own, MASK))
    silent = PrefixScores(prefix=own.prompt[:, None].expand(2, 4), prompt=own.prompt, pooled=own.pooled)
    # The mean of x and 0 is x / 2, the variance x^2 / 4: the potential is x / 4.
    torch.testing.assert_close(agreed(inputs(silent))[0, 1], (own.prefix[0, 1] - own.prompt[0]) / 4)
