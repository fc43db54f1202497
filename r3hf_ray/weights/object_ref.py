"""The only file that knows vLLM's weight-transfer interface: load one published version into an engine, and prove it.

Backends: `object_ref` (ours, below: any number of readers, late joiners, no GPU needed) and vLLM's own `nccl`
(`NcclSender`; not yet run on a GPU by this project). Imported in the sampler's process, before the engine is made:
`worker_extension_cls` names `WorkerExtension`, and importing this module registers the engine.
"""

import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from r3hf_ray.weights.contract import Tensor, TransferStep, fingerprint, fingerprint_of_all

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ObjectRefInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: refs carry all that is needed."""


@dataclass
class ObjectRefUpdateInfo(WeightTransferUpdateInfo):
    """One round: refs of buckets, inside a list so that Ray hands over the refs and not their contents."""

    buckets: list[Any]


class ObjectRefEngine(WeightTransferEngine[ObjectRefInitInfo, ObjectRefUpdateInfo]):
    """vLLM weight-transfer engine that pulls buckets of tensors from Ray's object store."""

    init_info_cls = ObjectRefInitInfo
    update_info_cls = ObjectRefUpdateInfo

    def init_transfer_engine(self, init_info: ObjectRefInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Begin a session: CPU linears are prepacked, so a plain `load_weights` fails without layerwise reload."""
        self._fingerprints: dict[str, str] = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load buckets. The base class synchronizes an accelerator that may not exist."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectRefUpdateInfo) -> None:
        """Fetch one bucket at a time, fingerprint what was fetched, and load it."""
        for ref in update_info.buckets:
            bucket: list[Tensor] = ray.get(ref)
            self._fingerprints |= {tensor.name: fingerprint(tensor.array) for tensor in bucket}
            self.model.load_weights((tensor.name, _as_torch(tensor)) for tensor in bucket)

    def finish_weight_update(self) -> None:
        """Finalize, and repack the output heads.

        With tied embeddings vLLM 0.32 on CPU keeps the packed copy of the *old* embedding in `lm_head`, without an
        error; packing it again after the reload is the cure. Harmless where nothing was packed.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def loaded_fingerprint(self) -> str:
        """Fingerprint of everything the last session loaded."""
        return fingerprint_of_all(self._fingerprints)

    def shutdown(self) -> None:
        """Nothing to release."""


class WorkerExtension:
    """Methods that vLLM mixes into its worker, reachable through `collective_rpc`."""

    weight_transfer_engine: Any

    def r3hf_loaded_fingerprint(self) -> str:
        """What the last weight update really loaded."""
        return self.weight_transfer_engine.loaded_fingerprint()


class CoordinatorClient:
    """vLLM's weight-sync client over our coordinator, so that it stays the only submitter to the samplers."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Samplers join the transfer group."""
        ray.get(self._coordinator.transfer.remote(TransferStep.INIT, init_info))

    def start_weight_update(self) -> None:
        """Samplers get ready."""
        ray.get(self._coordinator.transfer.remote(TransferStep.START, None))

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """Samplers receive, while the sender broadcasts."""
        ray.get(self._coordinator.transfer.remote(TransferStep.UPDATE, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Samplers put the weights in place."""
        ray.get(self._coordinator.transfer.remote(TransferStep.FINISH, None))


class LearnerSource(WeightSource):
    """The policy's full parameters in the samplers' data type, gathered one at a time by all ranks."""

    def __init__(self, parameters: Callable[[], Iterator[tuple[str, torch.Tensor]]], dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._metadata = [ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in parameters()]

    def metadata(self) -> list[ParamMeta]:
        """Names and shapes, in the order of iteration."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._parameters():
            yield name, tensor.to("cuda", self._dtype)


def nccl_sender(coordinator: Any, source: LearnerSource, *, rank: int, samplers: int) -> Any:
    """The NCCL engine of vLLM on the learner's side; `send_weights()` is called by every rank.

    Not yet run on a GPU by this project. The group is fixed: a sampler that dies ends the run.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    info = NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(), master_port=port, world_size=1 + samplers, rank=rank
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=CoordinatorClient(coordinator), source=source)


def _as_torch(tensor: Tensor) -> torch.Tensor:
    with warnings.catch_warnings():  # plasma memory is read-only, and load_weights only reads
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(tensor.array.data, dtype=TORCH_TYPES[tensor.dtype])
    return flat.reshape(tensor.array.shape)


def _register() -> None:
    if "object_ref" not in WeightTransferEngineFactory._registry:  # a second registration is an error in vLLM
        WeightTransferEngineFactory.register_engine("object_ref", ObjectRefEngine)


_register()
