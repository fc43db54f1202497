"""The weights of models, from folders or the hub, checked where a wrong one would otherwise train silently.

A model is run as it was made. The attention is the fastest that gives the scores of the plain one; a model whose own
forward says something else than our way through trunk and head is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models import attention as attending
from r3hf_ray.models.attention import PROBE_TOKENS, TOLERANCE, Attention, close, hidden_as_made, hidden_states, probe
from r3hf_ray.models.folder import check_folder, first_line, load_tokenizer, read_config, unknown_ids
from r3hf_ray.models.running_sum import RunningSumConfig, RunningSumForSequenceClassification, running_sum

MASKED = -1e9
"""Logit of an id that is no token: its probability is 0, and so is its part of an entropy, which -inf would spoil."""
CLASSIFIER_HEADS = ("score.", "token_score.", "classifier.")


def load_policy(source: str | Path, dtype: torch.dtype, *, attention: Attention = "auto") -> PreTrainedModel:
    """A causal language model in eval mode (no dropout), on the CPU; it gives ids that are no token no probability.

    Args:
        source: folder or hub name.
        dtype: of the weights.
        attention: as in `load_reward_model`.

    Raises:
        ModelError: it cannot be loaded, weights are missing, it is a classifier, or its logits are more than
            `lm_head(hidden)`: logprobs project the response's hidden states only, so soft-capped or scaled logits would
            come out wrong.
    """
    model, report = _load(AutoModelForCausalLM, source, dtype, "policy", attention)
    heads = [key for key in sorted(report["unexpected_keys"]) if key.startswith(CLASSIFIER_HEADS)]
    if heads:
        raise ModelError(f"{source}: holds {heads[0]}, so it is a reward model and no policy; name a language model")
    check_policy(model, source, attention)
    mask_unknown(model, source)
    return model


@torch.no_grad()
def check_policy(model: PreTrainedModel, source: str | Path, attention: Attention) -> None:
    """Settle a policy's attention, and refuse it if its logits are more than `lm_head(hidden)`.

    Raises:
        ModelError: they are, or the attention cannot be had.
    """
    ids, mask = probe(model)
    ours = model.get_output_embeddings()(hidden_as_made(model, ids, mask))
    said = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if not close(ours, said, TOLERANCE[model.dtype] / 10):
        raise ModelError(f"{source}: it caps or scales its logits behind lm_head, which is not supported")
    attending.settle(model, source, attention)


def load_reward_model(source: str | Path, dtype: torch.dtype, *, attention: Attention = "auto") -> PreTrainedModel:
    """A sequence classifier with one label in eval mode; trunk in ``dtype``, its ``score`` head always in float32.

    Args:
        source: folder or hub name.
        dtype: of the trunk.
        attention: "eager", the one that can return its attention maps; "auto": the fastest that keeps the scores.

    Raises:
        ModelError: it cannot be loaded, has another number of labels, lacks trained weights, is no decoder with a
            linear ``score`` head, or its own score of a sequence is not what this head says at the last token.
    """
    require_one_label(source)
    model, _ = _load(AutoModelForSequenceClassification, source, dtype, "reward model", attention)
    check_reward_model(model, source, attention)
    return model


def require_one_label(source: str | Path) -> None:
    """Refuse a classifier that gives no single score.

    Raises:
        ModelError: it has another number of labels.
    """
    labels = read_config(source, "reward model").num_labels
    if labels != 1:
        raise ModelError(f"{source}: a reward model has one label, this has {labels}; train one with `r3hf reward`")


@torch.no_grad()
def check_reward_model(model: PreTrainedModel, source: str | Path, attention: Attention) -> None:
    """Settle a reward model's attention, and refuse it if its score is not its head at the last token, or summed.

    Raises:
        ModelError: it is not, or the attention cannot be had.
    """
    _require_own_scores(model)
    attending.settle(model, source, attention)


def untrained_reward_model(source: str | Path, *, head: str, attention: Attention = "auto") -> PreTrainedModel:
    """A base model's trunk under a fresh score head, in float32 on the CPU, to be trained as a reward model.

    Args:
        source: any base; a reward model with this very kind of head keeps its own.
        head: "last_token" (random, read at the last token) or "running_sum" (zero, summed over all tokens).
        attention: as in `load_reward_model`.

    Raises:
        ModelError: it cannot be loaded, or it is a running-sum reward model and the other kind is asked for.
    """
    check_folder(source, "base model")
    config = read_config(source, "base model")
    asked = attending.options(config, source, attention)
    sums, options = isinstance(config, RunningSumConfig), {"dtype": torch.float32, **asked}
    if sums and head != "running_sum":
        wanted = 'set reward_training.head = "running_sum", or name another base'
        raise ModelError(f"{source}: a reward model whose head is a running sum; {wanted}")
    if sums or head == "last_token":
        model = _weights(AutoModelForSequenceClassification, source, "base model", num_labels=1, **options)
        attending.settle(model, source, attention)
        return model
    trunk = _weights(AutoModel, source, "base model", **options)
    sum_config = RunningSumConfig(text_config=trunk.config, attn_implementation=trunk.config._attn_implementation)
    with torch.device("meta"):
        model = RunningSumForSequenceClassification(sum_config)
    model.model = trunk
    nn.init.zeros_(model.token_score.to_empty(device="cpu").weight)
    attending.settle(model, source, attention)
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
    config = read_config(source, "reward model")
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be loaded as reward model: {first_line(error)}") from error
    score_head(model)


@torch.no_grad()
def require_causal(model: PreTrainedModel, vocab_size: int) -> None:
    """Change the last token of a random sequence: no earlier hidden state may move.

    A prefix score is a score of the prefix only in such a model.

    Raises:
        ModelError: an earlier state moved, so the model looks ahead.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=generator).to(model.device)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    mask = torch.ones_like(ids)
    before, after = (hidden_states(model, x, mask)[0, :-1].float() for x in (ids, other))
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ModelError(
            f"{model.name_or_path}: it looks ahead (earlier scores move with the last token) and has no prefix scores; "
            'use a decoder-only reward model or reward.mode = "terminal"'
        )


