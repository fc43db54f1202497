"""A reward model learns preferences, and scores in plain transformers what it scored in training."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from r3hf_ray.config import RewardConfig
from r3hf_ray.models.load import load_reward_model
from r3hf_ray.training.ranking import RankedGroup, last_token_scores, pair_accuracy
from r3hf_ray.training.reward_model import Pair, binomial_interval, train_on_groups, train_on_pairs

PAIRS = [Pair(prompt_ids=[1, 5 + i, 20], chosen_ids=[30, 33 + i % 4, 2], rejected_ids=[31, 2]) for i in range(12)]
GROUPS = [
    RankedGroup(sequences=[[1, 5 + i, 20, 30 + j, 2] for j in range(3)], pairs=[(0, 1), (0, 2), (1, 2)])
    for i in range(8)
]
Rows = list[tuple[int, dict[str, float]]]


def config(base: Path, **training: object) -> RewardConfig:
    section = {"batch_size": 4, "microbatch_size": 2, "learning_rate": 5e-3, "epochs": 8, **training}
    return RewardConfig(run={"name": "x"}, model={"base": str(base)}, data={"source": "x"}, reward_training=section)


def plain_scores(folder: Path, sequences: list[list[int]]) -> torch.Tensor:
    """As a stranger would score: the saved tokenizer pads, the saved config pools."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def check_folder(folder: Path, groups: list[RankedGroup]) -> None:
    sequences = [list(ids) for group in groups for ids in group.sequences]
    model = load_reward_model(folder, torch.float32)
    with torch.no_grad():
        ours = last_token_scores(model, sequences, pad_id=model.config.pad_token_id)
    torch.testing.assert_close(plain_scores(folder, sequences), ours, rtol=1e-5, atol=1e-6)
    assert model.config.pad_token_id != model.config.eos_token_id
    assert pair_accuracy(model, groups, pad_id=model.config.pad_token_id) > 0.95


def test_pairs_are_learnt_and_scored_the_same_in_plain_transformers(base_model: Path, tmp_path: Path) -> None:
    rows: Rows = []
    train_on_pairs(
        config(base_model),
        PAIRS[:10],
        PAIRS[10:],
        folder=tmp_path / "model",
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
    )
    steps = [(step, metrics) for step, metrics in rows if "reward_model/loss" in metrics]
    assert [step for step, _ in steps] == list(range(1, 25))
    assert steps[0][1]["reward_model/loss"] == pytest.approx(math.log(2), abs=0.2)
    assert steps[-1][1]["reward_model/tokens"] == 8 * 10 * (6 + 5)
    last = rows[-1][1]
    assert (last["eval/heldout/pair_accuracy"], last["eval/heldout/pair_pairs"]) == (1.0, 2.0)
    assert last["eval/heldout/pair_accuracy_low"] == pytest.approx(0.342, abs=1e-3)
    check_folder(tmp_path / "model", [p.as_group() for p in PAIRS])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ranked_groups_end_in_the_same_kind_of_folder(base_model: Path, tmp_path: Path) -> None:
    rows: Rows = []
    train_on_groups(
        config(base_model, groups_per_step=4, epochs=10),
        GROUPS[:6],
        GROUPS[6:],
        folder=tmp_path / "model",
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
    )
    assert [step for step, _ in rows] == [*range(1, 16), 15]
    assert set(rows[0][1]) == {"reward_model/loss", "reward_model/accuracy", "reward_model/grad_norm"}
    assert rows[-1][1]["eval/heldout/pair_pairs"] == 6.0
    check_folder(tmp_path / "model", GROUPS)


def test_wilson_interval() -> None:
    low, high = binomial_interval(60.0, 100)
    assert (low, high) == (pytest.approx(0.5020, abs=1e-4), pytest.approx(0.6906, abs=1e-4))
    assert binomial_interval(10.0, 10)[1] == pytest.approx(1.0, abs=1e-12)
    assert binomial_interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-12)
