"""Jobs of the benchmark: what variants share, and that the tiny inputs are of the promised size."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bench.shapes import LAG_0, LAG_1, PROMPT_TOKENS, SHAPES, TERMINAL, TINY, TWO_RANKS, Shape, make_inputs
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.preflight import check
from r3hf_ray.types import MAIN


def config(shape: Shape, variant: Any, inputs: Path = Path("inputs")) -> PPOConfig:
    return shape.config(variant, inputs=inputs, folder=Path("runs"), name="x", steps=8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_variants_differ_only_in_what_they_are_about(shape: Shape) -> None:
    plain, lag, sparse = (config(shape, variant).model_dump() for variant in (LAG_0, LAG_1, TERMINAL))
    assert (lag["rollout"].pop("max_lag"), plain["rollout"].pop("max_lag")) == (1, 0)
    assert (lag["ppo"].pop("importance_cap"), plain["ppo"].pop("importance_cap")) == (2.0, None)
    assert lag == plain
    assert (sparse["reward"].pop("mode"), plain["reward"].pop("mode")) == ("terminal", "r3hf")
    assert sparse["reward"] == plain["reward"]
    assert sparse["critic"] == plain["critic"]


def test_sizes_and_ranks() -> None:
    tiny, real = (config(SHAPES[name], LAG_0) for name in ("tiny", "smollm2"))
    assert (tiny.responses_per_step, tiny.rollout.max_response_tokens, tiny.learner.ranks) == (64, 64, 2)
    assert (real.responses_per_step, real.rollout.max_response_tokens, real.learner.ranks) == (8, 32, 1)
    assert {(c.ppo.epochs, c.ppo.minibatches) for c in (tiny, real)} == {(1, 2)}
    slow = config(SHAPES["smollm2"], TWO_RANKS)
    assert (slow.learner.ranks, slow.learner.threads, slow.ppo.steps) == (2, 1, 4)


def test_tiny_inputs_pass_the_checks_of_a_run(tmp_path: Path) -> None:
    make_inputs(TINY, tmp_path, model=tmp_path / "absent")
    plan = check(config(TINY, LAG_0, tmp_path))
    assert {len(prompt) for prompt in plan.prompts} == {PROMPT_TOKENS}
    assert len(plan.prompts) >= TINY.responses
    assert plan.scoring.reads[MAIN].suffix_ids == ()
    assert not plan.warnings
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert 0.85e6 < policy.num_parameters() < 0.95e6


def test_smollm2_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="r3hf fetch-smollm2"):
        make_inputs(SHAPES["smollm2"], tmp_path, model=tmp_path / "absent")
