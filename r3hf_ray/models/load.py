"""Models and tokenizers from folders or the hub, checked where a wrong one would otherwise train silently."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models.running_sum import RunningSumConfig, RunningSumForSequenceClassification

CAUSALITY_TOKENS = 16
"""Length of the random sequence that `require_causal` reads. [tokens]"""


def check_folder(source: str | Path, kind: str) -> None:
    """Refuse a local path that holds no model; anything that does not look like a path is left to the hub.

    Args:
        source: folder or hub name.
        kind: what it is for ("policy", "reward model"), used in the sentence.

    Raises:
        ModelError: the folder is absent or has no config.json.
    """
    path = Path(source)
    looks_local = path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and looks_local:
        raise ModelError(f"{source}: no such folder for the {kind}; train it first or name another")
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{source}: no model folder (no config.json); name a folder that transformers saved as {kind}")


def absolute(source: str) -> str:
    """A local folder as an absolute path, since Ray's workers run in another directory; a hub name stays as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model folder.

    Raises:
        ModelError: there is none.
    """
    check_folder(source, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: no tokenizer ({_first_line(error)}); save it beside the model") from error


def load_policy(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model in eval mode (no dropout), with SDPA attention, on the CPU.

    Raises:
        ModelError: it cannot be loaded, weights are missing, or its logits are more than `lm_head(hidden)`:
            logprobs project the response's hidden states only, so soft-capped or scaled logits would come out wrong.
    """
    model = _load(AutoModelForCausalLM, source, dtype, "policy")
    ids = torch.arange(8)[None] + 1
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        logits = model.get_output_embeddings()(hidden_states(model, ids, torch.ones_like(ids)))
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-5, atol=1e-6, equal_nan=True):
        raise ModelError(f"{source}: it caps or scales its logits behind lm_head, which is not supported")
    return model


def load_reward_model(source: str | Path, dtype: torch.dtype, *, attention: str = "sdpa") -> PreTrainedModel:
    """A sequence classifier with one label in eval mode; trunk in ``dtype``, its ``score`` head always in float32.

    Args:
        source: folder or hub name.
        dtype: of the trunk.
        attention: "sdpa", or "eager", the one that can return its attention maps.

    Raises:
        ModelError: it cannot be loaded, has another number of labels, lacks trained weights, or is no decoder with a
            linear ``score`` head.
    """
    check_folder(source, "reward model")
    labels = _config(source, "reward model").num_labels
    if labels != 1:
        raise ModelError(f"{source}: a reward model has one label, this has {labels}; train one with `r3hf reward`")
    model = _load(AutoModelForSequenceClassification, source, dtype, "reward model", attention)
    score_head(model).float()
    return model


