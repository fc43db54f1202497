"""What the checks before a PPO run find out, warn of, and hand to the actors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3hf_ray.config import ConfigError, PPOConfig
from r3hf_ray.data.chat import FORMAT_FILE
from r3hf_ray.preflight import check, check_resources, probe_sequence

EOS = 2


@pytest.fixture
def configure(tmp_path: Path, tiny_models: Any) -> Callable[..., PPOConfig]:
    """`configure(rollout={...})`: a PPO configuration on twenty prompts, the last four held out."""
    rows = ({"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(20))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "folder": tmp_path / "runs"},
        "model": {"policy": str(tiny_models.policy), "reward_model": str(tiny_models.reward)},
        "data": {"source": str(tmp_path / "prompts.jsonl"), "heldout": 4},
        "rollout": {"max_response_tokens": 12},
    }

    def make(**sections: dict[str, Any]) -> PPOConfig:
        return PPOConfig(**{name: given.get(name, {}) | sections.get(name, {}) for name in {*given, *sections}})

    return make


def test_the_plan_of_a_run(configure: Callable[..., PPOConfig]) -> None:
    plan = check(configure())
    assert (len(plan.prompts), len(plan.heldout)) == (16, 4)
    assert plan.report.used == 20
    assert (plan.eos_ids, plan.suffix_ids) == ((EOS,), ())
    assert plan.warnings == []
    assert plan.max_model_len == 64, "the window bounds the probe"
    assert len(plan.probe_ids) == 63
    longest = max(len(prompt) for prompt in [*plan.prompts, *plan.heldout])
    assert check(configure(weights={"probe_tokens": 0})).max_model_len == longest + 12


def test_a_reward_models_own_suffix_is_read(configure: Callable[..., PPOConfig]) -> None:
    assert check(configure(reward={"pooling_suffix": "w5"})).suffix_ids == (9,)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"critic": {"init": "reward_model"}}, "counts the prefix score twice"),
        ({"ppo": {"gamma": 0.9}}, "ppo.gamma < 1"),
        ({"rollout": {"max_lag": 1}}, "without ppo.importance_cap"),
    ],
    ids=["double count", "gamma", "off-policy"],
)
def test_what_is_allowed_but_doubtful_is_a_warning(
    configure: Callable[..., PPOConfig], sections: dict[str, dict[str, Any]], words: str
) -> None:
    (warning,) = check(configure(**sections)).warnings
    assert words in warning


def test_what_is_right_in_terminal_mode_is_no_warning(configure: Callable[..., PPOConfig]) -> None:
    assert check(configure(reward={"mode": "terminal"}, critic={"init": "reward_model"})).warnings == []


def test_a_reward_model_of_another_prompt_format_is_refused(
    configure: Callable[..., PPOConfig], tiny_models: Any, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "reward"
    shutil.copytree(tiny_models.reward, folder)
    form = {"version": 1, "chat_template": "{{ messages }}", "before": " ", "end": "<eos>", "suffix": ""}
    (folder / FORMAT_FILE).write_text(json.dumps(form))
    with pytest.raises(ConfigError, match=r"model\.reward_model: .* another prompt format .*chat_template differs"):
        check(configure(model={"policy": str(tiny_models.policy), "reward_model": str(folder)}))


@pytest.mark.parametrize(("cpus", "fits"), [(1.5, True), (1.49, False)])
def test_resources_are_summed(configure: Callable[..., PPOConfig], cpus: float, fits: bool) -> None:
    config = configure()  # 1 x 0.3 + 2 x 0.2 + 2 x 0.4
    if fits:
        check_resources(config, {"CPU": cpus})
    else:
        with pytest.raises(ConfigError, match=r"1\.5 CPUs .* the cluster has 1\.49"):
            check_resources(config, {"CPU": cpus})


def test_gpus_are_resources_too(configure: Callable[..., PPOConfig]) -> None:
    config = configure(rollout={"gpus_per_actor": 1.0, "actors": 2}, reward={"gpus_per_actor": 0.5})
    check_resources(config, {"CPU": 8.0, "GPU": 3.0})
    with pytest.raises(ConfigError, match=r"3 GPUs .* has 2"):
        check_resources(config, {"CPU": 8.0, "GPU": 2.0})


def test_the_probe_repeats_the_prompts() -> None:
    prompts = [np.array([1, 5], np.int32), np.array([1, 6, 7], np.int32)]
    assert probe_sequence(prompts, 8) == [1, 5, 1, 6, 7, 1, 5, 1]
    assert probe_sequence(prompts, 0) == []
