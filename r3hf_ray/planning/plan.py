"""The plan of a PPO run: made from its job and a cluster, without a weight and without a process."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3hf_ray.config import PPOConfig
from r3hf_ray.planning.advice import advice, unready
from r3hf_ray.planning.model_shapes import ModelShape
from r3hf_ray.planning.placement import Cluster, Node, place
from r3hf_ray.planning.processes import Process, Shapes, processes
from r3hf_ray.planning.transfers import Links, Transfer, checkpoint, weight_sync

TIGHT = 0.85
"""Share of a memory above which it is called tight: what is planned may be a fifth too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run will need.

    Example: ``RunPlan(processes=[...], nodes=[...], without=Counter(), verdicts={"learner": "fits"}, changes={},
    sync=Transfer(...), checkpoint=Transfer(...), notes=[])``
    """

    processes: list[Process]
    nodes: list[Node]
    without: Counter[str]
    """Processes of each kind that have no place."""
    verdicts: dict[str, str]
    """fits, tight or does not fit: of each kind of process, and of the host memory of the fullest node."""
    changes: dict[str, list[str]]
    """Of each that does not fit: what would have to change."""
    sync: Transfer
    checkpoint: Transfer
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether everything has a place and room."""
        return not self.without and "does not fit" not in self.verdicts.values()


def make_plan(config: PPOConfig, cluster: Cluster, links: Links) -> RunPlan:
    """Plan a run.

    Raises:
        ModelError: a configuration is not there, or transformers knows no such model.
    """
    shapes, notes = shapes_of(config)
    found = processes(config, shapes, gpu_bytes=cluster.gpu_bytes)
    nodes, without = place(found, cluster)
    verdicts, changes = {}, {}
    for number, process in enumerate(found[:3]):
        room = _room(process, nodes, cluster)
        verdicts[process.name] = _verdict(_size(process), room)
        if verdicts[process.name] == "does not fit":

            def size(changed: PPOConfig, number: int = number) -> int:
                return _size(processes(changed, _without_critic(changed, shapes), gpu_bytes=cluster.gpu_bytes)[number])

            changes[process.name] = advice(config, process, size, room)
    verdicts["host memory"] = _verdict(max(node.on_host for node in nodes), cluster.cpu_bytes)
    return RunPlan(
        processes=found,
        nodes=nodes,
        without=without,
        verdicts=verdicts,
        changes=changes,
        sync=weight_sync(config, shapes, nodes, links),
        checkpoint=checkpoint(config, shapes, nodes, links),
        notes=[*notes, *unready(config)],
    )


def shapes_of(config: PPOConfig) -> tuple[Shapes, list[str]]:
    """The models of a run, and what had to be assumed: a model that this job's runs have still to make is of the
    policy's size.

    Raises:
        ModelError: a configuration is not there, or transformers knows no such model.
    """
    known: dict[tuple[str, bool], ModelShape] = {}
    notes: list[str] = []
    runs = config.run.folder

    def shape(source: str, kind: str, *, scores: bool) -> ModelShape:
        if kind != "policy" and Path(source).is_relative_to(runs) and not Path(source).exists():
            note = f"{source} is not there yet: the {kind} is taken to be as large as the policy"
            notes.extend([] if note in notes else [note])
            source = config.model.policy
        key = (source, scores)
        if key not in known:
            known[key] = ModelShape(source, kind, scores=scores)
        return known[key]

    policy = shape(config.model.policy, "policy", scores=False)
    rewards = {name: shape(source, "reward model", scores=True) for name, source in config.model.reward_sources.items()}
    critic = None
    if config.has_critic:
        start = config.critic.source or config.model.reward_model
        critic = policy if config.critic_init == "sft" else shape(start, "critic", scores=True)
    source = config.model.reference or config.model.policy
    frozen = shape(source, "reference", scores=False) if config.has_reference else None
    return Shapes(policy=policy, critic=critic, reference=frozen, rewards=rewards), notes


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
    return {
        "fits": plan.fits,
        "verdicts": plan.verdicts,
        "changes": plan.changes,
        "processes": [
            {
                "name": process.name,
                "count": process.count,
                "gpu_bytes": process.on_gpu,
                "host_bytes": process.on_host,
                "largest_moment": process.at_most[0],
                "parts": process.at_most[1],
                "host_parts": process.host,
                "moments": {name: parts.total() for name, parts in process.device.items()},
            }
            for process in plan.processes
        ],
        "nodes": [{"holds": node.holds, "gpu_bytes": node.on_gpu, "host_bytes": node.on_host} for node in plan.nodes],
        "without_place": plan.without,
        "weight_sync": {"bytes": plan.sync.size, "seconds": plan.sync.seconds},
        "checkpoint": {"bytes": plan.checkpoint.size, "seconds": plan.checkpoint.seconds},
        "notes": plan.notes,
    }


def _without_critic(config: PPOConfig, shapes: Shapes) -> Shapes:
    if config.has_critic:
        return shapes
    return Shapes(policy=shapes.policy, critic=None, reference=shapes.reference, rewards=shapes.rewards)


def _size(process: Process) -> int:
    return process.on_gpu if process.gpus else process.on_host


def _room(process: Process, nodes: list[Node], cluster: Cluster) -> int:
    """For one process: its GPU without those that share it, or its node without the others there."""
    own = _size(process)
    if process.gpus:
        fullest = max((size for node in nodes if node.holds[process.name] for size in node.on_gpu), default=own)
        return cluster.gpu_bytes - (fullest - own if process.gpus < 1.0 else 0)
    fullest = max((node.on_host for node in nodes if node.holds[process.name]), default=own)
    return cluster.cpu_bytes - (fullest - own)


def _verdict(size: int, room: int) -> str:
    return "does not fit" if size > room else "tight" if size > TIGHT * room else "fits"
