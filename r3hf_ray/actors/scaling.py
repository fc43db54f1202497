"""Growing and shrinking the fleet of a run that goes on, within what its settings allow."""

from collections.abc import Mapping

from r3hf_ray.actors.fleet import Fleet
from r3hf_ray.config import PPOConfig


def rescale(fleet: Fleet, config: PPOConfig, asked: Mapping[str, int | None]) -> str:
    """Have so many actors of each kind from now on, None: as many as there are; why not, empty where it is done."""
    wished = {kind: actors for kind, actors in asked.items() if actors is not None}
    for kind, actors in wished.items():
        if wrong := refusal(config, kind, actors):
            return wrong
    for kind, actors in wished.items():
        now = sum(not member.leaves for member in fleet.pools[kind].members)
        fleet.timeline.add("scaled", actor=kind, before=now, actors=actors)
        if actors > now:
            fleet.grow(kind, actors - now)
        else:
            fleet.shrink(kind, now - actors)
    return ""


def refusal(config: PPOConfig, kind: str, actors: int) -> str:
    """Why a run cannot have so many actors of a kind; empty if it can."""
    section = config.rollout if kind == "rollout" else config.reward
    least = config.rollout.min_actors if kind == "rollout" else 1
    if kind == "rollout" and config.weights.backend == "nccl":
        return "weights.backend = nccl: its group of samplers is fixed; with object_ref they can come and go"
    if actors < least:
        return f"{kind} = {actors}: fewer than {least}" + (" (rollout.min_actors)" if kind == "rollout" else "")
    if section.max_actors is not None and actors > section.max_actors:
        return f"{kind} = {actors}: more than {section.max_actors} ({kind}.max_actors)"
    return ""
