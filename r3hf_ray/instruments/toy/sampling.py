"""Samples of a toy policy for data and measurements, by transformers' `generate` (PPO samples with vLLM)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r3hf_ray.instruments.toy.language import ToyRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySample:
    """One response of a policy.

    Example: ``ToySample(request=ToyRequest(0, 0, True), prompt_ids=[1, 4, 12, 15, 3], response_ids=[8, 17, 47, 2])``
    """

    request: ToyRequest
    prompt_ids: list[int]
    response_ids: list[int]
    """EOS included; without it the response was cut at the limit."""


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[ToyRequest],
    *,
    max_response_tokens: int,
    seed: int,
    batch_size: int = 512,
) -> list[ToySample]:
    """One response at temperature 1 to each request, in order. Every toy prompt has 5 tokens, so nothing is padded."""
    model.eval()
    eos = tokenizer.eos_token_id
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": max_response_tokens,
        # Answers go to disk as text, where the name of a control token is text that this tokenizer has no token for.
        "suppress_tokens": [tokenizer.bos_token_id, tokenizer.pad_token_id],
    }
    samples: list[ToySample] = []
    with torch.random.fork_rng(devices=[]):  # generate draws from the global state, which is the caller's
        torch.manual_seed(seed)
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            prompts = torch.tensor([render_prompt(tokenizer, request) for request in batch])
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)
            for request, prompt, row in zip(batch, prompts.tolist(), rows.tolist(), strict=True):
                response = row[len(prompt) :]
                ends = response.index(eos) + 1 if eos in response else len(response)
                samples.append(ToySample(request=request, prompt_ids=prompt, response_ids=response[:ends]))
    return samples


def render_prompt(tokenizer: PreTrainedTokenizerBase, request: ToyRequest) -> list[int]:
    """Token ids of the rendered generation prompt."""
    message = [{"role": "user", "content": request.text}]
    ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids
