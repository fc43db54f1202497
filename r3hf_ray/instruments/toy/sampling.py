"""Samples of a toy policy for data and measurements: a batched loop with a key-value cache (PPO samples with vLLM)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r3hf_ray.instruments.toy.language import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of a policy.

    Example: ``Sample(request=Request(0, 0, True), prompt_ids=[1, 4, 12, 15, 3], response_ids=[8, 17, 47, 2])``
    """

    request: Request
    prompt_ids: list[int]
    response_ids: list[int]
    """EOS included; without it the response was cut at the limit."""


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    max_response_tokens: int,
    seed: int,
    batch_size: int = 512,
) -> list[Sample]:
    """One response at temperature 1 to each request, in order. Every toy prompt has 5 tokens, so nothing is padded."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        prompts = [render_prompt(tokenizer, request) for request in batch]
        responses = _continue(model, torch.tensor(prompts), tokenizer.eos_token_id, max_response_tokens, generator)
        samples += [
            Sample(request=request, prompt_ids=prompt, response_ids=response)
            for request, prompt, response in zip(batch, prompts, responses, strict=True)
        ]
    return samples


def render_prompt(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """Token ids of the rendered generation prompt."""
    message = [{"role": "user", "content": request.text}]
    ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids


def _continue(
    model: PreTrainedModel, prompts: torch.Tensor, eos_id: int, limit: int, generator: torch.Generator
) -> list[list[int]]:
    tokens, cache = prompts, None
    columns: list[torch.Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    while len(columns) < limit and not ended.all():
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        columns.append(tokens)
        ended |= tokens[:, 0] == eos_id
    rows = torch.cat(columns, dim=1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]
