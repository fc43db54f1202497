"""Sharded checkpoints of a training state, and model folders for transformers and vLLM: safetensors and JSON only."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from r3hf_ray.errors import CheckpointError
from r3hf_ray.models.sharding import barrier, local_state, rank

EXTRA_FILE = "extra.json"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    folder: Path, *, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer], extra: dict[str, Any]
) -> None:
    """Write every rank's shards of modules and optimizers, and ``extra`` as JSON. All ranks call it.

    The shards are safetensors with their offsets, so another number of ranks can load them: the files that torch's
    `HuggingFaceStorageWriter` would write, but not by way of a copy in memory. `EXTRA_FILE` comes last.

    Args:
        folder: new or without an older checkpoint; shared by all ranks.
        modules: name -> `Policy` or `Critic`.
        optimizers: the same names -> their optimizers. Hyperparameters are not saved: they come from the configuration.
        extra: small JSON values, equal on all ranks.

    Raises:
        CheckpointError: the folder holds a checkpoint already; stale shards would mix with new ones.
    """
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds a checkpoint already; save to a new folder")
    barrier()
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: part for name, tensor in _tensors(modules, optimizers).items() if (part := _own_part(tensor))}
    offsets = {name: {SAVED_OFFSETS_KEY: offset} for name, (_, offset) in own.items()}
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps(offsets),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    save_file({name: part for name, (part, _) in own.items()}, folder / f"rank_{rank():05d}.safetensors", metadata)
    barrier()
    if rank() == 0:
        (folder / EXTRA_FILE).write_text(json.dumps(extra))


def load(folder: Path, *, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> dict[str, Any]:
    """Load what `save` wrote into live modules and optimizers, on any number of ranks; returns ``extra``.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another model.
    """
    if not (folder / EXTRA_FILE).is_file():
        raise CheckpointError(f"{folder}: no complete checkpoint (no {EXTRA_FILE})")
    state = _tensors(modules, optimizers)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: not a checkpoint of these models: {reason}") from error
    for name, optimizer in optimizers.items():
        prefix = f"{name}.optimizer."
        current: dict[str, Any] = get_optimizer_state_dict(modules[name], optimizer, options=_FLAT)
        loaded = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        set_optimizer_state_dict(modules[name], optimizer, current | loaded, options=_FLAT)
    return json.loads((folder / EXTRA_FILE).read_text())


def save_pretrained(
    parameters: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a causal language model as a folder that `AutoModelForCausalLM` and vLLM load as it is.

    All ranks call it, because ``parameters`` (`sharding.full_parameters`) is a collective; rank 0 writes. The folder
    appears whole or not at all: it is written beside its place and renamed.

    Args:
        parameters: names as in the model's own state dict; a tied lm_head is left out.
        folder: where; an older folder is replaced.
        config: of the model.
        generation_config: of the model.
        tokenizer: saved beside it.
        dtype: of the saved weights.
    """
    writes = rank() == 0
    state = {name: tensor.to(dtype) for name, tensor in parameters if writes}
    if not writes:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = generation_config or model.generation_config
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _own_part(tensor: Tensor) -> tuple[Tensor, list[int]] | None:
    """What this rank writes of a tensor, and where it begins; None where another rank has it, or nothing is left."""
    if not isinstance(tensor, DTensor):
        return (tensor, [0] * tensor.ndim) if rank() == 0 else None
    places = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    if any(isinstance(placement, Replicate) and place for placement, place in places):
        return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    part = tensor.to_local().contiguous()
    return (part, list(offset)) if part.numel() else None


def _tensors(modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """All tensors, shards sharing memory with the live ones; creates the optimizers' state where there is none."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in local_state(module).items()}
    for name, optimizer in optimizers.items():
        state: dict[str, Any] = get_optimizer_state_dict(modules[name], optimizer, options=_FLAT)
        tensors |= {f"{name}.optimizer.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors
