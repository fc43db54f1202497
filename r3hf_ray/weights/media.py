"""The ways weights travel: a plain table. A new one is a file with its two ends, and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from r3hf_ray.errors import ConfigError
from r3hf_ray.weights import in_process, object_ref
from r3hf_ray.weights.contract import LearnerEnd, Probe, Publication, WeightTensor
from r3hf_ray.weights.tensors import Parameters

PROVEN = "object_ref"
"""What `weights.backend = auto` means until another has proven itself on a GPU."""


@runtime_checkable
class Sender(Protocol):
    """The learner's end of a medium."""

    def send(self, version: int, parameters: Parameters, probe: Probe | None) -> Publication | None:
        """Called by every rank, since all take part in the gathering; the publication comes from rank 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """One way for weights: its two ends."""

    sender: Callable[[LearnerEnd], Sender] | None
    """None: not between processes, so not for a run."""
    fetch: Callable[[Any], list[WeightTensor]] | None
    """A part of a publication as the tensors in it; None: vLLM has an engine of the medium's name that receives."""
    whole_gpus: bool = False
    """Whether learner ranks and samplers each need a GPU of their own."""


def _nccl(end: LearnerEnd) -> Sender:
    from r3hf_ray.weights.nccl import NcclSender  # imports vLLM, which other media keep out of the learner

    return NcclSender(end)


MEDIA: dict[str, Medium] = {
    "object_ref": Medium(sender=object_ref.ObjectRefSender, fetch=object_ref.fetch),
    "nccl": Medium(sender=_nccl, fetch=None, whole_gpus=True),
    "in_process": Medium(sender=None, fetch=in_process.fetch),
}


def medium_of(backend: str) -> str:
    """Name of the medium that `weights.backend` asks for."""
    return PROVEN if backend == "auto" else backend


def make_sender(end: LearnerEnd) -> Sender:
    """The learner's end of the medium that its section asks for.

    Raises:
        ConfigError: that medium does not leave the process.
    """
    name = medium_of(end.section.backend)
    make = MEDIA[name].sender
    if make is None:
        raise ConfigError(f"weights.backend = {name} does not leave the learner's process")
    return make(end)


def check_medium(backend: str, *, learner_gpus: float, sampler_gpus: float, probe_tokens: int) -> None:
    """Whether a run can send its weights so.

    Raises:
        ConfigError: it names the field and what to do.
    """
    name = medium_of(backend)
    if name not in MEDIA or MEDIA[name].sender is None:
        known = ", ".join(["auto", *(each for each, medium in MEDIA.items() if medium.sender)])
        raise ConfigError(f"weights.backend: no medium {backend!r}; choose {known}")
    if MEDIA[name].whole_gpus and not (learner_gpus >= 1 and sampler_gpus >= 1):
        raise ConfigError(
            f"weights.backend = {name} needs whole GPUs for the learner (learner.gpus_per_rank) and the rollouts "
            "(rollout.gpus_per_actor): set both to 1 or more, or weights.backend = object_ref"
        )
    if MEDIA[name].fetch is None and not probe_tokens:
        raise ConfigError(
            f"weights.probe_tokens = 0 with weights.backend = {name}: the probe is its only proof that weights "
            "arrived; set it above 0"
        )
