"""A torch parameter as a weight in transit, and back."""

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from r3hf_ray.weights.contract import WeightTensor, fingerprint

Parameters = Callable[[], Iterator[tuple[str, torch.Tensor]]]
"""Names and full parameters, gathered one at a time: every rank iterates, or the others wait."""
TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def in_transit(parameters: Iterable[tuple[str, torch.Tensor]], dtype: str) -> Iterator[WeightTensor]:
    """Full parameters as fingerprinted numpy arrays of the samplers' data type; memory is shared where it can be."""
    for name, parameter in parameters:
        cast = parameter.detach().to("cpu", TORCH_TYPES[dtype]).contiguous()
        array = (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()
        yield WeightTensor(name=name, dtype=dtype, array=array, fingerprint=fingerprint(array))


def as_torch(tensor: WeightTensor) -> torch.Tensor:
    """The same weight for torch, without a copy."""
    with warnings.catch_warnings():  # plasma memory is read-only, and load_weights only reads
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(tensor.array.data, dtype=TORCH_TYPES[tensor.dtype])
    return flat.reshape(tensor.array.shape)