def untrained_reward_model(source: str | Path, *, head: str) -> PreTrainedModel:
    """A base model's trunk under a fresh score head, in float32 on the CPU, to be trained as a reward model.

    Args:
        source: any base; a reward model with this very kind of head keeps its own.
        head: "last_token" (random, read at the last token) or "running_sum" (zero, summed over all tokens).

    Raises:
        ModelError: it cannot be loaded, or it is a running-sum reward model and the other kind is asked for.
    """
    check_folder(source, "base model")
    sums = isinstance(_config(source, "base model"), RunningSumConfig)
    if sums and head != "running_sum":
        wanted = 'set reward_training.head = "running_sum", or name another base'
        raise ModelError(f"{source}: a reward model whose head is a running sum; {wanted}")
    if sums or head == "last_token":
        return _weights(AutoModelForSequenceClassification, source, "base model", num_labels=1, dtype=torch.float32)
    trunk = _weights(AutoModel, source, "base model", dtype=torch.float32)
    config = RunningSumConfig(text_config=trunk.config, attn_implementation=trunk.config._attn_implementation)
    with torch.device("meta"):
        model = RunningSumForSequenceClassification(config)
    model.model = trunk
    nn.init.zeros_(model.token_score.to_empty(device="cpu").weight)
    return model


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head of a reward model.

    Raises:
        ModelError: it has no linear ``score`` (encoders call theirs ``classifier``).
    """
    name = "token_score" if isinstance(model, RunningSumForSequenceClassification) else "score"
    head = dict(model.named_children()).get(name)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{model.name_or_path}: no linear `score` head; use a decoder-only sequence classifier")
    return head


def require_score_head(source: str | Path) -> None:
    """Refuse an encoder before its weights are read: build the reward model without any and look for its head.

    Raises:
        ModelError: as `score_head`, or there is no sequence classifier of this kind.
    """
    config = _config(source, "reward model")
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as reward model: {_first_line(error)}") from error
    score_head(model)


def hidden_states(model: PreTrainedModel, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states ``[B, T, H]`` of a model's trunk, without any head."""
    trunk = model.base_model
    return trunk(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def eos_ids(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation_config: GenerationConfig | None = None
) -> list[int]:
    """Every id that ends a response: the tokenizer's, the model's and its generation config's, in that order.

    Raises:
        ModelError: there is none, so no response could ever finish.
    """
    named = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    named += [generation_config.eos_token_id] if generation_config is not None else []
    ids: dict[int, None] = {}
    for value in named:
        ids.update(dict.fromkeys(value if isinstance(value, list) else [value] if value is not None else []))
    if not ids:
        raise ModelError(f"{tokenizer.name_or_path}: no end-of-sequence token; set eos_token in its tokenizer")
    return list(ids)


def ensure_distinct_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give tokenizer, config and generation config one pad token that is not EOS.

    With ``pad == eos`` transformers pools a classifier one token early and training masks EOS away. A pad token that
    is already distinct is kept; else an unused special token is taken; else one is added and the embedding grows.
    """
    generation = model.generation_config if model.can_generate() else None
    ends = eos_ids(tokenizer, model.config, generation)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        spare = _spare_special_token(tokenizer, ends)
        if spare is None:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        else:
            tokenizer.pad_token = spare
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id


def check_same_vocabulary(policy_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """The frozen reference, and an audited reward model, read the sampled ids, which must mean the same to them.

    Raises:
        ModelError: the vocabularies differ.
    """
    ours, theirs = policy_tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        different = sum(theirs.get(token) != index for token, index in ours.items()) + len(theirs.keys() - ours.keys())
        raise ModelError(
            f"{tokenizer.name_or_path}: its vocabulary differs from the policy's in {different} tokens; "
            "use a model trained from the same base"
        )


def knows_ids(tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the two vocabularies are one, but for tokens added to this one (a pad token)."""
    ours, theirs = policy_tokenizer.get_vocab().items(), tokenizer.get_vocab().items()
    return ours <= theirs and theirs - ours <= tokenizer.get_added_vocab().items()


@torch.no_grad()
def require_causal(model: PreTrainedModel, vocab_size: int) -> None:
    """Change the last token of a random sequence: no earlier hidden state may move.

    A prefix score is a score of the prefix only in such a model.

    Raises:
        ModelError: an earlier state moved, so the model looks ahead.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, CAUSALITY_TOKENS), generator=generator).to(model.device)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    mask = torch.ones_like(ids)
    before, after = (hidden_states(model, x, mask)[0, :-1].float() for x in (ids, other))
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ModelError(
            f"{model.name_or_path}: it looks ahead (earlier scores move with the last token) and has no prefix scores; "
            'use a decoder-only reward model or reward.mode = "terminal"'
        )


def _config(source: str | Path, kind: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as {kind}: {_first_line(error)}") from error


def _load(
    auto_class: Any, source: str | Path, dtype: torch.dtype, kind: str, attention: str = "sdpa"
) -> PreTrainedModel:
    check_folder(source, kind)
    options = {"attn_implementation": attention, "use_safetensors": True, "output_loading_info": True}
    model, report = _weights(auto_class, source, kind, dtype=dtype, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{source}: no trained weights for {missing}, so it is no {kind}; name a folder that has them")
    return model.eval()


def _weights(auto_class: Any, source: str | Path, kind: str, **options: Any) -> Any:
    """What ``from_pretrained`` gives.

    Raises:
        ModelError: it gives nothing; its reason, one line.
    """
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as {kind}: {_first_line(error)}") from error


def _spare_special_token(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str | None:
    taken = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    unused = [t for t in special if tokenizer.convert_tokens_to_ids(t) not in taken and t not in template]
    return next((t for t in unused if "pad" in t.lower()), unused[0] if unused else None)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
