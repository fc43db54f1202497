"""Reward models whose score is the running sum of their head over all tokens, not the head at the last one.

A copy of this file lies in every folder such a model is saved to. Plain transformers runs it with
``trust_remote_code=True`` and refuses the folder without, so that nothing takes the head for one that is read at the
last token. That is why it imports torch and transformers only.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class RunningSumConfig(PreTrainedConfig):
    """Configuration of the trunk (any model that `AutoModel` knows) as ``text_config``, and one label."""

    model_type = "r3hf_running_sum"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(self, text_config: dict[str, Any] | PreTrainedConfig, **kwargs: Any) -> None:
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        super().__init__(**{"num_labels": 1, **kwargs})


class RunningSumForSequenceClassification(PreTrainedModel):
    """A trunk and a linear head; the logit of a sequence is the sum of what the head says at each of its tokens.

    With ``R(x, y_<=t) = sum_{s<=t} head(h_s)`` the reward of a token, ``R(x, y_<=t) - R(x, y_<t)``, is ``head(h_t)``.
    The prompt's part of the sum is the same for all answers to it. The head stays in float32, and its weight has a name
    of its own, so that no usual class finds it even where someone insists on one.
    """

    config_class = RunningSumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["token_score.weight"]

    def __init__(self, config: RunningSumConfig) -> None:
        super().__init__(config)
        self.num_labels = 1
        self.model = AutoModel.from_config(config.text_config)
        self.token_score = nn.Linear(state_size(config.text_config), 1, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """A fresh head says 0: random values would add up to scores that grow with the length."""
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutputWithPast:
        """``logits`` [B, 1], float32; padding on either side adds nothing.

        Args:
            input_ids: token ids [B, T].
            attention_mask: 0 on padding [B, T]; may be left out for a single row.
            kwargs: for the trunk.

        Raises:
            ValueError: several rows and no mask, so that padding would be summed.
        """
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **kwargs})
        hidden = output.last_hidden_state
        if attention_mask is None:
            if len(hidden) > 1:
                raise ValueError("a running-sum reward model needs attention_mask: padding must not be summed")
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            token_scores = self.token_score(hidden.to(self.token_score.weight.dtype))[..., 0]
        return SequenceClassifierOutputWithPast(
            logits=running_sum(token_scores, attention_mask)[:, -1:],
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


def state_size(config: PreTrainedConfig) -> int:
    """Size of a trunk's last hidden states, which OPT projects to that of its embeddings."""
    text = config.get_text_config()
    return int(text.to_dict().get("word_embed_proj_dim") or text.hidden_size)


def running_sum(token_scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Sum of a row's token scores up to each token [B, T], float32; masked tokens add nothing.

    It adds in float64 and rounds once, so that the order of adding does not show, and two neighbours differ by a
    token's score within 1.2e-7 times the sum's size, however long the row.

    Args:
        token_scores: what the head says at each token [B, T].
        attention_mask: 0 or False on padding [B, T].
    """
    kept = token_scores.double().masked_fill(~attention_mask.bool(), 0.0)
    return kept.cumsum(1).float()
