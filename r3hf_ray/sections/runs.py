"""How a run is called, followed and evaluated."""

from pathlib import Path
from typing import Literal

from r3hf_ray.sections.fields import NonNegative, Positive, PositiveFloat, RunName, Section


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


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when a wandb key is configured, otherwise offline. A tracker that fails never stops training."""
    project: str = "r3hf_ray"
    """wandb project."""
    entity: str | None = None
    """wandb entity (user or team)."""
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
