"""Where the ranks of a group meet: on the network that carries Ray, whatever the host's own name resolves to.

Gloo takes the address of the host's name, which is 127.0.1.1 on most Debian machines: ranks on two hosts then never
meet.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class MeetingConfig(TorchConfig):
    """Ray Train's configuration of a torch process group, whose ranks first choose their network interface."""

    @property
    def backend_cls(self) -> type["MeetingBackend"]:
        """What Ray Train starts the group with."""
        return MeetingBackend


class MeetingBackend(_TorchBackend):
    """Ray Train's own, after each rank has been told its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called in Ray Train's controller once all ranks are there."""
        worker_group.execute(use_rays_interface)
        super().on_start(worker_group, backend_config)


def use_rays_interface() -> None:
    """Tell gloo and NCCL the interface that carries this node's Ray address, unless the user has named one."""
    interface = interface_of(ray.util.get_node_ip_address(), _addresses())
    if interface is not None:
        for name in VARIABLES:
            os.environ.setdefault(name, interface)


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The interface that has an address; None if none has it (behind a translation of addresses), or it is loopback.

    Example: ``interface_of("10.0.0.2", {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]}) == "eth0"``
    """
    if address.startswith("127.") or address == "::1":
        return None
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def _addresses() -> dict[str, list[str]]:
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
