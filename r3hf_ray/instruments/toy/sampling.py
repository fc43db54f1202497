"""Samples of a toy policy for data and measurements, by transformers' `generate` (PPO samples with vLLM)."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r3hf_ray.instruments.toy.language import ToyRequest


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[ToyRequest],
    *,
    max_response_tokens: int,
    seed: int,
    batch_size: int = 512,
) -> list[list[int]]:
    """One response at temperature 1 to each request, in order, as token ids: EOS included, or cut at the limit.

    Every toy prompt has 5 tokens, so nothing is padded.
    """
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
    responses: list[list[int]] = []
    with torch.random.fork_rng(devices=[]):  # generate draws from the global state, which is the caller's
        torch.manual_seed(seed)
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            prompts = torch.tensor([render_prompt(tokenizer, request) for request in batch])
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)
            for response in rows[:, prompts.shape[1] :].tolist():
                responses.append(response[: response.index(eos) + 1] if eos in response else response)
    return responses


def render_prompt(tokenizer: PreTrainedTokenizerBase, request: ToyRequest) -> list[int]:
    """Token ids of the rendered generation prompt."""
    message = [{"role": "user", "content": request.text}]
    ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids
