"""Settings that move over a run, and the rewards that follow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.compare.schedules import Schedule, at_step, check_schedules, parse_schedule, remixed
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.settings import load
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

MakeJob = Callable[..., PPOConfig]


def test_a_field_moves_evenly_from_first_to_last(small_job: MakeJob) -> None:
    config = small_job("--ppo.steps", "5")
    schedules = (parse_schedule("reward.beta_c=1:0"), parse_schedule("ppo.gae_lambda=0.9:1"))
    seen = [at_step(config, schedules, step) for step in range(5)]
    assert [c.reward.beta_c for c in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert [c.ppo.gae_lambda for c in seen] == pytest.approx([0.9, 0.925, 0.95, 0.975, 1.0])
    assert config.reward.beta_c == 1.0
    assert at_step(config, (), 3) is config


def test_one_step_has_the_first_value() -> None:
    assert Schedule(field="ppo.kl_coef", first=0.2, last=0.0).value(0, 1) == 0.2


@pytest.mark.parametrize("text", ["reward.mode=1:0", "reward.beta_c=1", "reward.beta_c=a:b", "beta"])
def test_what_cannot_move_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="schedules"):
        parse_schedule(text)


def test_the_system_takes_no_schedule(tmp_path: Path) -> None:
    text = """
[run]
name = "c"
[compare]
job = "job.toml"
seeds = [0]
baseline = "a"
threshold = 1.0
[[arms]]
name = "a"
schedules = ["reward.beta_c=1:0"]
"""
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match="arm a: schedules need"):
        load(CompareConfig, tmp_path / "c.toml", [])
    (tmp_path / "c.toml").write_text(text.replace("[[arms]]", "in_process = 2\n[[arms]]"))
    assert load(CompareConfig, tmp_path / "c.toml", []).compare.in_process == 2


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        (["--reward.mode", "abc"], "reward.beta_c=1:0"),
        (["--reward.beta_c", "0.5"], "reward.beta_c=1:0"),
        (["--reward.eos_jump", "drop"], "reward.beta_c=1:0"),
        (["--model.rewards", '[{"name": "brevity", "source": "b"}]'], "reward.beta_c=1:0"),
        (["--model.cost", "c", "--cost.limit", "0"], "reward.beta_c=1:0"),
        (["--ppo.kl_target", "6"], "ppo.kl_coef=0.1:0"),
    ],
)
def test_a_schedule_that_would_make_another_method_is_refused(
    small_job: MakeJob, overrides: list[str], schedule: str
) -> None:
    check_schedules(small_job(), (parse_schedule(schedule),))
    with pytest.raises(ConfigError, match=schedule.partition("=")[0]):
        check_schedules(small_job(*overrides), (parse_schedule(schedule),))


def test_rewards_mix_with_the_terminal_one() -> None:
    zeros = np.zeros(4, np.float32)
    trajectory = Trajectory(
        prompt_id=0,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=2,
        finish=Finish.EOS,
        token_ids=np.array([5, 6, 7, 2], np.int32),
        behavior_logprobs=zeros,
    )
    main = ModelScores(
        token_rewards=np.array([0, 0, 0.4, 1.1], np.float32),
        prefix_scores=np.array([0, 0, 0.9, 2.0], np.float32),
        score=2.0,
        prompt_score=0.5,
    )
    scored = ScoredTrajectory(trajectory=trajectory, ref_logprobs=zeros, by_model={MAIN: main})
    assert remixed(scored, 0.5).main.token_rewards == pytest.approx([0, 0, 0.2, 0.55 + 1.0])
    assert remixed(scored, 0.0).main.token_rewards == pytest.approx([0, 0, 0, 2.0])
    assert scored.main.token_rewards == pytest.approx([0, 0, 0.4, 1.1]), "the trajectory itself is left alone"
