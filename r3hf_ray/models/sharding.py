"""FSDP2 sharding whose gradients are summed, full parameters out of it, and the few collectives the learner needs."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""`learner.dtype` -> data type."""

BLOCKS_ABOVE = 100_000_000
"""`auto` shards each decoder block apart above this many parameters; below, the extra collectives cost more than they
save (0.32 against 0.2 s a step on a toy)."""


WHOLE_GRADIENT_BYTES = 2 * 2**30
"""`auto` lets each rank hold a whole gradient of up to this size between microbatches. [bytes]"""


def make_mesh(world_size: int, device_type: str, replicas: int = 1) -> DeviceMesh:
    """A mesh over all ranks; for one rank outside of any group, over a group of its own.

    With ``replicas`` above 1 it has two dimensions: replicate over the first, shard within the second.

    Raises:
        RuntimeError: ``world_size`` is above 1 and torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        if world_size > 1:
            raise RuntimeError(f"a mesh of {world_size} ranks needs torch.distributed to be initialised")
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shape = (world_size,) if replicas == 1 else (replicas, world_size // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard")[2 - len(shape) :])


def shard(
    module: nn.Module,
    mesh: DeviceMesh | None,
    *,
    blocks: str,
    dtype: torch.dtype,
    keep_float32: nn.Module | None = None,
) -> None:
    """Shard ``module`` over ``mesh`` in place; gradients come out *summed* over ranks.

    Master weights, gradients and their reduction stay in the parameters' own data type (float32); with bfloat16 only
    forward and backward run in it. A single rank in float32 needs no sharding and is left as it is.

    Args:
        module: a `Policy` or `Critic`, on its device.
        mesh: of all ranks (`make_mesh`); None for a single rank.
        blocks: "always" shards each decoder block apart, "never" the root only, "auto" decides by size.
        dtype: of forward and backward.
        keep_float32: a part of ``module`` that computes in float32 (a critic's head).
    """
    if mesh is None or mesh.size() == 1:
        if dtype == torch.float32:
            return
        mesh = mesh or make_mesh(1, next(module.parameters()).device.type)
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    if keep_float32 is not None and dtype != torch.float32:
        fully_shard(keep_float32, mesh=mesh)
    parameters = sum(p.numel() for p in module.parameters())
    if blocks == "always" or (blocks == "auto" and parameters > BLOCKS_ABOVE):
        for block in decoder_blocks(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):  # neither setter reaches child modules
            part.set_force_sum_reduction_for_comms(True)  # first: gloo has no PREMUL_SUM
            part.set_gradient_divide_factor(1.0)


def reduce_gradients(module: nn.Module, last: bool, when: str) -> None:
    """Say before a backward whether ranks add up their gradients after it, or keep them whole for the next one.

    Args:
        module: sharded or not.
        last: it is the last backward before an optimizer step.
        when: "microbatch", "minibatch", or "auto", which decides by size.
    """
    if isinstance(module, FSDPModule):
        whole = sum(p.numel() * p.element_size() for p in module.parameters())
        module.set_requires_gradient_sync(last or not once_a_minibatch(whole, when))


def once_a_minibatch(whole: int, when: str) -> bool:
    """Whether a gradient of ``whole`` bytes stays whole until the last backward; ``when`` as in `reduce_gradients`."""
    return when == "minibatch" or (when == "auto" and whole <= WHOLE_GRADIENT_BYTES)


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute each decoder block in backward. Call it before `shard`.

    transformers' own gradient checkpointing works in train mode only, that is with dropout on; this one in eval mode.
    """
    blocks = set(decoder_blocks(module))
    apply_activation_checkpointing(module, check_fn=lambda part: part in blocks)


def decoder_blocks(module: nn.Module) -> list[nn.Module]:
    """The decoder blocks of the transformers model inside ``module``, or their checkpointing wrappers."""
    wrapped = [part for part in module.modules() if isinstance(part, CheckpointWrapper)]
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return list(wrapped) or [part for part in module.modules() if type(part).__name__ in names]


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their state-dict names, shared (tied) ones once, without a copy.

    Reading the state dict also puts FSDP back to its sharded state, which a forward without backward leaves.
    """
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in first.values()}


def full_parameters(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `local_state` whole, one at a time. A collective: all ranks iterate to the end.

    Give it the transformers model itself (``policy.model``) and the names are those of its own checkpoints. On a single
    CPU rank the tensors share memory with the model.

    Args:
        module: sharded or not.
        dtype: of floating-point tensors, cast where they are, before they are gathered; None: their own.

    Yields:
        Name and tensor, on rank 0 on the CPU; the other ranks only help, and theirs stay on their device.
    """
    for name, own in local_state(module).items():
        tensor = own.to(dtype) if dtype and own.is_floating_point() else own
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.cpu() if rank() == 0 else whole


def grad_norm(module: nn.Module) -> float:
    """Global L2 norm of the gradients over all shards, the same on every rank; NaN or infinity if any is."""
    gradients = _local_gradients(module)
    if not gradients:
        return 0.0
    squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return float(squares.sqrt())
    return float((all_reduce_sum(squares) / (mesh.size(0) if mesh.ndim > 1 else 1)).sqrt())


def scale_gradients(module: nn.Module, *, norm: float, max_norm: float) -> None:
    """Scale all gradients down so that their norm, ``norm`` now, is at most ``max_norm``."""
    if norm > max_norm:
        torch._foreach_mul_(_local_gradients(module), max_norm / (norm + 1e-6))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor itself without torch.distributed."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum over ranks, in place; the tensor itself without torch.distributed."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    counts[dist.get_rank()] = len(x)
    sizes = all_reduce_sum(counts).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def barrier() -> None:
    """Wait for all ranks; nothing without torch.distributed."""
    if dist.is_initialized():
        dist.barrier()


def rank() -> int:
    """This process's rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op=op)
    return x


def _local_gradients(module: nn.Module) -> list[Tensor]:
    """Gradients as plain local tensors: a DTensor operation costs far more than the arithmetic of a small model."""
    gradients = (p.grad for p in module.parameters() if p.grad is not None)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
