"""Every job in jobs/ loads with the schema of its command, and can stand next to the others."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from r3hf_ray.config import PPOConfig, RewardConfig, SFTConfig
from r3hf_ray.data.records import parse
from r3hf_ray.data.sources import LOCAL_SUFFIXES
from r3hf_ray.instruments.compare.comparison import plan_runs
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.settings import Command, load
from r3hf_ray.user_functions import user_function

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").rglob("*.toml"))
jobs = pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)


def schema_of(path: Path) -> type[Command]:
    """The command a job is for: its file name ends in _sft or _reward, or else it is one of `r3hf ppo` or `compare`."""
    sections = tomllib.loads(path.read_text())
    if "arms" in sections:
        return CompareConfig
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
    places = [str(config.run.folder)]
    if isinstance(config, CompareConfig):
        places.append(str(config.compare.job))
    else:
        places += [config.data.source, *(str(value) for value in config.model.model_dump().values())]
    assert not [place for place in places if place.startswith(("/", "~", ".."))], "a path of one machine only"


@pytest.mark.parametrize(
    "path", [path for path in JOBS if schema_of(path) is CompareConfig], ids=lambda path: path.stem
)
def test_every_arm_of_a_comparison_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = plan_runs(load(CompareConfig, path, []))
    assert len({run.folder for run in plan}) == len(plan) >= 2
    different = {(run.config.model_dump_json(exclude={"run"}), run.schedules) for run in plan}
    assert len(different) == len({run.arm for run in plan})


def test_the_safety_preset_is_half_the_reward_minus_half_the_cost() -> None:
    config = load(PPOConfig, ROOT / "jobs" / "pku_saferlhf.toml", [])
    assert config.model.weights(config.cost.multiplier) == {"reward": 0.5, "cost": -0.5}
    assert config.cost.multiplier_lr == 0.0
    models = [load(RewardConfig, ROOT / "jobs" / f"pku_saferlhf_{kind}.toml", []) for kind in ("reward", "cost")]
    folders = [f"{model.run.folder}/{model.run.name}/model" for model in models]
    assert folders == [config.model.reward_model, config.model.cost]
    assert [model.data.format for model in models] == ["safe_rlhf", "safe_rlhf_cost"]


HUB_ROWS: dict[str, dict[str, Any]] = {
    "Anthropic/hh-rlhf": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "PKU-Alignment/PKU-SafeRLHF": {
        **{"prompt": "q", "response_0": "a", "response_1": "b"},
        **{"better_response_id": 0, "safer_response_id": 1},
    },
    "berkeley-nest/Nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}],
    },
    "trl-lib/tldr": {"prompt": "q", "completion": "a"},
    "trl-lib/tldr-preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
}
"""The hub datasets that jobs may name, each with a row of its shape. All hold files: `datasets` 5 runs no script, and
openai/summarize_from_feedback is one."""


@pytest.mark.parametrize(
    "path", [path for path in JOBS if schema_of(path) is not CompareConfig], ids=lambda path: path.stem
)
def test_a_hub_dataset_holds_files_of_the_shape_that_is_read(path: Path) -> None:
    config = load(schema_of(path), path, [])
    if config.data.source.endswith(LOCAL_SUFFIXES):
        return
    record = parse(HUB_ROWS[config.data.source], config.data.format)
    assert record.prompt == [{"role": "user", "content": "q"}]
    if isinstance(config, RewardConfig):
        assert [answer.strip() for answer in record.answers] == ["a", "b"] and record.pairs == [(0, 1)]
    if isinstance(config, SFTConfig):
        assert record.answers == ["a"]


def test_run_names_do_not_collide() -> None:
    names = [load(schema_of(path), path, []).run.name for path in JOBS]
    assert len(names) == len(set(names)), f"two jobs would write into one folder: {sorted(names)}"


def test_every_function_that_a_job_names_exists() -> None:
    named = {name for path in JOBS for name in re.findall(r'"([a-z_]\w*(?:\.\w+)+:\w+)"', path.read_text())}
    assert len(named) >= 4, "user's functions are found by their form, package.module:function"
    for name in sorted(named):
        assert callable(user_function(name, field="jobs"))
