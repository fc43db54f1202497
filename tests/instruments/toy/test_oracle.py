"""The oracle pays every token its known credit."""

import torch

from r3hf_ray.algorithms.redistribution import PrefixScores, RedistributionInputs
from r3hf_ray.instruments.toy.language import gold_credit, make_tokenizer
from r3hf_ray.instruments.toy.oracle import GOLD_STD, gold_token_rewards


def test_every_token_earns_its_known_credit_and_nothing_else_does() -> None:
    tokenizer = make_tokenizer()
    prompt = "<bos> gardening no-slang politely :"
    responses = ["gardens grow . <eos>", "gardens grow . gardens grow ."]
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    rows = [tokenizer(f"{prompt} {response}").input_ids for response in responses]
    width = max(map(len, rows)) + 1
    token_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    place = torch.arange(width)
    mask = (place >= 5) & (place < torch.tensor([len(row) for row in rows])[:, None])
    zero = torch.zeros(2, width)
    scores = PrefixScores(prefix=zero, prompt=zero[:, 0], pooled=zero[:, 0])
    inputs = RedistributionInputs(
        scores=scores,
        response_mask=mask,
        token_ids=token_ids,
        finished=torch.tensor([True, False]),
        behavior_logprobs=zero,
        ref_logprobs=zero,
        by_model={"reward": scores},
    )
    rewards = gold_token_rewards(inputs)
    for row, response in enumerate(responses):
        torch.testing.assert_close(rewards[row][mask[row]] * GOLD_STD, torch.tensor(gold_credit(prompt, response)))
    assert rewards[~mask].abs().sum() == 0
    assert rewards[0].sum() > 0 > rewards[1][mask[1]][-1]  # a fact; cut at the limit
