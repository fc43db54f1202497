"""What actors are started with. The driver knows it; the coordinator starts them, and so owns them."""

from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r3hf_ray.actors.environment import ACTORS, of_threads
from r3hf_ray.actors.reward import RewardActor
from r3hf_ray.actors.rollout import GROUPS, RolloutActor
from r3hf_ray.actors.sampler import engine_environment
from r3hf_ray.sections.actors import EngineFacts, RolloutSection


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMaker:
    """What an actor is started with; it travels from the driver to the coordinator, which starts them."""

    kind: type
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    groups: dict[str, int]
    """Concurrency groups."""

    def __call__(self, name: str) -> Any:
        """Start one, anywhere in the cluster: not where the coordinator has to be."""
        make = ray.remote(concurrency_groups=self.groups)(self.kind)
        return make.options(name=name, scheduling_strategy="DEFAULT", **self.options).remote(*self.arguments)


def rollout_maker(section: RolloutSection, facts: EngineFacts, *, namespace: str) -> ActorMaker:
    """What makes samplers."""
    environment = engine_environment(section) | of_threads(
        section.threads, cpus=section.cpus_per_actor, overlap=section.max_lag > 0
    )
    return _maker(RolloutActor, (section, facts), section, environment, GROUPS, namespace)


def reward_maker(settings: Any, *, namespace: str, overlap: bool) -> ActorMaker:
    """What makes scorers from `ScoringSettings`; ``overlap``: they work while the learner does."""
    section = settings.reward
    environment = of_threads(section.threads, cpus=section.cpus_per_actor, overlap=overlap)
    # As bytes, since settings of scoring are made of what imports torch.
    return _maker(RewardActor, (cloudpickle.dumps(settings),), section, environment, {"health": 1}, namespace)


def _maker(
    kind: type,
    arguments: tuple[Any, ...],
    section: Any,
    environment: dict[str, str],
    groups: dict[str, int],
    space: str,
) -> ActorMaker:
    options = {
        "namespace": space,
        "num_cpus": section.cpus_per_actor,
        "num_gpus": section.gpus_per_actor,
        "max_restarts": -1,
        # A repeated call would meet other weights, or an object that is gone: what failed is sent again from here.
        "max_task_retries": 0,
        "runtime_env": {"env_vars": ACTORS | environment},
    }
    return ActorMaker(kind=kind, arguments=arguments, options=options, groups=groups)


def named_actor(kind: type, name: str, *arguments: Any, namespace: str, **options: Any) -> Any:
    """Start an actor without resources of its own on the driver's node, which others look up by its name.

    Without resources Ray would place it anywhere, also on a node that can be taken away.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    start = ray.remote(kind).options(name=name, namespace=namespace, num_cpus=0, scheduling_strategy=here)
    return start.remote(*arguments, **options)
