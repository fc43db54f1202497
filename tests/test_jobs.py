"""Every job in jobs/ loads with the schema of its command, and can stand next to the others."""

import tomllib
from pathlib import Path

import pytest

from r3hf_ray.config import Command, PPOConfig, RewardConfig, SFTConfig, load

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").rglob("*.toml"))
jobs = pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)


def schema_of(path: Path) -> type[Command]:
    """The command a job is for: its file name ends in _sft or _reward, or else it is a job of `r3hf ppo`."""
    sections = tomllib.loads(path.read_text())
    command = "sft" if "sft" in sections else "reward" if "reward_training" in sections else "ppo"
    named = path.stem.rsplit("_", 1)[-1]
    assert named == command or named not in {"sft", "reward"}, f"{path.name} has the sections of `r3hf {command}`"
    return {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}[command]


def test_there_are_jobs() -> None:
    assert len(JOBS) >= 3


@jobs
def test_job_loads(path: Path) -> None:
    config = load(schema_of(path), path, [])
    assert config.run.name


@jobs
def test_job_runs_on_any_machine(path: Path) -> None:
    config = load(schema_of(path), path, [])
    places = [str(config.run.folder), config.data.source, *(str(value) for value in config.model.model_dump().values())]
    assert not [place for place in places if place.startswith(("/", "~", ".."))], "a path of one machine only"


def test_run_names_do_not_collide() -> None:
    names = [load(schema_of(path), path, []).run.name for path in JOBS]
    assert len(names) == len(set(names)), f"two jobs would write into one folder: {sorted(names)}"
