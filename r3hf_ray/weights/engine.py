"""The sampler's end of every medium, on vLLM's weight-transfer interface; its other half, sending, is in `nccl.py`.

These two files alone know that interface (a test sees to it), as vLLM 0.26 to 0.32 have it. Imported in the sampler's
process before the engine is made: `worker_extension_cls` names `WorkerExtension`, and importing this registers the
engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from r3hf_ray.weights.contract import TransferStep, fingerprint, fingerprint_of_all
from r3hf_ray.weights.media import MEDIA
from r3hf_ray.weights.tensors import as_torch

OURS = "r3hf_ray"
"""Name of the engine below in vLLM's registry."""


@dataclass
class FetchInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: an update carries all that is needed."""


@dataclass
class FetchUpdateInfo(WeightTransferUpdateInfo):
    """One round."""

    medium: str
    parts: list[Any]
    """Of the publication; refs stay inside the list, so that Ray hands over the refs and not their contents."""


class FetchEngine(WeightTransferEngine[FetchInitInfo, FetchUpdateInfo]):
    """vLLM weight-transfer engine that fetches a publication's parts by its medium."""

    init_info_cls = FetchInitInfo
    update_info_cls = FetchUpdateInfo

    def init_transfer_engine(self, init_info: FetchInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Begin a session: CPU linears are prepacked, so a plain `load_weights` fails without layerwise reload."""
        self._fingerprints: dict[str, str] = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the parts. The base class synchronizes an accelerator that may not exist."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FetchUpdateInfo) -> None:
        """Fetch one part at a time, fingerprint what was fetched, and load it."""
        fetch = MEDIA[update_info.medium].fetch
        for part in update_info.parts:
            bucket = fetch(part) if fetch else []
            self._fingerprints |= {tensor.name: fingerprint(tensor.array) for tensor in bucket}
            self.model.load_weights((tensor.name, as_torch(tensor)) for tensor in bucket)

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

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM 0.26, gone by 0.32, called by neither: the learner publishes, samplers fetch."""
        raise NotImplementedError


class WorkerExtension:
    """Methods that vLLM mixes into its worker, reachable through `collective_rpc`."""

    weight_transfer_engine: Any
    model_runner: Any

    def r3hf_mask_logits(self, ids: list[int]) -> None:
        """Let the engine give these ids no probability, in sampling and in a prompt's logprobs alike.

        At the model's own logits, since vLLM's logits processors and allowed ids leave a prompt's logprobs as they are.
        """
        model = self.model_runner.get_model()
        compute = model.compute_logits

        def masked(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute(*args, **kwargs)
            if logits is not None:  # only one rank of a tensor-parallel group has them
                logits[..., ids] = float("-inf")
            return logits

        model.compute_logits = masked

    def r3hf_loaded_fingerprint(self) -> str:
        """What the last weight update really loaded."""
        return self.weight_transfer_engine.loaded_fingerprint()


def llm_arguments(medium: str) -> dict[str, Any]:
    """What `vllm.LLM` is made with so that weights can come by a medium."""
    extension = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
    backend = medium if MEDIA[medium].fetch is None else OURS
    return {"weight_transfer_config": {"backend": backend}, "worker_extension_cls": extension}


def load(llm: Any, medium: str, parts: list[Any]) -> str:
    """Load a publication's parts into an engine; the fingerprint of what was loaded."""
    llm.collective_rpc(TransferStep.START.value)
    llm.collective_rpc(TransferStep.UPDATE.value, args=({"medium": medium, "parts": parts},))
    llm.collective_rpc(TransferStep.FINISH.value)
    loaded: str = llm.collective_rpc("r3hf_loaded_fingerprint")[0]
    return loaded


if OURS not in WeightTransferEngineFactory._registry:  # a second registration is an error in vLLM
    WeightTransferEngineFactory.register_engine(OURS, FetchEngine)
