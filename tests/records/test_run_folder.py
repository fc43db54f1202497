"""A run's folder: made once, continued only as the same run."""

import shutil
from pathlib import Path

import pytest

from r3hf_ray.config import PPOConfig, RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.lease import hold, new_lease
from r3hf_ray.records.run_folder import PPO_MAY_CHANGE, STAGE_MAY_CHANGE, STAGE_MAY_MOVE, check_run, open_run, to_toml
from r3hf_ray.settings import Command, load

MODELS = {"policy": "models/policy", "reward_model": "models/reward"}


def ppo(folder: Path, **sections: dict) -> PPOConfig:
    run = {"name": "a-run", "folder": folder} | sections.pop("run", {})
    model = MODELS | sections.pop("model", {})
    return PPOConfig(run=run, model=model, data={"source": "prompts.jsonl"} | sections.pop("data", {}), **sections)


def test_a_folder_is_made_with_its_settings(tmp_path: Path) -> None:
    config = ppo(tmp_path, rollout={"engine_args": {"a": [1, 2.5], "b": 'say "hi"'}}, optimizer={"betas": (0.9, 0.95)})
    folder, attempt = open_run(config, config.run, resume=False)
    assert (folder, attempt) == (tmp_path / "a-run", 0)
    assert load(PPOConfig, folder / "config.toml", []) == config
    assert (folder / "config.toml").read_text() == to_toml(config)


def test_several_models_survive_the_folder(tmp_path: Path) -> None:
    rewards = [{"name": "brevity", "source": "models/brevity", "weight": -0.5}]
    config = ppo(tmp_path, model={"rewards": rewards, "cost": "models/cost"}, cost={"multiplier": 2.0, "limit": 1.5})
    folder, _ = open_run(config, config.run, resume=False)
    again = load(PPOConfig, folder / "config.toml", [])
    assert again == config
    assert [(one.name, one.weight) for one in again.model.rewards] == [("brevity", -0.5)]


def test_it_is_taken_once(tmp_path: Path) -> None:
    config = ppo(tmp_path)
    open_run(config, config.run, resume=False)
    with pytest.raises(ConfigError, match=r"run\.name: .*a-run exists"):
        check_run(config, config.run, resume=False, may_change=PPO_MAY_CHANGE)
    with JsonlLog(tmp_path / "a-run" / "metrics.jsonl") as log:
        log.write({"train/global_step": 1, "attempt": 1})
    assert open_run(config, config.run, resume=True) == (tmp_path / "a-run", 2)


def test_how_long_and_where_it_runs_may_change(tmp_path: Path) -> None:
    config = ppo(tmp_path)
    open_run(config, config.run, resume=False)
    resources = {"actors": 3, "cpus_per_actor": 1.0, "threads": 2}
    changed = ppo(
        tmp_path,
        run={"cpus": 2},
        ppo={"steps": 99},
        rollout=resources | {"kv_cache_gb": 4},
        reward=resources,
        learner={"ranks": 1, "checkpoint_every": 3, "keep_checkpoints": 5, "max_failures": 0},
        evaluation={"every": 5},
        tracking={"wandb": "disabled"},
    )
    assert check_run(changed, changed.run, resume=True, may_change=PPO_MAY_CHANGE) == tmp_path / "a-run"


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"run": {"seed": 3}}, "run.seed"),
        ({"data": {"source": "other.jsonl"}}, "data.source"),
        ({"learner": {"dtype": "bfloat16"}}, "learner.dtype"),
        ({"optimizer": {"policy_lr": 1e-5}}, "optimizer.policy_lr"),
    ],
)
def test_what_it_computes_may_not(tmp_path: Path, sections: dict, field: str) -> None:
    config, changed = ppo(tmp_path), ppo(tmp_path, **sections)
    open_run(config, config.run, resume=False)
    sentence = f"^{field}: the run in .* was started with .* cannot go on with .*, take another run.name, or remove"
    with pytest.raises(ConfigError, match=sentence):
        check_run(changed, changed.run, resume=True, may_change=PPO_MAY_CHANGE)


def stage(folder: str | Path, base: str | Path, source: str = "org/rows", name: str = "sft") -> SFTConfig:
    return SFTConfig(run={"name": name, "folder": folder}, model={"base": str(base)}, data={"source": source})


def check_stage(config: SFTConfig) -> Path:
    return check_run(config, config.run, resume=True, may_change=STAGE_MAY_CHANGE, may_move=STAGE_MAY_MOVE)


def test_a_path_may_be_written_otherwise_or_move_with_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = stage("runs", "runs/world/base", "data/rows.jsonl")
    folder, _ = open_run(first, first.run, resume=False)
    written = stage(tmp_path / "runs", tmp_path / "runs/world/base", str(tmp_path / "data/rows.jsonl"))
    assert check_stage(written) == folder
    assert check_stage(stage("runs", "other/../runs/world/base", "./data/rows.jsonl")) == folder

    copied = tmp_path / "elsewhere/runs"
    shutil.copytree(folder, copied / "again")
    all_of_it = stage(copied, copied / "world/base", str(tmp_path / "elsewhere/data/rows.jsonl"), name="again")
    assert check_stage(all_of_it) == copied / "again"
    runs_alone = stage(copied, copied / "world/base", "data/rows.jsonl", name="again")
    assert check_stage(runs_alone) == copied / "again"


@pytest.mark.parametrize(
    ("base", "source", "field"),
    [
        ("runs/world-2/base", "org/rows", "model.base"),
        ("world/base", "org/rows", "model.base"),
        ("runs/world/base", "org/other-rows", "data.source"),
    ],
)
def test_another_model_or_dataset_is_no_moved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, source: str, field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    first = stage("runs", "runs/world/base")
    open_run(first, first.run, resume=False)
    with pytest.raises(ConfigError, match=f"^{field}: "):
        check_stage(stage("runs", base, source))


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "notes.txt").touch()
    config = ppo(tmp_path)
    with pytest.raises(ConfigError, match=r"a-run/config\.toml: no such file"):
        check_run(config, config.run, resume=True, may_change=PPO_MAY_CHANGE)


def test_a_run_that_only_waited_for_nodes_has_not_begun(tmp_path: Path) -> None:
    config = ppo(tmp_path)
    with hold(tmp_path / "a-run", new_lease()):
        for resume in (False, True):
            check_run(config, config.run, resume=resume, may_change=PPO_MAY_CHANGE)


def test_without_a_list_anything_may_change(tmp_path: Path) -> None:
    sections = {"model": {"base": "b"}, "data": {"source": "s.jsonl"}}
    first = SFTConfig(run={"name": "a", "folder": tmp_path}, **sections)
    open_run(first, first.run, resume=False)
    changed = SFTConfig(run={"name": "a", "folder": tmp_path}, sft={"learning_rate": 1.0}, **sections)
    assert open_run(changed, changed.run, resume=True)[0] == tmp_path / "a"


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        (PPOConfig, PPO_MAY_CHANGE),
        (SFTConfig, STAGE_MAY_CHANGE | STAGE_MAY_MOVE),
        (RewardConfig, STAGE_MAY_CHANGE | STAGE_MAY_MOVE),
    ],
)
def test_the_allowed_fields_exist(schema: type[Command], names: frozenset[str]) -> None:
    for name in names:
        section, _, field = name.partition(".")
        annotation = schema.model_fields[section].annotation
        assert not field or field in annotation.model_fields
