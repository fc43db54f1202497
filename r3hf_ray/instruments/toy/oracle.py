"""The known credit of the toy language as token rewards: what a perfect reward model's redistribution would pay.

A control for comparisons: ``reward.mode = "r3hf_ray.instruments.toy.oracle:gold_token_rewards"`` with
``reward.calibration_samples = 0``, since these rewards are in units of their own.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r3hf_ray.algorithms.redistribution import RedistributionInputs
from r3hf_ray.instruments.toy.language import gold_credit, make_tokenizer

GOLD_STD = 2.2
"""Spread of the gold reward of an initial policy with responses of up to 48 tokens."""


def gold_token_rewards(inputs: RedistributionInputs) -> Float[Tensor, "B T"]:
    """The true credit of every response token, in standard deviations of the initial policy's gold reward.

    For responses of up to 48 tokens. Not potential-based in the reward model's score: it is another reward.
    """
    tokenizer = _tokenizer()
    rewards = torch.zeros_like(inputs.ref_logprobs)
    for row, (token_ids, mask) in enumerate(zip(inputs.token_ids, inputs.response_mask, strict=True)):
        places = mask.nonzero()[:, 0].tolist()
        if places:
            prompt, response = token_ids[: places[0]].tolist(), token_ids[places].tolist()
            credit = gold_credit(tokenizer.decode(prompt), tokenizer.decode(response))
            rewards[row, places] = torch.tensor(credit, dtype=rewards.dtype, device=rewards.device) / GOLD_STD
    return rewards


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
