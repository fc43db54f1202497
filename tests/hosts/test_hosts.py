"""What only several hosts show: ranks that must find each other, hosts that die, nodes that come late."""

from collections.abc import Callable

import pytest

from hosts.conftest import Driver
from hosts.lab import Lab

pytestmark = pytest.mark.hosts


def three(lab: Lab, *, cpus: float) -> None:
    """A head without CPUs, and two workers."""
    for name, its in (("head", 0.0), ("a", cpus), ("b", cpus)):
        lab.host(name).start_ray(cpus=its)


def test_ranks_on_two_hosts_meet_where_each_hosts_name_is_its_own_loopback(ppo: Callable[..., Driver]) -> None:
    with Lab(loopback_names=True) as lab:
        three(lab, cpus=1.2)
        run = ppo(lab, "--learner.ranks", "2", "--learner.cpus_per_rank", "0.7", steps=2)
        assert run.end() == 0, run.said
        assert run.steps == [1, 2]


@pytest.mark.parametrize("name", ["a"])
def test_a_lab_forgets_nothing_of_a_host_that_was_killed(lab: Lab, name: str) -> None:
    head, host = lab.host("head"), lab.host(name)
    head.start_ray(cpus=0)
    host.start_ray(cpus=1)
    host.kill()
    assert host.pids() == [] and head.in_ray
    host.start_ray(cpus=1)
    assert host.address in lab.nodes()
    host.cut()
    with pytest.raises(RuntimeError, match="ends with"):
        head.run("python", "-c", f"import socket; socket.create_connection(('{host.address}', 22), timeout=2)")
    host.mend()
    assert host.run("hostname").strip() == name and head.run("cat", "/etc/hostname") is not None
