"""Weights from the same process: vLLM's weight-transfer interface without Ray, for the bare loop that loads them."""

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from r3hf_ray.actors.weight_store import fingerprint
from r3hf_ray.actors.weights import ObjectRefEngine, ObjectRefUpdateInfo

BACKEND = "in_process"


class InProcessEngine(ObjectRefEngine):
    """The system's engine, given the buckets themselves and not their refs."""

    def receive_weights(self, update_info: ObjectRefUpdateInfo) -> None:
        """Fingerprint and load, as the system does after it has fetched a bucket."""
        for bucket in update_info.buckets:
            self._fingerprints |= {tensor.name: fingerprint(tensor.array) for tensor in bucket}
            self.model.load_weights((tensor.name, torch.from_numpy(tensor.array)) for tensor in bucket)


WeightTransferEngineFactory.register_engine(BACKEND, InProcessEngine)
