"""What a run says before it starts: its counts, and every setting it caps or does not read."""

from pathlib import Path
from typing import Any

import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.counts_and_warnings import arithmetic, not_as_asked, risks
from r3hf_ray.settings import load

JOBS = [path for path in sorted((Path(__file__).parents[1] / "jobs").glob("*.toml")) if "[ppo]" in path.read_text()]


def configure(**sections: dict[str, Any]) -> PPOConfig:
    fixed = {"run": {"name": "x"}, "model": {"policy": "p", "reward_model": "r"}, "data": {"source": "d"}}
    return PPOConfig(**(fixed | sections))


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_the_counts_of_a_run_in_words() -> None:
    config = PPOConfig(
        run={"name": "x"},
        model={"policy": "p", "reward_model": "r"},
        data={"source": "d"},
        rollout={"prompts_per_step": 8, "samples_per_prompt": 2, "group_size": 5, "max_lag": 1},
        ppo={"steps": 5, "epochs": 3, "minibatches": 4},
        learner={"ranks": 2},
    )
    words = dict(arithmetic(config, 20))
    assert words["prompts"] == "20 to train on, 8 a step: 2.00 passes in 5 steps"
    assert words["responses"] == "8 prompts x 2 = 16 a step, 80 in all"
    assert "4 groups of at most 5 responses, at most 1 version(s) behind" in words["generation"]
    assert words["learning"] == "2 rank(s) x 8 responses, 4 minibatches of 4"
    assert words["optimizer"] == "3 epochs x 4 minibatches = 12 optimizer steps a PPO step, 60 in all"


def test_samplers_that_idle_are_named() -> None:
    (sentence,) = not_as_asked(configure(rollout={"actors": 8, "prompts_per_step": 32}), heldout=300, window=512)
    assert "rollout.actors = 8: 6 of them idle" in sentence and "rollout.group_size, here 16" in sentence
    for enough in ({"group_size": 4}, {"group_size": 8, "max_lag": 1}, {"prompts_per_step": 128}):
        assert (
            not_as_asked(configure(rollout={"actors": 8, "prompts_per_step": 32, **enough}), heldout=300, window=512)
            == []
        )


@pytest.mark.parametrize(
    ("sections", "heldout", "words"),
    [
        ({"evaluation": {"prompts": 100}}, 16, ["evaluation.prompts = 100", "holds out 16"]),
        ({"evaluation": {"every": 5}}, 0, ["evaluation.every is not read", "no held-out prompts"]),
        ({"evaluation": {"every": 5, "prompts": 0}}, 16, ["evaluation.every is not read"]),
        ({"tracking": {"samples_per_dump": 40}}, 300, ["tracking.samples_per_dump = 40", "at most 16"]),
        ({"tracking": {"samples_every": 5, "samples_per_dump": 0}}, 300, ["tracking.samples_every is not read"]),
        ({"tracking": {"wandb": "disabled", "entity": "me"}}, 300, ["tracking.entity is not read"]),
        ({"rollout": {"gpu_memory_utilization": 0.5}}, 300, ["rollout.gpu_memory_utilization is not read", "CPU"]),
        (
            {"rollout": {"gpus_per_actor": 1.0, "kv_cache_gb": 8}},
            300,
            ["rollout.kv_cache_gb is not read", "GPU"],
        ),
        ({"reward": {"mode": "terminal", "beta_c": 0.5}}, 300, ["reward.beta_c is not read", "terminal"]),
        ({"reward": {"abc_beta": 0.5}}, 300, ["reward.abc_beta is not read", "reward.mode = r3hf"]),
        ({"reward": {"segment_ngram": 9}}, 300, ["reward.segment_ngram is not read", "reward.mode = r3hf"]),
        ({"reward": {"mode": "segment", "segment_ngram": 9}}, 300, ["reward.segment_by = sentence"]),
        (
            {"reward": {"mode": "uniform", "subtract_prompt_score": False}},
            300,
            ["reward.subtract_prompt_score is not read"],
        ),
        ({"reward": {"missing_eos_penalty": 2.0}}, 300, ["reward.missing_eos = keep"]),
        (
            {"ppo": {"advantage": "grpo", "gae_lambda": 1.0}, "rollout": {"samples_per_prompt": 2}},
            300,
            ["ppo.gae_lambda is not read", "ppo.advantage = grpo"],
        ),
        ({"weights": {"probe_tokens": 600}}, 300, ["weights.probe_tokens = 600: the models read 512", "511 are used"]),
        ({"ppo": {"kl_horizon": 5.0}}, 300, ["ppo.kl_horizon is not read"]),
        ({"weights": {"probe_tokens": 0, "max_logprob_gap": 0.1}}, 300, ["weights.max_logprob_gap is not read"]),
    ],
    ids=str,
)
def test_what_is_capped_or_not_read_is_said_once(
    sections: dict[str, dict[str, Any]], heldout: int, words: list[str]
) -> None:
    (sentence,) = not_as_asked(configure(**sections), heldout=heldout, window=512)
    assert all(word in sentence for word in words)


def test_cpus_are_not_read_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(run={"name": "x", "cpus": 2.0})
    assert not_as_asked(config, heldout=300, window=512) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (sentence,) = not_as_asked(config, heldout=300, window=512)
    assert sentence.startswith("run.cpus is not read: RAY_ADDRESS")


def test_what_was_not_asked_for_is_no_news() -> None:
    given = configure(rollout={"gpu_memory_utilization": 0.85}, evaluation={"every": 0})
    assert not_as_asked(configure(), heldout=16, window=512) == not_as_asked(given, heldout=16, window=512) == []


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_our_own_jobs_ask_for_nothing_that_is_not_done(job: Path) -> None:
    assert not_as_asked(load(PPOConfig, job, []), heldout=10_000, window=512) == []


def test_float32_on_a_gpu_is_a_warning() -> None:
    gpus = {"rollout": {"gpus_per_actor": 1.0}, "learner": {"gpus_per_rank": 1.0, "dtype": "bfloat16"}}
    (sentence,) = [text for text in risks(configure(**gpus)) if "on a GPU" in text]
    assert sentence.startswith("rollout.dtype = float32 on a GPU")
    assert not [text for text in risks(configure()) if "on a GPU" in text]
