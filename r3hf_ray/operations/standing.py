"""How a run stands: from its folder, and from its coordinator while that lives (layer 4)."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.lease import Lease, read_lease
from r3hf_ray.records.metrics import STEP, read_metrics
from r3hf_ray.sections.actors import RolloutSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.settings import load

RECENT = 50
"""Steps that tell how long one usually takes."""
ANSWER_SECONDS = 5.0
TROUBLE = ("restart", "failure", "away", "quarantined", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What only the coordinator and Ray know.

    Example: ``Live(members=[MemberInfo(name="rollout 0", ...)], pending=["rollout 2"], free={"CPU": 0.1})``
    """

    members: Sequence[Any]
    """Rollout and reward actors, `actors.members.MemberInfo`."""
    pending: Sequence[str] = ()
    """Actors that Ray has not placed yet."""
    free: Mapping[str, float] = field(default_factory=dict)
    """Of the cluster: CPU, GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """All that is known of a run."""

    folder: Path
    lease: Lease | None
    step: int
    """Steps done."""
    steps: int
    seconds: float | None
    """A step's usual time: the median of the recent ones. [s]"""
    events: Sequence[Mapping[str, Any]]
    asks: Mapping[str, Mapping[str, float]]
    """Kind of actor -> what one of them asks of Ray."""
    live: Live | None = None
    unreachable: str = ""
    """Why the coordinator was not asked, though a driver seems to be there."""


def standing(folder: Path, *, live: Live | None = None, unreachable: str = "") -> Standing:
    """How the run in a folder stands.

    Raises:
        ConfigError: it is no run's, or a file of it is damaged.
    """
    lease = read_lease(folder)
    if lease is None and not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder}: no run (no config.toml in it); name a run's folder, as runs/NAME")
    rows = read_metrics(folder)
    steps, asks = 0, {}
    if (folder / "ledger").exists() or live:
        config = load(PPOConfig, folder / "config.toml", [])
        steps, asks = config.ppo.steps, asked(config.rollout, config.reward)
    return Standing(
        folder=folder,
        lease=lease,
        step=int(rows[-1][STEP]) if rows else 0,
        steps=steps,
        seconds=usual_seconds(step_seconds(rows)),
        events=read_jsonl(folder / "events.jsonl"),
        asks=asks,
        live=live,
        unreachable=unreachable,
    )


def step_seconds(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Of the recent steps. [s]"""
    return [row["time/step"] for row in rows if row.get("time/step")][-RECENT:]


def usual_seconds(seconds: Collection[float]) -> float | None:
    """Their median; None where no step is done. [s]"""
    return statistics.median(seconds) if seconds else None


def asked(rollout: RolloutSection, reward: RewardSection) -> dict[str, dict[str, float]]:
    """What an actor of each kind asks of Ray."""
    kinds: dict[str, RolloutSection | RewardSection] = {"rollout": rollout, "reward": reward}
    return {kind: {"CPU": own.cpus_per_actor, "GPU": own.gpus_per_actor} for kind, own in kinds.items()}


def ask(namespace: str, job: str) -> Live | None:
    """What the coordinator of a run says now; Ray must be initialised. None where it does not answer within seconds.

    Args:
        namespace: of the run.
        job: Ray's id of its driver's job.
    """
    try:
        coordinator = ray.get_actor("coordinator", namespace)
        members = ray.get(coordinator.members.remote(), timeout=ANSWER_SECONDS)
    except (ValueError, RayError):
        return None
    waiting = state.actors(job_id=ray.JobID.from_hex(job), actor_state_name="PENDING_CREATION").values()
    free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    pending = sorted(actor["Name"] or actor["ActorClassName"] for actor in waiting)
    return Live(members=members, pending=pending, free=free)


def is_gone(lease: Lease) -> bool:
    """Whether a lease says running, and its driver seems to be no more."""
    return lease.state == "running" and not lease.is_fresh
