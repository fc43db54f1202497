"""The critic: a trunk with a scalar head, and the values of the states between tokens."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from r3hf_ray.models.attention import Attention, hidden_states
from r3hf_ray.models.load import load_policy, load_reward_model, score_head
from r3hf_ray.models.running_sum import RunningSumForSequenceClassification, running_sum, state_size


class Critic(nn.Module):
    """``value = (head(hidden) - mean) / scale``, the head in float32 whatever the trunk's data type.

    ``mean`` and ``scale`` bring a head that was trained as a reward model's to the units of the scaled reward;
    ``summed`` is 1 where that head adds up over the tokens so far, as in its reward model. All three are buffers, so
    that a checkpoint holds them.
    """

    mean: Tensor
    scale: Tensor
    summed: Tensor

    def __init__(self, trunk: PreTrainedModel, *, mean: float = 0.0, scale: float = 1.0, summed: bool = False) -> None:
        """A critic with a zero head, whose first values are ``-mean / scale``.

        Raises:
            ValueError: ``scale`` is not positive.
        """
        super().__init__()
        if not scale > 0.0:
            raise ValueError(f"a critic's scale must be positive, got {scale}")
        self.trunk = trunk
        self.head = nn.Linear(state_size(trunk.config), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("summed", torch.tensor(int(summed)))  # sharded checkpoints know no bool

    def forward(self, token_ids: Int64[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The value of the state *after* each token; `state_values` shifts it."""
        scores = self.head(hidden_states(self.trunk, token_ids, attention_mask).float())[..., 0]
        if self.summed:
            scores = running_sum(scores, attention_mask)
        return (scores - self.mean) / self.scale


def state_values(
    critic: nn.Module,
    token_ids: Int64[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """``V(s_t)``, the state before token t, that is the critic at position t - 1; 0 outside ``response_mask``."""
    after = critic(token_ids, attention_mask)
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
    return before.masked_fill(~response_mask, 0.0)


def critic_from_policy(source: str | Path, dtype: torch.dtype, *, attention: Attention = "auto") -> Critic:
    """The policy's trunk with a zero head.

    Raises:
        ModelError: the policy cannot be loaded.
    """
    return Critic(load_policy(source, dtype, attention=attention).base_model).eval()


def critic_from_reward_model(
    source: str | Path,
    dtype: torch.dtype,
    *,
    keep_head: bool,
    mean: float,
    scale: float,
    attention: Attention = "auto",
) -> Critic:
    """The reward model's trunk with a zero head, or with its score head.

    Args:
        source: reward model folder or hub name.
        dtype: of the trunk.
        keep_head: start from the score head, so that values are the normalised prefix scores ``(R - mean) / scale``;
            a running-sum head goes on adding up. Without it values start at 0, and ``mean`` and ``scale`` have no use.
        mean: mean of the sequence reward under the initial policy.
        scale: its standard deviation, > 0.
        attention: of the trunk.

    Raises:
        ModelError: the reward model cannot be loaded.
        ValueError: ``keep_head`` and ``scale`` is not positive.
    """
    model = load_reward_model(source, dtype, attention=attention)
    if not keep_head:
        return Critic(model.base_model).eval()
    summed, head = isinstance(model, RunningSumForSequenceClassification), score_head(model)
    critic = Critic(model.base_model, mean=mean, scale=scale, summed=summed)
    with torch.no_grad():
        critic.head.weight.copy_(head.weight)
        if head.bias is not None:
            critic.head.bias.copy_(head.bias)
    return critic.eval()
