"""Weights by vLLM's own NCCL broadcast, from rank 0 to every sampler at once; vLLM itself is the sampler's end.

Not yet run on a GPU by this project. The group is fixed: a sampler that dies ends the run. Nothing is fingerprinted, so
the probe is the proof. Needs a vLLM with a trainer's side (0.32 has it, 0.26 has not).
"""

import socket
from collections.abc import Iterator
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from r3hf_ray.errors import ModelError
from r3hf_ray.weights.contract import LearnerEnd, Probe, Publication, TransferStep
from r3hf_ray.weights.tensors import TORCH_TYPES, Parameters


class NcclSender:
    """The learner's end; `send` is called by every rank."""

    def __init__(self, end: LearnerEnd) -> None:
        """``end``: this rank's."""
        self._end = end
        self._engine: Any = None
        self._num_bytes = 0

    def send(self, version: int, parameters: Parameters, probe: Probe | None) -> Publication | None:
        """All ranks gather; rank 0 broadcasts to the samplers, and returns the publication that they have to prove.

        Raises:
            ModelError: the installed vLLM cannot send.
        """
        if self._engine is None:
            source = LearnerSource(parameters, TORCH_TYPES[self._end.dtype])
            self._num_bytes = sum(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata())
            self._engine = _trainer_engine(self._end, source)
        self._engine.send_weights()
        if self._end.rank:
            return None
        return Publication(version=version, parts=[], fingerprint="", num_bytes=self._num_bytes, probe=probe)


class LearnerSource(WeightSource):
    """The policy's full parameters in the samplers' data type, gathered one at a time by all ranks."""

    def __init__(self, parameters: Parameters, dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        self._metadata = [ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in parameters()]

    def metadata(self) -> list[ParamMeta]:
        """Names and shapes, in the order of iteration."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._parameters():
            yield name, tensor.to("cuda", self._dtype)


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

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Samplers receive, while the sender broadcasts."""
        ray.get(self._coordinator.transfer.remote(TransferStep.UPDATE, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Samplers put the weights in place."""
        ray.get(self._coordinator.transfer.remote(TransferStep.FINISH, None))


def _trainer_engine(end: LearnerEnd, source: LearnerSource) -> Any:
    try:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:  # 0.26
        raise ModelError(
            "weights.backend = nccl: the installed vLLM has no sending side; use object_ref or a newer vLLM"
        ) from error
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = ray.util.get_node_ip_address()
    info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + end.samplers, rank=end.rank)
    return WeightTransferTrainerFactory.trainer_init(info, client=CoordinatorClient(end.coordinator), source=source)
