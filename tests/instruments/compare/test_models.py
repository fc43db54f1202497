"""The shared models are asked for with the right sizes, and each part is made once."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from r3hf_ray.config import RewardConfig, SFTConfig, load
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.compare import models
from r3hf_ray.instruments.compare.models import WORLD, ToyPaths, check_toy, prepare_toy, stage_configs
from r3hf_ray.instruments.compare.settings import CompareConfig, FurtherRewardModel, ToySection
from r3hf_ray.prepare import StageResult
from r3hf_ray.records.run_folder import to_toml

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> CompareConfig:
    monkeypatch.chdir(ROOT)
    return load(CompareConfig, ROOT / "jobs/compare_toy.toml", [])


def test_stages_are_those_of_the_quickstart(config: CompareConfig, tmp_path: Path) -> None:
    toy, paths = config.toy, ToyPaths(tmp_path)
    assert toy is not None
    sft, (reward,) = stage_configs(toy, paths)
    assert (sft.run.folder / sft.run.name / "model", reward.run.folder / reward.run.name / "model") == (
        paths.policy,
        paths.reward_model,
    )
    assert (reward.model.base, reward.data.source) == (str(paths.policy), str(paths.ranked))
    assert sft.sft.max_tokens == reward.reward_training.max_tokens == 64
    assert sft.sft == load(SFTConfig, toy.sft_job, []).sft
    assert reward.reward_training == load(RewardConfig, toy.reward_job, []).reward_training
    longer, (judge,) = stage_configs(toy.model_copy(update={"max_response_tokens": 96}), paths)
    assert longer.sft.max_tokens == judge.reward_training.max_tokens == 112


def test_models_of_other_settings_are_refused(config: CompareConfig, tmp_path: Path) -> None:
    toy, paths = config.toy, ToyPaths(tmp_path)
    assert toy is not None
    check_toy(toy, paths)  # nothing is there
    paths.settings.write_text(json.dumps({name: dict(toy)[name] for name in WORLD}))
    check_toy(toy, paths)
    with pytest.raises(ConfigError, match=r"toy\.groups: .* was made with 2000, not 500; set it back"):
        check_toy(toy.model_copy(update={"groups": 500}), paths)
    sft, _ = stage_configs(toy, paths)
    (tmp_path / "sft/model").mkdir(parents=True)
    (tmp_path / "sft/config.toml").write_text(to_toml(sft))
    check_toy(toy, paths)
    slower = to_toml(sft).replace(f"learning_rate = {sft.sft.learning_rate}", "learning_rate = 0.125")
    (tmp_path / "sft/config.toml").write_text(slower)
    with pytest.raises(ConfigError, match=r"sft\.learning_rate"):
        check_toy(toy, paths)


def test_further_reward_models_differ_in_what_they_say_only(config: CompareConfig, tmp_path: Path) -> None:
    toy, paths = config.toy, ToyPaths(tmp_path)
    assert toy is not None
    summed = FurtherRewardModel(name="summed", overrides=("--reward_training.head", "running_sum"), seed=3)
    _, (plain, further) = stage_configs(toy.model_copy(update={"reward_models": (summed,)}), paths)
    assert (further.run.name, further.run.seed, further.reward_training.head) == ("summed", 3, "running_sum")
    assert (plain.run.name, plain.run.seed, plain.data) == ("reward", toy.seed, further.data)
    with pytest.raises(ValueError, match="cannot set run"):
        FurtherRewardModel(name="summed", overrides=("--run.seed", "3"))


def test_each_part_is_made_once_and_a_torn_one_again(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def world(folder: Path, **sizes: Any) -> None:
        made.append("world")
        folder.mkdir(exist_ok=True)

    def ranked(policy: Path, path: Path, **sizes: Any) -> None:
        made.append("ranked")
        path.write_text("torn")
        if made.count("ranked") == 1:
            raise OSError("disk full")

    def stage(config: SFTConfig | RewardConfig, *, resume: bool, note: object) -> StageResult:
        made.append(config.run.name)
        assert resume, "the stage itself sees that it is done"
        return StageResult(folder=tmp_path, model=tmp_path, metrics={}, report=None, seconds=0.0)

    for name, fake in (("make_world", world), ("make_ranked", ranked), ("train_sft", stage), ("train_reward", stage)):
        monkeypatch.setattr(models, name, fake)
    toy = config.toy
    assert isinstance(toy, ToySection)
    with pytest.raises(OSError, match="disk full"):
        prepare_toy(toy, ToyPaths(tmp_path), Console(quiet=True))
    for _ in range(2):
        prepare_toy(toy, ToyPaths(tmp_path), Console(quiet=True))
    assert made == ["world", "sft", "ranked", "sft", "ranked", "reward", "sft", "reward"]
