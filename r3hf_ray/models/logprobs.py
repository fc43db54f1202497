"""Log-probabilities of sampled tokens: the one place where logits are shifted.

The vocabulary is projected on at response positions only, and at some of them at a time: the logits of a whole
microbatch, in float32 and several times over, would be the largest thing in a step.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from r3hf_ray.models.attention import hidden_states

CHUNK = 1024
"""Response tokens whose logits exist at one time, where nothing else is said. [tokens]"""


def token_logprobs(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
    chunk: int = CHUNK,
) -> Float[Tensor, "B T"]:
    """``log pi(token_t | tokens_<t)`` at ``temperature`` where ``response_mask``, 0 elsewhere; float32, differentiable.

    Args:
        model: a causal language model, its head linear.
        token_ids: prompt + response, right-padded.
        attention_mask: True on prompt and response.
        response_mask: True on sampled tokens; never on the first token, which nothing predicts.
        temperature: logits are divided by it.
        chunk: response tokens whose logits exist at one time, computed again in backward. [tokens]
    """
    head = model.get_output_embeddings()
    hidden, targets = _before_responses(model, token_ids, attention_mask, response_mask)
    chosen = _ChosenLogprobs.apply(hidden, head.weight, head.bias, head, targets, temperature, chunk)
    return _at_responses(chosen, response_mask)


@torch.no_grad()
def token_logprobs_and_entropy(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """`token_logprobs` without gradient, and the entropy of the distribution each token was drawn from. [nats]"""
    head = model.get_output_embeddings()
    hidden, targets = _before_responses(model, token_ids, attention_mask, response_mask)
    chosen, entropy = hidden.new_empty(2, len(targets), dtype=_wide(hidden.dtype))
    for rows in _chunks(len(targets), chunk):
        logprobs = _logprobs(head, hidden[rows], temperature)
        chosen[rows] = logprobs.gather(1, targets[rows, None])[:, 0]
        entropy[rows] = -(logprobs.exp() * logprobs).sum(-1)
    return _at_responses(chosen, response_mask), _at_responses(entropy, response_mask)


class Policy(nn.Module):
    """A causal language model whose forward is `token_logprobs`: the unit to shard, as FSDP's hooks fire on forward."""

    def __init__(self, model: PreTrainedModel, *, chunk: int = CHUNK) -> None:
        """``chunk`` as in `token_logprobs`."""
        super().__init__()
        self.model, self._chunk = model, chunk

    def forward(
        self,
        token_ids: Int64[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        response_mask: Bool[Tensor, "B T"],
        *,
        temperature: float,
        entropy: bool = False,
    ) -> Float[Tensor, "B T"] | tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Logprobs, or (logprobs, entropy) without gradient."""
        function = token_logprobs_and_entropy if entropy else token_logprobs
        arrays = (token_ids, attention_mask, response_mask)
        return function(self.model, *arrays, temperature=temperature, chunk=self._chunk)


class _ChosenLogprobs(torch.autograd.Function):
    """The logprob of each row's target, with the logits of one chunk at a time, forward and backward.

    Each step is what autograd does for a cross-entropy of all rows at once, so that the gradient of ``hidden`` has its
    bits. The head's is summed over chunks, in float32 whatever the weights are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: nn.Module,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        """``weight`` and ``bias`` are those of ``head``, which is called, as a hook may mask ids that are no token."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        chosen = hidden.new_empty(len(targets), dtype=_wide(hidden.dtype))
        for rows in _chunks(len(targets), chunk):
            part = hidden.detach()[rows]  # a tracker's hook on the head would look for a graph
            chosen[rows] = _logprobs(head, part, temperature).gather(1, targets[rows, None])[:, 0]
        return chosen

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """``outer`` is one gradient, a number a row."""
        hidden, weight, targets = ctx.saved_tensors
        wide, (_, learns, biased, *_) = _wide(weight.dtype), ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=wide) if learns else None
        of_bias = weight.new_zeros(len(weight), dtype=wide) if biased else None
        for rows in _chunks(len(targets), ctx.chunk):
            part = hidden[rows]
            logprobs = _logprobs(ctx.head, part, ctx.temperature)
            of_logits = torch.zeros_like(logprobs).scatter_(1, targets[rows, None], outer[0][rows, None])
            of_logits = torch._log_softmax_backward_data(of_logits, logprobs, 1, logprobs.dtype)
            del logprobs
            of_logits = of_logits.div_(ctx.temperature).to(part.dtype)
            torch.mm(of_logits, weight, out=of_hidden[rows])
            if of_weight is not None:
                _add_product(of_weight, of_logits, part)
            if of_bias is not None:
                of_bias += of_logits.sum(0, dtype=wide)
        of_head = (None if total is None else total.to(weight.dtype) for total in (of_weight, of_bias))
        return of_hidden, *of_head, None, None, None, None


def _add_product(total: Tensor, of_logits: Tensor, hidden: Tensor) -> None:
    """``total += of_logits.T @ hidden``, a float32 total of 16-bit factors too."""
    if total.dtype == hidden.dtype or not total.is_cuda:
        total.addmm_(of_logits.t().to(total.dtype), hidden.to(total.dtype))
    else:  # in 16 bits a GPU multiplies many times as fast
        total += torch.mm(of_logits.t(), hidden, out_dtype=total.dtype)


def _before_responses(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "N H"], Int64[Tensor, "N"]]:
    """The hidden state before each response token, one position to its left, and the tokens themselves."""
    hidden = hidden_states(model, token_ids, attention_mask)
    sampled = response_mask[:, 1:]
    return hidden[:, :-1][sampled], token_ids[:, 1:][sampled]


def _logprobs(head: nn.Module, hidden: Float[Tensor, "N H"], temperature: float) -> Float[Tensor, "N V"]:
    """Of the whole vocabulary, in float32; without gradient."""
    logits = head(hidden).to(_wide(hidden.dtype))
    return F.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


def _chunks(rows: int, chunk: int) -> list[slice]:
    """Even parts of at most ``chunk`` rows, at least one; below 32 rows a matrix product would round otherwise."""
    count = max(1, -(-rows // chunk))
    ends = [rows * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _at_responses(values: Float[Tensor, "N"], response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """One value a response token back into ``[B, T]``; connected to the graph even when there is none."""
    return values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)
