"""A lab of hosts for each test, and `r3hf ppo` of a small toy job on it, driven from the head."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made.toy_job import toy_job

from hosts.lab import Host, Lab, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs what makes hosts."""
    reason = missing()
    for item in items:
        if "hosts" in item.path.parts:
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.timeout(900))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(slots=True)
class Driver:
    """A command on a host that writes into a run's folder, and what it has written so far."""

    host: Host
    folder: Path
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        """All it has printed."""
        return self.log.read_text(errors="replace")

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of some kinds, in order."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] in kinds]

    @property
    def steps(self) -> list[int]:
        """Steps that have a row of metrics, in the order they were done."""
        path = self.folder / "metrics.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        return [row["train/global_step"] for row in rows if "policy/loss" in row]

    def wait_for(self, condition: Callable[[], object], what: str, *, seconds: float = 240.0) -> None:
        """Until something holds; fails where it does not, or the command ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.said[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s: {self.said[-3000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are done."""
        self.wait_for(lambda: max(self.steps, default=0) >= step, f"step {step}")

    def verified(self) -> str:
        """What `r3hf verify` prints of the run; fails where it finds a fault."""
        return self.host.run("r3hf", "verify", str(self.folder), timeout=120.0)

    def end(self, *, seconds: float = 420.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds:.0f} s: {self.said[-3000:]}") from None


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An empty lab."""
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained toy policy, a random reward model, and prompts."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from r3hf_ray.instruments.toy.settings import ToySection
    from r3hf_ray.instruments.toy.world import make_world

    folder = tmp_path_factory.mktemp("hosts_world")
    make_world(folder, ToySection(sft_rows=1, train_prompts=24, heldout_prompts=8))
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig.from_pretrained(folder / "base", num_labels=1))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "reward")
    return folder


@pytest.fixture
def ppo(world: Path) -> Callable[..., Driver]:
    """`ppo(lab, *arguments, steps=6)`: the toy job, started on the head, in a run folder that all hosts share."""
    import shutil

    def start(lab: Lab, *arguments: str, steps: int = 6, log: str = "ppo.log") -> Driver:
        if not (lab.shared / "world").exists():
            shutil.copytree(world, lab.shared / "world")
            job = toy_job(lab.shared / "world", lab.shared / "runs", steps=steps)
            (lab.shared / "job.toml").write_text(job)
        words = ("r3hf", "ppo", str(lab.shared / "job.toml"), *arguments)
        head = lab.hosts[0]
        process = head.popen(*words, environment={"RAY_ADDRESS": lab.ray_address}, log=log)
        return Driver(head, lab.shared / "runs" / "run", process, head.folder / "log" / log)

    return start
