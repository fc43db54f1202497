"""Trained models of which each rank holds its shard from the start: built without memory, sharded, and then filled.

A rank reads its own slices of the safetensors, and nothing of the rest; data types are converted on the way. What the
loaders ask of a whole model is asked inside a sharded forward. Files that transformers would read under other names are
left to `load` and `values`, which give the same bits by way of the whole model.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from r3hf_ray.models import attention as attending
from r3hf_ray.models import load
from r3hf_ray.models.attention import PROBE_TOKENS, Attention
from r3hf_ray.models.folder import read_config
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.running_sum import RunningSumForSequenceClassification
from r3hf_ray.models.sharding import local_state
from r3hf_ray.models.values import Critic

Shard = Callable[[nn.Module], None]
"""Shards a `Policy` or `Critic` in place."""


def sharded_policy(
    source: str, shard: Shard, device: torch.device, *, chunk: int, attention: Attention
) -> Policy | None:
    """The policy in float32; None where it cannot be read so. All ranks call it.

    Raises:
        ModelError: as `load.load_policy`.
    """
    model = _without_memory(AutoModelForCausalLM, source, "policy", attention)
    files = Files(source)
    if not files.hold(local_state(model)) or any(name.startswith(load.CLASSIFIER_HEADS) for name in files.shapes):
        return None
    policy = Policy(model, chunk=chunk).eval()
    shard(policy)
    if not _fill(policy, model, device):
        return None
    files.read(local_state(model))
    ids, mask = _row(device)
    responds = mask & (ids > 0)
    _inside(
        policy,
        model,
        partial(load.check_policy, model, source, attention),
        lambda: policy(ids, mask, responds, temperature=1.0),
    )
    load.mask_unknown(model, source)
    return policy


def sharded_critic(
    source: str,
    shard: Shard,
    device: torch.device,
    *,
    of_policy: bool,
    keep_head: bool = False,
    mean: float = 0.0,
    scale: float = 1.0,
    attention: Attention,
) -> Critic | None:
    """The critic in float32; None where it cannot be read so. All ranks call it.

    Args:
        source: of the trunk.
        shard: what shards it.
        device: of this rank.
        of_policy: ``source`` is a policy and not a reward model.
        keep_head: as in `values.critic_from_reward_model`, and so are ``mean`` and ``scale``.
        mean: of the rewards.
        scale: of the rewards.
        attention: of the trunk.

    Raises:
        ModelError: as `load.load_reward_model`.
    """
    if of_policy:
        model = _without_memory(AutoModelForCausalLM, source, "policy", attention)
        head = None
    else:
        load.require_one_label(source)
        model = _without_memory(AutoModelForSequenceClassification, source, "reward model", attention)
        head = load.score_head(model)
    trunk, files = model.base_model, Files(source)
    if trunk is model or not files.hold(_trunk_state(model)) or not (head is None or files.hold(_head_state(model))):
        return None
    with torch.device("meta"):
        critic = Critic(trunk).eval()
    shard(critic)
    if not _fill(critic, model, device):
        return None
    files.read(_trunk_state(model))
    summed = keep_head and isinstance(model, RunningSumForSequenceClassification)
    with torch.no_grad():
        for tensor, value in ((critic.mean, mean), (critic.scale, scale), (critic.summed, int(summed))):
            tensor.fill_(value)
        nn.init.zeros_(critic.head.weight)
        nn.init.zeros_(critic.head.bias)
    check = partial(attending.settle, model, source, attention)
    if head is not None:
        head.to_empty(device=device)
        files.read(_head_state(model))
        check = partial(load.check_reward_model, model, source, attention)
        if keep_head:
            names = {name: dict(critic.head.named_parameters())[name.rpartition(".")[2]] for name in _head_state(model)}
            files.read({name: parameter.detach() for name, parameter in names.items()})
    ids, mask = _row(device)
    _inside(critic, model, check, lambda: critic(ids, mask))
    return critic


class Files:
    """The safetensors of a model folder, or of a hub's, fetched once a node."""

    def __init__(self, source: str) -> None:
        """``source``: folder or hub name."""
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        self._folder = str(folder)
        known = dcp.HuggingFaceStorageReader(self._folder).read_metadata().state_dict_metadata
        self.shapes = {name: tuple(one.size) for name, one in known.items() if isinstance(one, TensorStorageMetadata)}

    @property
    def parameters(self) -> int:
        """How many there are in all."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def hold(self, state: Mapping[str, Tensor]) -> bool:
        """Whether every tensor is there, under its own name and in its shape."""
        return all(self.shapes.get(name) == tuple(tensor.shape) for name, tensor in state.items())

    def read(self, state: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, of each only what this rank holds."""
        reader = dcp.HuggingFaceStorageReader(self._folder)
        dcp.load(dict(state), storage_reader=reader, no_dist=not dist.is_initialized())


def _without_memory(auto_class: Any, source: str, kind: str, attention: Attention) -> PreTrainedModel:
    config = read_config(source, kind)
    options = attending.options(config, source, attention)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32, **options)
    if model.can_generate() and (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()


def _trunk_state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"{model.base_model_prefix}.{name}": tensor for name, tensor in local_state(model.base_model).items()}


def _head_state(model: PreTrainedModel) -> dict[str, Tensor]:
    head = load.score_head(model)
    name = next(name for name, part in model.named_children() if part is head)
    return {f"{name}.{key}": tensor.detach() for key, tensor in head.state_dict(keep_vars=True).items()}


@torch.no_grad()
def _fill(root: nn.Module, model: PreTrainedModel, device: torch.device) -> bool:
    """Give the shards memory, tie what is tied, and compute the buffers that are in no file; False if one is left."""
    root.to_empty(device=device)
    model.tie_weights()
    computed = [part for part in root.modules() if part._non_persistent_buffers_set]
    seen = []
    with torch.random.fork_rng(devices=[]):
        for value in (0, 1):
            for part in computed:
                buffers = [part.get_buffer(name) for name in sorted(part._non_persistent_buffers_set)]
                for buffer in buffers:
                    buffer.fill_(value)
                model.base_model._init_weights(part)
                seen.append([buffer.clone() for buffer in buffers])
    half = len(computed)
    return all(
        torch.equal(one, other)
        for first, second in zip(seen[:half], seen[half:], strict=True)
        for one, other in zip(first, second, strict=True)
    )


def _row(device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.arange(PROBE_TOKENS, device=device)[None]
    return ids, torch.ones_like(ids, dtype=torch.bool)


@torch.no_grad()
def _inside(root: nn.Module, model: PreTrainedModel, check: Callable[[], None], forward: Callable[[], object]) -> None:
    """Check the model inside of a ``forward`` of its root, where sharded parameters are whole as they are needed."""

    def once(*_: Any) -> None:
        hook.remove()
        check()

    hook = model.base_model.register_forward_pre_hook(once)
    forward()
    if isinstance(root, FSDPModule):
        root.reshard()  # a forward leaves the root whole, and an optimizer would take what is there for the parameters
