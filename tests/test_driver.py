"""What happens before a run has actors: Ray that cannot be joined or started is one sentence."""

import socket

import pytest
import ray

from r3hf_ray.actors.pipeline import RunFailed
from r3hf_ray.config import ConfigError
from r3hf_ray.driver import ray_session, require_answer


def test_a_ray_that_does_not_start_is_a_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        assert options["address"] == "local"
        raise Exception("The current node timed out during startup.")  # what Ray 2.60 raises

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(RunFailed, match=r"Ray did not start: The current node timed out .*overloaded"),
        ray_session(1.0),
    ):
        pass


def test_a_cluster_that_is_not_there_is_named_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60 alone waits for ten minutes."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = "{}:{}".format(*nobody.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        what = f"RAY_ADDRESS: cannot join the cluster at {address}: .*[Rr]efused"
        with pytest.raises(ConfigError, match=what), ray_session(None):
            pass


@pytest.mark.parametrize("address", ["auto", "local", "ray://cluster"])
def test_only_a_host_and_port_are_tried(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", None)
    require_answer(address)
