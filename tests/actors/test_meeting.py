"""Which network interface the ranks of a group meet on. That they do meet: tests/hosts."""

import pytest

from r3hf_ray.actors import meeting

INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.2", "fe80::1"], "ib0": ["10.1.0.2"]}


@pytest.mark.parametrize(
    "address, interface",
    [
        ("10.0.0.2", "eth0"),
        ("10.1.0.2", "ib0"),
        ("fe80::1", "eth0"),
        ("127.0.0.1", None),
        ("::1", None),
        (("9.9", None)),
    ],
)
def test_the_interface_is_the_one_that_carries_rays_address(address: str, interface: str | None) -> None:
    assert meeting.interface_of(address, INTERFACES) == interface


def test_what_the_user_has_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting.ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr(meeting, "_addresses", lambda: INTERFACES)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    meeting.use_rays_interface()
    assert [meeting.os.environ.pop(name) for name in meeting.VARIABLES] == ["eth0", "ib0"]


def test_this_machines_interfaces_are_read() -> None:
    assert "127.0.0.1" in [address for addresses in meeting._addresses().values() for address in addresses]
