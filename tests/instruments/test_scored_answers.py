"""The control that knows nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from r3hf_ray.instruments.scored_answers import (
    Answer,
    Judge,
    Scored,
    ScoreUnit,
    load_judge,
    score_answers,
    scored_text,
    untrained,
)
from r3hf_ray.models.load import untrained_reward_model

ANSWERS = [Answer([5, 9, 12], [20, 30, 40, 2]), Answer([5, 9], [50, 21, 22, 23, 24])]


def test_an_untrained_model_keeps_no_trained_weight(byte_judge: Judge) -> None:
    before = {name: weight.clone() for name, weight in byte_judge.reader.model.state_dict().items()}
    state = torch.random.get_rng_state()
    fresh = untrained(byte_judge, seed=1)  # seed 0 drew the judge itself
    weights = dict(fresh.reader.model.named_parameters())
    assert weights.keys() == dict(byte_judge.reader.model.named_parameters()).keys()
    matrices = [name for name, weight in weights.items() if weight.ndim > 1]
    assert "score.weight" in matrices and len(matrices) > 10
    assert not [name for name in matrices if torch.equal(weights[name], before[name])]
    assert all(weight.std() > 0.0 for name, weight in weights.items() if name in matrices)
    assert not fresh.reader.model.training and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in byte_judge.reader.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_untrained_model_is_its_seed_and_its_shape(byte_judge: Judge) -> None:
    def scores(seed: int) -> list[float]:
        return [scored.score for scored in score_answers(untrained(byte_judge, seed=seed), ANSWERS)]

    assert scores(0) == scores(0) != scores(1)


def test_the_judge_keeps_its_attention_maps(byte_model: Path) -> None:
    """Models share a configuration object if one lets them, and attention is chosen there."""
    judge = load_judge(str(byte_model), attention=True)
    (one,) = score_answers(untrained(judge, seed=0), ANSWERS[:1])
    assert one.attention is None
    (one,) = score_answers(judge, ANSWERS[:1])
    assert one.attention is not None and one.attention.sum() > 0.0


@pytest.mark.parametrize("head", ["last_token", "running_sum"])
def test_an_untrained_model_of_either_head_tells_answers_apart(byte_model: Path, tmp_path: Path, head: str) -> None:
    """A fresh running-sum head is 0 for training's sake; as a control it must say something."""
    untrained_reward_model(byte_model, head=head).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path)
    first, second = score_answers(untrained(load_judge(str(tmp_path)), seed=0), ANSWERS)
    assert first.score != second.score


def test_a_scored_text_ends_at_the_score_of_the_whole_answer(byte_judge: Judge, scored: Callable[..., Scored]) -> None:
    """What template text behind the end token adds is part of the last token's step."""
    unit = ScoreUnit(mean=1.0, std=2.0)
    text = scored_text(
        scored([1.0, 3.0, 4.0], score=7.0, prompt_score=-1.0), byte_judge.tokenizer, unit, title="chosen"
    )
    assert (text.start, text.curve, text.title) == (-1.0, [0.0, 1.0, 3.0], "chosen") and len(text.text) == 3