def _load(
    auto_class: Any, source: str | Path, dtype: torch.dtype, kind: str, attention: Attention
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model in eval mode, and what transformers says of the keys in its files."""
    check_folder(source, kind)
    asked = attending.options(read_config(source, kind), source, attention)
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **asked}
    model, report = _weights(auto_class, source, kind, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{source}: no trained weights for {missing}, so it is no {kind}; name a folder that has them")
    return model.eval(), report


def _require_own_scores(model: PreTrainedModel) -> None:
    head, (ids, mask) = score_head(model), probe(model)
    head.float()  # a head that is read in float32 is one already
    scores = head(hidden_as_made(model, ids, mask).float())[..., 0]
    if isinstance(model, RunningSumForSequenceClassification):
        scores = running_sum(scores, mask)
    with head.register_forward_pre_hook(lambda _, given: (given[0].float(),)):
        said = model(input_ids=ids, attention_mask=mask).logits
    own = torch.cat([scores[:, :-1], said], dim=1)  # the others say how large scores are
    if not close(scores, own, TOLERANCE[model.dtype]):
        raise ModelError(
            f"{model.name_or_path}: its own score of a probe is {said.item():.4g}, and its head says "
            f"{scores[0, -1]:.4g} at the last token, so it reads a sequence in another way; use a model that scores at "
            "the last token"
        )


def mask_unknown(model: PreTrainedModel, source: str | Path) -> None:
    """Let the head give ids that are no token of the folder's tokenizer no probability, wherever it is called."""
    head = model.get_output_embeddings()
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:  # then nothing is known of what its ids mean
        return
    unknown = torch.tensor(unknown_ids(tokenizer, head.weight.shape[0]), dtype=torch.long)
    if len(unknown):
        head.register_forward_hook(lambda _, given, logits: logits.index_fill_(-1, unknown.to(logits.device), MASKED))


def _weights(auto_class: Any, source: str | Path, kind: str, **options: Any) -> Any:
    """What ``from_pretrained`` gives.

    Raises:
        ModelError: it gives nothing; its reason, one line.
    """
    try:
        with _float32_head(auto_class, source, kind):
            return auto_class.from_pretrained(source, **options)
    except Exception as error:  # whatever a library makes of a stranger's file
        raise ModelError(f"{source}: cannot be loaded as {kind}: {first_line(error)}") from error


@contextmanager
def _float32_head(auto_class: Any, source: str | Path, kind: str) -> Iterator[None]:
    """Let transformers read a ``score`` head in the float32 it may be saved in, whatever the trunk's data type."""
    model = auto_class._model_mapping.get(type(read_config(source, kind)), None)
    if auto_class is not AutoModelForSequenceClassification or model is None:
        yield
        return
    kept = model._keep_in_fp32_modules_strict
    model._keep_in_fp32_modules_strict = {*(kept or ()), "score"}
    try:
        yield
    finally:
        model._keep_in_fp32_modules_strict = kept
