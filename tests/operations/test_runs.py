"""What a person does to a run: ending it by its folder, reading what its members wrote, and clear refusals."""

import os
import platform
import signal
import threading
from pathlib import Path

import pytest
import ray

from r3hf_ray.cli import main
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.operations.logs import Place, Places, place_of, read_output
from r3hf_ray.operations.lookout import Lookout
from r3hf_ray.operations.runs import output, scale, stacked, stop
from r3hf_ray.records import lease as leases
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.lease import hold, new_lease, read_lease
from r3hf_ray.session import read_env_file


def test_a_run_is_ended_by_its_folder_as_sigterm_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    signalled = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.set() if number == signal.SIGTERM else None)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), hold(tmp_path, new_lease()):
        asking = threading.Thread(target=lambda: said.append(stop(tmp_path)), daemon=True)
        asking.start()
        assert signalled.wait(20.0)
        raise KeyboardInterrupt("step 3 is done and saved")
    asking.join(20.0)
    assert said == [f"{tmp_path}: stopped; step 3 is done and saved"]
    with hold(tmp_path, new_lease()):
        signalled.clear()
        assert not signalled.wait(0.3), "the next driver is not meant"


def test_a_run_that_does_not_run_cannot_be_stopped_or_scaled(tmp_path: Path) -> None:
    with hold(tmp_path, new_lease()):
        pass
    for act in (stop, lambda folder: scale(folder, ["rollout=2"]), lambda folder: place_of(folder, "rollout 0")):
        with pytest.raises(ConfigError):
            act(tmp_path)
    with pytest.raises(ConfigError, match="does not run: it is finished"):
        stop(tmp_path)


@pytest.mark.parametrize("word", ["rollout", "rollout=", "rollout=-1", "learner=2", "rollout=two"])
def test_only_counts_of_samplers_and_scorers_can_be_asked(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="say rollout=NUMBER or reward=NUMBER"):
        scale(tmp_path, [word])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A run with the output of a sampler that lived twice."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "worker-ab-01-7.out").write_text("one\ntwo\n")
    (logs / "worker-ab-01-7.err").write_text(":actor_name:rollout 1\nBoom\n")
    (logs / "worker-ab-01-77.out").write_text("of another\n")
    place = {"node": "f2", "host": platform.node(), "logs": str(logs)}
    with JsonlLog(tmp_path / "events.jsonl") as log:
        log.write({"event": "placed", "actor": "rollout 1", "pid": 6, **place})
        log.write({"event": "placed", "actor": "rollout 1", "pid": 7, **place})
    (tmp_path / "config.toml").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["rollout-1", "rollout 1", "rollout_1"])
def test_what_a_member_wrote_is_found_under_any_spelling(written: Path, name: str) -> None:
    assert list(output(written, name, follow=False)) == ["Boom", "one", "two"]


def test_a_member_that_never_was_is_refused_with_those_that_were(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(written), "rollout-9"]) == 2
    assert "rollout-9: no such member" in (said := capsys.readouterr().err) and "rollout 1" in said


def test_the_last_lines_are_those_of_each_file(written: Path) -> None:
    assert read_output(str(written / "logs"), 7, 1) == ["Boom", "two"]


def test_a_path_that_is_no_run_is_not_asked_of_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["logs"], ["scale"], ["stop"], ["verify"]):
        words = {"logs": ["rollout-0"], "scale": ["rollout=1"]}.get(command[0], [])
        assert main([*command, str(tmp_path / "none"), *words]) == 2
        assert "no run" in capsys.readouterr().err


def test_keys_come_from_a_file_and_never_over_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# keys\nexport A_KEY='one two'\nB_KEY=b=c\nnothing\n")
    monkeypatch.setenv("B_KEY", "mine")
    monkeypatch.setenv("A_KEY", "")
    monkeypatch.delenv("A_KEY")
    monkeypatch.setenv("R3HF_ENV_FILE", str(tmp_path / "keys"))
    assert read_env_file()
    assert (os.environ["A_KEY"], os.environ["B_KEY"]) == ("one two", "mine")
    monkeypatch.setenv("R3HF_ENV_FILE", str(tmp_path / "none"))
    assert not read_env_file()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_output_of_an_actor_that_died_is_read_from_its_node(tmp_path: Path) -> None:
    class Speaker:  # here, so that it travels by value: workers cannot import a test
        def say(self, text: str) -> None:
            os.write(1, f"{text}\n".encode())

    actor = ray.remote(num_cpus=0)(Speaker).options(name="speaker 0", namespace="logs").remote()
    ray.get(actor.say.remote("my last words"))
    places = Places()
    [place] = [each for each in places.new() if each.actor == "speaker 0"]
    assert place.host == platform.node() and place not in places.new()
    with JsonlLog(tmp_path / "events.jsonl") as log:
        log.write({"event": "placed", **{name: place.__getattribute__(name) for name in Place.__slots__}})
    with hold(tmp_path, new_lease(address=ray.get_runtime_context().gcs_address)):
        try:
            assert "say" in stacked(tmp_path, "speaker-0") or "Thread" in stacked(tmp_path, "speaker-0")
            assert list((tmp_path / "stacks").glob("speaker_0-*.txt"))
        except RunFailed as error:  # no py-spy, or a container that forbids it
            assert "py-spy" in str(error)
        ray.kill(actor)
        assert "my last words" in places.last_lines(["speaker 0"])["speaker 0"]
        assert "my last words" in list(output(tmp_path, "speaker-0", follow=False))
    assert read_lease(tmp_path) is not None


def test_a_lost_actors_event_has_its_last_words_and_a_ranks_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(actor="rank 0", node="f2", host="h", pid=7, logs="/logs")
    monkeypatch.setattr(Places, "note", lambda self, actor, node, pid: place)
    monkeypatch.setattr(Places, "last_lines", lambda self, actors: {actor: ["Boom"] for actor in actors})
    lookout = Lookout(tmp_path, "space")
    events = [
        {"event": "placed", "actor": "rank 0", "node": "f2", "pid": 7},
        {"event": "failure", "actor": "rollout 1", "reason": "it died"},
        {"event": "warning", "reason": "slow"},
    ]
    placed, failure, warning = lookout.told(events)
    assert placed["logs"] == "/logs" and placed["host"] == "h"
    assert failure["log"] == ["Boom"]
    assert warning == events[2]
