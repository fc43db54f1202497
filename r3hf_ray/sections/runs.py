"""How a run is called, followed and evaluated."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from r3hf_ray.sections.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, RunName, Section


class RunSection(Section):
    """What the run is called, where it is kept, and its seed."""

    name: RunName
    """Folder name of the run below `folder`."""
    folder: Path = Path("runs")
    """Where runs are kept."""
    seed: NonNegative = 0
    """Seed of everything random: sampling seeds come from (seed, prompt, sample), batching from (seed, step)."""
    cpus: PositiveFloat | None = None
    """Logical CPUs of a Ray instance started by this command; ignored when it joins a cluster. [CPUs]"""
    wait_for_nodes: NonNegativeFloat = 600.0
    """On a cluster: how long to wait for the nodes that the learner group, one sampler and one reward actor need; the
    others join when theirs come. [s]"""
    patience: PositiveFloat = 120.0
    """How long a sampler or reward actor may leave a question unanswered before it is replaced. [s]"""
    max_restarts: NonNegative = 3
    """How often the driver builds everything anew from the last checkpoint, after the coordinator or the weight store
    was lost. [restarts]"""
    save_within: NonNegativeFloat = 120.0
    """After SIGTERM (`r3hf stop`, `ray job stop`, Slurm, Kubernetes): how long the step under way may take to end and
    be saved, before the run ends without it; 0: at once. [s]"""

    @field_validator("folder", mode="before")
    @classmethod
    def _no_uri(cls, folder: Any) -> Any:
        if "://" in str(folder):
            raise ValueError(f"{folder}: a path is needed that all nodes share (NFS, say); no URI can be written yet")
        return folder


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when a wandb key is configured, otherwise offline. A tracker that fails never stops training."""
    project: str = "r3hf_ray"
    """wandb project."""
    entity: str | None = None
    """wandb entity (user or team)."""
    tensorboard: bool = False
    """Write TensorBoard's file too, in `tensorboard/` of the run's folder; it needs no account."""
    samples_every: Positive = 10
    """Steps between two dumps of per-token samples. [steps]"""
    samples_per_dump: NonNegative = 8
    """Trajectories in one dump. [trajectories]"""


class EvaluationSection(Section):
    """Held-out prompts (`data.heldout`) scored before, after and during training."""

    every: NonNegative = 0
    """Steps between evaluations; 0: before and after only. [steps]"""
    prompts: NonNegative = 256
    """Held-out prompts used, at most; 0: no evaluation. [prompts]"""
