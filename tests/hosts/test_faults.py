"""Every fault that can be injected on a cluster of hosts: the run goes on by itself, and its own record proves it.

Each test ends with a finished run, every step done once on the line that survives, and a green `r3hf verify`.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts.conftest import Driver
from hosts.lab import Host, Lab

pytestmark = pytest.mark.hosts

SAMPLER, SCORER, RANK = "ray::RolloutActor", "ray::RewardActor", "ray::RayTrainWorker"
TWO_SAMPLERS = ("--rollout.actors", "2", "--rollout.cpus_per_actor", "0.5", "--reward.cpus_per_actor", "0.3")
QUICK = ("--run.patience", "20", "--learner.cpus_per_rank", "0.5")
STEPS = 6

Start = Callable[..., Driver]


def two_workers(lab: Lab, *, cpus: float = 2.0) -> tuple[Host, Host]:
    """A head without CPUs, and two hosts of which each could carry the whole run."""
    lab.host("head").start_ray(cpus=0)
    a, b = lab.host("a"), lab.host("b")
    a.start_ray(cpus=cpus)
    b.start_ray(cpus=cpus)
    return a, b


def of(lab: Lab, title: str) -> list[tuple[Host, int]]:
    """Processes with a title, and whose they are."""
    return [(host, pid) for host in lab.hosts for pid in host.processes(title)]


def host_of(lab: Lab, title: str) -> Host:
    """A host with such a process."""
    return of(lab, title)[0][0]


def ended_well(run: Driver, *, steps: int = STEPS) -> None:
    """It finished, did each step once on the line that survives, and verify proves it."""
    assert run.end() == 0, run.said[-4000:]
    assert sorted(set(run.steps)) == list(range(1, steps + 1))
    proof = run.verified()
    assert "not proven" not in proof, proof


def test_a_sampler_killed_in_mid_generation(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(1)
    host, pid = of(lab, SAMPLER)[0]
    host.signal(signal.SIGKILL, pid)
    ended_well(run)
    assert any("rollout" in event["actor"] for event in run.events("failure"))


def test_all_samplers_and_scorers_killed_at_once(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(2)
    for host, pid in of(lab, SAMPLER) + of(lab, SCORER):
        host.signal(signal.SIGKILL, pid)
    ended_well(run)
    assert not run.events("quarantined"), "nobody's fault is a sample's"


@pytest.mark.slow
def test_one_sampler_a_step_for_ten_steps(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=12)
    dice = random.Random(0)
    for step in range(1, 11):
        run.wait_for_step(step)
        if samplers := of(lab, SAMPLER):
            host, pid = dice.choice(samplers)
            host.signal(signal.SIGKILL, pid)
    ended_well(run, steps=12)
    assert len(run.events("recovered")) >= 5 and not run.events("quarantined")


def test_a_host_dies_with_all_that_is_on_it_and_comes_back(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(2)
    host = host_of(lab, SAMPLER)
    host.kill()
    time.sleep(25.0)
    host.start_ray(cpus=2.0)
    ended_well(run)


@pytest.mark.parametrize("seconds", [20.0, pytest.param(120.0, marks=pytest.mark.slow)])
def test_a_host_is_cut_off_and_comes_back(lab: Lab, ppo: Start, seconds: float) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(2)
    host = host_of(lab, SAMPLER)
    host.cut()
    time.sleep(seconds)
    host.mend()
    if seconds > 60.0:  # dead to Ray by then: its raylet ends as soon as it hears so
        deadline = time.monotonic() + 60.0
        while host.in_ray and time.monotonic() < deadline:
            time.sleep(1.0)
        if not host.in_ray:
            host.start_ray(cpus=2.0)
    ended_well(run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loses 5%", "10 Mbit/s"])
def test_a_bad_network_is_slow_and_right(lab: Lab, ppo: Start, fault: str) -> None:
    for host in two_workers(lab):
        host.lose(0.05) if fault == "loses 5%" else host.slow(10.0)
    run = ppo(lab, *TWO_SAMPLERS, "--run.patience", "60", "--learner.cpus_per_rank", "0.5", steps=3)
    ended_well(run, steps=3)


def test_a_stopped_sampler_is_named_and_replaced(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(1)
    host, pid = of(lab, SAMPLER)[0]
    host.signal(signal.SIGSTOP, pid)
    ended_well(run)
    assert any("rollout" in event["actor"] for event in run.events("failure"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_learner_rank_dies(lab: Lab, ppo: Start, rank: int) -> None:
    two_workers(lab)
    run = ppo(lab, *QUICK, "--learner.ranks", "2", steps=STEPS)
    run.wait_for_step(2)
    ranks = of(lab, RANK)
    assert len(ranks) == 2
    host, pid = ranks[rank]
    host.signal(signal.SIGKILL, pid)
    ended_well(run)
    (restart,) = run.events("restart")
    assert restart["reason"]


@pytest.mark.parametrize("title", ["ray::WeightStore", "ray::Coordinator"])
def test_what_stands_on_the_drivers_host_dies(lab: Lab, ppo: Start, title: str) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(2)
    (victim,) = of(lab, title)
    assert victim[0] is lab.hosts[0], "never on a host that can be taken away"
    victim[0].signal(signal.SIGKILL, victim[1])
    ended_well(run)
    assert "building everything anew" in run.said


def test_a_driver_dies_and_the_same_command_goes_on(lab: Lab, ppo: Start) -> None:
    two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=STEPS)
    run.wait_for_step(3)
    (driver,) = [pid for pid in lab.hosts[0].pids() if pid == run.process.pid]
    lab.hosts[0].signal(signal.SIGKILL, driver)
    run.process.wait(30)
    again = ppo(lab, *TWO_SAMPLERS, *QUICK, "--resume", steps=STEPS, log="again.log")
    ended_well(again)


def test_nodes_come_late(lab: Lab, ppo: Start) -> None:
    lab.host("head").start_ray(cpus=0)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, steps=3)
    run.wait_for(lambda: "waiting for nodes" in run.said, "word of what is missing")
    lab.host("a").start_ray(cpus=1.4)
    run.wait_for_step(1)
    lab.host("b").start_ray(cpus=2.0)
    ended_well(run, steps=3)


def test_a_disk_that_is_full_when_a_checkpoint_is_due(lab: Lab, ppo: Start, tmp_path: Path) -> None:
    """The rank's own disk fills and is freed again: what was done stays, and the run goes on."""
    a, b = two_workers(lab)
    run = ppo(lab, *TWO_SAMPLERS, *QUICK, "--learner.max_failures", "30", steps=STEPS)
    run.wait_for_step(1)
    checkpoints = run.folder / "checkpoints"
    for host in (a, b):
        host.mount(checkpoints, size="64k", read_only=True)
    time.sleep(15.0)
    for host in (a, b):
        host.run("umount", str(checkpoints))
    ended_well(run)
