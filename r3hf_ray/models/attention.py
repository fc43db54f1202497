"""How a model attends: by which implementation, and whether it has to be told where its rows are padded.

Rows are padded on the right and models are causal, so no token sees padding. A mask that says so changes nothing, but
keeps SDPA from its fastest kernels and makes grouped-query models copy their keys and values.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import first_line

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
PROBE_TOKENS = 16
"""Length of the longest row of a probe. [tokens]"""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference of two ways through one model, in parts of the largest value; their rounding differs."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Fields of a configuration that name a window, which no short probe can see."""


def options(config: PreTrainedConfig, source: Any, asked: Attention) -> dict[str, str]:
    """What to ask of transformers: its own choice is SDPA, which leaves soft-capping out without a word.

    Raises:
        ModelError: SDPA is asked for by name where it would.
    """
    said = config.get_text_config().to_dict()
    capped = any(value and "attn" in name and "softcap" in name for name, value in said.items())
    if capped and asked == "sdpa":
        raise ModelError(f"{source}: its attention is soft-capped, which sdpa leaves out; set model.attention = auto")
    if capped or asked == "eager":
        return {"attn_implementation": "eager"}
    return {"attn_implementation": "sdpa"} if asked == "sdpa" else {}


def hidden_states(model: PreTrainedModel, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states ``[B, T, H]`` of a model's trunk, without any head."""
    trunk = model.base_model
    return trunk(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids from all over the vocabulary, the last one no padding, and their mask."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, PROBE_TOKENS + 1) * rows // (PROBE_TOKENS + 1)
    ids[-1] -= int(ids[-1] == model.config.get_text_config().pad_token_id)
    return ids[None].to(model.device), torch.ones_like(ids)[None].to(model.device)


def hidden_as_made(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states under the attention that transformers has chosen, or under the plain one where that is another."""
    chosen, fast = model.config._attn_implementation, hidden_states(model, ids, mask)
    if chosen == "eager":
        return fast
    model.set_attn_implementation("eager")
    plain = hidden_states(model, ids, mask)
    if not close(fast, plain, TOLERANCE[model.dtype]):
        return plain
    model.set_attn_implementation(chosen)
    return fast


def close(ours: Tensor, said: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by ``tolerance`` times the largest of ``said`` at most."""
    scale = float(said.float().nan_to_num().abs().max())
    return torch.allclose(ours.float(), said.float(), rtol=0.0, atol=tolerance * scale, equal_nan=True)


@torch.no_grad()
def settle(model: PreTrainedModel, source: Any, asked: Attention) -> None:
    """Take up flash attention where it is asked for, and leave padding masks out where they change no bit.

    Raises:
        ModelError: another attention was asked for than gives the scores of the plain one, or it cannot be had.
    """
    if asked == "sdpa" and model.config._attn_implementation != "sdpa":
        raise ModelError(f"{source}: sdpa does not give the scores of its plain attention; set model.attention = auto")
    if not _needs_mask(model):
        model.base_model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    if asked == "flash_attention_2":
        try:
            model.set_attn_implementation(asked)
        except (ImportError, ValueError) as error:
            raise ModelError(f"{source}: model.attention = flash_attention_2: {first_line(error)}") from error


def _needs_mask(model: PreTrainedModel) -> bool:
    """Whether the states of a ragged batch's tokens depend on being told of the padding behind them."""
    said = model.config.get_text_config().to_dict()
    if any(said.get(name) for name in _WINDOWS):
        return True
    ids = probe(model)[0].repeat(3, 1)
    mask = torch.arange(PROBE_TOKENS) < torch.tensor([[PROBE_TOKENS], [PROBE_TOKENS // 2], [3]])
    mask = mask.to(ids.device)
    trunk, trains = model.base_model, model.base_model.training
    trunk.eval()
    told, untold = (
        trunk(input_ids=ids, attention_mask=given, use_cache=False).last_hidden_state for given in (mask, None)
    )
    trunk.train(trains)
    return not torch.equal(told[mask], untold[mask])


def _without_mask(trunk: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Only where no row is padded on the left, as the prompts of generation are."""
    mask = named.get("attention_mask")
    drops = mask is not None and named.get("use_cache") is False and bool(mask[:, 0].all())
    return given, named | ({"attention_mask": None} if drops else {})
