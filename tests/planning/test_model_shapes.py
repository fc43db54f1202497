"""Sizes of models from their configurations, and what a block keeps."""

from pathlib import Path

import pytest
import torch
from made.model_configs import write_config

from r3hf_ray.errors import ModelError
from r3hf_ray.planning.model_shapes import ModelShape


@pytest.mark.parametrize(
    ("name", "parameters", "cached"),
    [
        ("Qwen2.5-0.5B", 494_032_768, 2 * 24 * 2 * 64),
        ("Qwen2.5-1.5B", 1_543_714_304, 2 * 28 * 2 * 128),
        ("Llama-3-8B", 8_030_261_248, 2 * 32 * 8 * 128),
        ("Llama-3-70B", 70_553_706_496, 2 * 80 * 8 * 128),
    ],
)
def test_parameters_are_those_of_the_published_models(name: str, parameters: int, cached: int, tmp_path: Path) -> None:
    shape = ModelShape(str(write_config(tmp_path, name)), "policy")
    assert (shape.parameters, shape.cached_per_token) == (parameters, cached)
    assert shape.tied == name.startswith("Qwen")
    assert shape.trunk_parameters == shape.root_parameters + shape.layers * shape.block_parameters


def test_a_reward_model_has_a_head_of_one_number(tmp_path: Path) -> None:
    shape = ModelShape(str(write_config(tmp_path, "Qwen2.5-0.5B", scores=True)), "reward model", scores=True)
    assert shape.parameters == 494_032_768 + 896
    assert shape.head_parameters == 0


def test_activations_are_those_of_the_tensors_that_a_block_saves(tmp_path: Path) -> None:
    shape = ModelShape(str(write_config(tmp_path, "tiny")), "policy")
    rows, length, hidden, between = 4, 128, 512, 1024
    seen = shape.activations(rows, length, torch.float32)
    tokens = rows * length
    assert seen.entry == 4 * tokens * hidden
    # Queries, keys, values, attention, both norms' inputs, and three of the wide layer: no fewer, no twice as many.
    least = 4 * tokens * (6 * hidden + 3 * between)
    assert least < seen.kept < 2 * least
    twice = shape.activations(2 * rows, length, torch.float32)
    assert twice.kept == pytest.approx(2 * seen.kept, rel=0.02)
    assert shape.activations(rows, length, torch.bfloat16).kept < 0.8 * seen.kept
    assert seen.forward < seen.backward


def test_what_cannot_be_built_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 7, "num_attention_heads": 2}')
    with pytest.raises(ModelError, match="cannot be built as policy") as error:
        ModelShape(str(tmp_path), "policy")
    assert "\n" not in str(error.value)
