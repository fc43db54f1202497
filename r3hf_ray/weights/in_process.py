"""Weights from the same process: vLLM's weight-transfer interface without Ray, for loops that load them."""

from collections.abc import Iterable

import torch
from torch import Tensor as TorchTensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from r3hf_ray.weights.contract import Publication, Tensor, fingerprint, fingerprint_of_all
from r3hf_ray.weights.object_ref import ObjectRefEngine, ObjectRefUpdateInfo

BACKEND = "in_process"


class InProcessEngine(ObjectRefEngine):
    """The system's engine, given the buckets themselves and not their refs."""

    def receive_weights(self, update_info: ObjectRefUpdateInfo) -> None:
        """Fingerprint and load, as the system does after it has fetched a bucket."""
        for bucket in update_info.buckets:
            self._fingerprints |= {tensor.name: fingerprint(tensor.array) for tensor in bucket}
            self.model.load_weights((tensor.name, torch.from_numpy(tensor.array)) for tensor in bucket)


def publication(parameters: Iterable[tuple[str, TorchTensor]], version: int) -> Publication:
    """All float32 parameters as one bucket, which shares their memory: load it before they change. No probe."""
    arrays = ((name, tensor.detach().numpy()) for name, tensor in parameters)
    bucket = [Tensor(name=name, dtype="float32", array=a, fingerprint=fingerprint(a)) for name, a in arrays]
    return Publication(
        version=version,
        buckets=[bucket],
        fingerprint=fingerprint_of_all({tensor.name: tensor.fingerprint for tensor in bucket}),
        num_bytes=sum(tensor.array.nbytes for tensor in bucket),
        probe=None,
    )


WeightTransferEngineFactory.register_engine(BACKEND, InProcessEngine)
