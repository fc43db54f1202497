"""Where processes go."""

from collections import Counter

from r3hf_ray.planning.placement import Cluster, place
from r3hf_ray.planning.processes import Process

CLUSTER = Cluster(nodes=2, gpus=4, gpu_bytes=80, cpus=None, cpu_bytes=1000)


def process(name: str, count: int, *, gpus: float, size: int = 10, cpus: float = 1.0) -> Process:
    return Process(
        name=name, count=count, cpus=cpus, gpus=gpus, device={"m": Counter({"x": size})}, host=Counter({"libraries": 1})
    )


def test_ranks_stay_together_and_the_rest_fills_up() -> None:
    nodes, without = place([process("learner", 4, gpus=1.0), process("sampler", 3, gpus=1.0)], CLUSTER)
    assert [dict(node.holds) for node in nodes] == [{"learner": 4}, {"sampler": 3}]
    assert (nodes[1].on_gpu, nodes[1].on_host, without) == ([10, 10, 10, 0], 3, Counter())


def test_what_has_no_place_is_counted() -> None:
    _, without = place([process("learner", 7, gpus=1.0), process("sampler", 1, gpus=2.0)], CLUSTER)
    assert without == {"sampler": 1}, "one GPU is free, and two are asked for"
    few = Cluster(nodes=1, gpus=0, gpu_bytes=0, cpus=2.0, cpu_bytes=100)
    nodes, without = place([process("learner", 3, gpus=0.0)], few)
    assert (without, nodes[0].on_host) == ({"learner": 1}, 22)


def test_shares_of_a_gpu_add_up_on_it() -> None:
    nodes, without = place([process(name, 1, gpus=0.4, size=20) for name in ("learner", "sampler", "reward")], CLUSTER)
    assert not without
    assert nodes[0].on_gpu[:3] == [40, 20, 0]


def test_several_gpus_hold_a_share_each() -> None:
    nodes, _ = place([process("sampler", 1, gpus=4.0, size=30)], CLUSTER)
    assert nodes[0].on_gpu == [30, 30, 30, 30]
