"""Where each process goes: learner ranks together first, then samplers, then reward actors, each on the first node with
room, as Ray packs them; the driver with coordinator and store on the first node.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import psutil
import torch

from r3hf_ray.planning.processes import GIB, Process

SLACK = 1e-6
"""For sums of fractions of a GPU or of a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes.

    Example: ``Cluster(nodes=2, gpus=8, gpu_bytes=80 * 2**30, cpus=None, cpu_bytes=1000 * 2**30)``
    """

    nodes: int
    gpus: int
    """Of a node."""
    gpu_bytes: int
    """Of one GPU."""
    cpus: float | None
    """Logical CPUs of a node; None: not counted."""
    cpu_bytes: int
    """Host memory of a node."""


def cluster_of(
    *,
    nodes: int,
    gpus: int | None = None,
    gpu_gib: float | None = None,
    cpus: float | None = None,
    cpu_gib: float | None = None,
) -> Cluster:
    """The cluster that was described; what was left out is as on this machine."""
    here = torch.cuda.device_count()
    own = torch.cuda.get_device_properties(0).total_memory if here else 80 * GIB
    return Cluster(
        nodes=nodes,
        gpus=here if gpus is None else gpus,
        gpu_bytes=own if gpu_gib is None else int(gpu_gib * GIB),
        cpus=cpus,
        cpu_bytes=psutil.virtual_memory().total if cpu_gib is None else int(cpu_gib * GIB),
    )


@dataclass(slots=True, kw_only=True)
class Node:
    """What is on a node.

    Example: ``Node(free=[1.0] * 8, on_gpu=[0] * 8, cpus=math.inf)``
    """

    free: list[float]
    """Share of each GPU that nobody has asked for."""
    on_gpu: list[int]
    """Bytes on each GPU."""
    cpus: float
    """CPUs that nobody has asked for."""
    on_host: int = 0
    """Bytes of host memory."""
    holds: Counter[str] = field(default_factory=Counter)

    def take(self, process: Process) -> bool:
        """Take one more process of this kind, if there is room."""
        slots = self._slots(process.gpus)
        if len(slots) < math.ceil(process.gpus - SLACK) or process.cpus > self.cpus + SLACK:
            return False
        for slot in slots:
            self.free[slot] -= min(process.gpus, 1.0)
            self.on_gpu[slot] += process.on_gpu
        self.cpus -= process.cpus
        self.on_host += process.on_host
        self.holds[process.name] += 1
        return True

    def _slots(self, gpus: float) -> list[int]:
        """GPUs that a process gets: whole ones, or the first with room for its share."""
        share, wanted = min(gpus, 1.0), math.ceil(gpus - SLACK)
        return [slot for slot, free in enumerate(self.free) if free >= share - SLACK][:wanted]


def place(processes: list[Process], cluster: Cluster) -> tuple[list[Node], Counter[str]]:
    """The nodes with what they hold, and how many processes of each kind have no place."""
    cpus = math.inf if cluster.cpus is None else cluster.cpus
    nodes = [Node(free=[1.0] * cluster.gpus, on_gpu=[0] * cluster.gpus, cpus=cpus) for _ in range(cluster.nodes)]
    without = Counter[str]()
    for process in processes:
        for _ in range(process.count):
            without[process.name] += not any(node.take(process) for node in nodes)
    return nodes, +without
