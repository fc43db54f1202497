"""Log-probabilities of sampled tokens: the one place where logits are shifted."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from r3hf_ray.models.load import hidden_states


def token_logprobs(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
) -> Float[Tensor, "B T"]:
    """``log pi(token_t | tokens_<t)`` at ``temperature`` where ``response_mask``, 0 elsewhere; float32, differentiable.

    The vocabulary is projected on at response positions only: with 49k tokens that is most of the work and memory.

    Args:
        model: a causal language model.
        token_ids: prompt + response, right-padded.
        attention_mask: True on prompt and response.
        response_mask: True on sampled tokens; never on the first token, which nothing predicts.
        temperature: logits are divided by it.
    """
    logits, targets = _response_logits(model, token_ids, attention_mask, response_mask, temperature)
    return _at_responses(-F.cross_entropy(logits, targets, reduction="none"), response_mask)


@torch.no_grad()
def token_logprobs_and_entropy(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    temperature: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """`token_logprobs` without gradient, and the entropy of the distribution each token was drawn from. [nats]"""
    logits, targets = _response_logits(model, token_ids, attention_mask, response_mask, temperature)
    logprobs = F.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return _at_responses(chosen, response_mask), _at_responses(entropy, response_mask)


class Policy(nn.Module):
    """A causal language model whose forward is `token_logprobs`: the unit to shard, as FSDP's hooks fire on forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

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
        return function(self.model, token_ids, attention_mask, response_mask, temperature=temperature)


def _response_logits(
    model: PreTrainedModel,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    temperature: float,
) -> tuple[Float[Tensor, "N V"], Int64[Tensor, "N"]]:
    """Float32 logits about each response token, which stand one position before it, and the tokens themselves."""
    hidden = hidden_states(model, token_ids, attention_mask)
    sampled = response_mask[:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][sampled]).float()
    return logits if temperature == 1.0 else logits / temperature, token_ids[:, 1:][sampled]


def _at_responses(values: Float[Tensor, "N"], response_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """One value a response token back into ``[B, T]``; connected to the graph even when there is none."""
    return values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)
