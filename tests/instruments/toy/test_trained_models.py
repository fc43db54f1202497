"""The shared models are asked for with the right sizes, and each part is made once."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.toy import trained_models
from r3hf_ray.instruments.toy.settings import FurtherRewardModel, ToySection
from r3hf_ray.instruments.toy.trained_models import ToyModels
from r3hf_ray.prepare import StageResult
from r3hf_ray.records.run_folder import to_toml
from r3hf_ray.settings import load

ROOT = Path(__file__).parents[3]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyModels:
    monkeypatch.chdir(ROOT)
    return ToyModels(ToySection(), tmp_path)


def changed(models: ToyModels, **settings: Any) -> ToyModels:
    return ToyModels(ToySection.model_validate(settings), models.root)


def test_stages_are_those_of_the_jobs(models: ToyModels) -> None:
    sft, (reward,) = models.stages()
    assert (sft.run.folder / sft.run.name / "model", reward.run.folder / reward.run.name / "model") == (
        models.policy,
        models.reward_model,
    )
    assert (reward.model.base, reward.data.source) == (str(models.policy), str(models.ranked))
    assert sft.sft.max_tokens == reward.reward_training.max_tokens == 64
    assert sft.sft == load(SFTConfig, models.toy.sft_job, []).sft
    assert reward.reward_training == load(RewardConfig, models.toy.reward_job, []).reward_training
    longer, (judge,) = changed(models, max_response_tokens=96).stages()
    assert longer.sft.max_tokens == judge.reward_training.max_tokens == 112


def test_models_of_other_settings_are_refused(models: ToyModels) -> None:
    models.check()  # nothing is there
    kept = {"seed": 0, "max_response_tokens": 48, "sft_rows": 20_000, "train_prompts": 1920, "heldout_prompts": 512}
    models.made_from.write_text(json.dumps(kept | {"groups": 2000, "heldout_pairs": 1000}))
    models.check()
    with pytest.raises(ConfigError, match=r"toy\.groups: .* was made with 2000, not 500; set it back"):
        changed(models, groups=500).check()
    sft, _ = models.stages()
    (models.root / "sft/model").mkdir(parents=True)
    (models.root / "sft/config.toml").write_text(to_toml(sft))
    models.check()
    slower = to_toml(sft).replace(f"learning_rate = {sft.sft.learning_rate}", "learning_rate = 0.125")
    (models.root / "sft/config.toml").write_text(slower)
    with pytest.raises(ConfigError, match=r"sft\.learning_rate"):
        models.check()


def test_further_reward_models_differ_in_what_they_say_only(models: ToyModels) -> None:
    summed = FurtherRewardModel(name="summed", overrides=("--reward_training.head", "running_sum"), seed=3)
    _, (plain, further) = changed(models, reward_models=(summed,)).stages()
    assert (further.run.name, further.run.seed, further.reward_training.head) == ("summed", 3, "running_sum")
    assert (plain.run.name, plain.run.seed, plain.data) == ("reward", models.toy.seed, further.data)
    with pytest.raises(ValueError, match="cannot set run"):
        FurtherRewardModel(name="summed", overrides=("--run.seed", "3"))


def test_each_part_is_made_once_and_a_torn_one_again(models: ToyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def world(folder: Path, toy: ToySection) -> None:
        made.append("world")
        folder.mkdir(exist_ok=True)

    def ranked(policy: Path, path: Path, toy: ToySection) -> None:
        made.append("ranked")
        path.write_text("torn")
        if made.count("ranked") == 1:
            raise OSError("disk full")

    def stage(config: SFTConfig | RewardConfig, *, resume: bool, on_row: object, note: object) -> StageResult:
        made.append(config.run.name)
        assert resume, "the stage itself sees that it is done"
        return StageResult(folder=models.root, model=models.root, metrics={}, report=None, seconds=0.0)

    for name, fake in (("make_world", world), ("make_ranked", ranked), ("train_sft", stage), ("train_reward", stage)):
        monkeypatch.setattr(trained_models, name, fake)
    with pytest.raises(OSError, match="disk full"):
        models.prepare(Console(quiet=True))
    for _ in range(2):
        models.prepare(Console(quiet=True))
    assert made == ["world", "sft", "ranked", "sft", "ranked", "reward", "sft", "reward"]
    assert not models.complete(), "the fakes leave no models"
