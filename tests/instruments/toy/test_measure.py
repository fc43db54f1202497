import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import gold_credit, make_request
from r3hf_ray.instruments.toy.measure import credit_quality, reward_model_credit, token_rewards
from r3hf_ray.instruments.toy.sampling import ToySample, render_prompt


@pytest.fixture(scope="module")
def samples(toy_world: Path) -> list[ToySample]:
    """Responses by the noisy author: both kinds of credit, finished and cut."""
    rng, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(toy_world / "base")
    requests = [make_request(rng) for _ in range(60)]
    return [
        ToySample(
            request=request,
            prompt_ids=render_prompt(tokenizer, request),
            response_ids=tokenizer.encode(noisy_response(request, 48, rng)),
        )
        for request in requests
    ]


def test_known_credit_is_perfect_and_reversed_credit_the_opposite(toy_world: Path, samples: list[ToySample]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_world / "base")
    golds = [np.array(gold_credit(s.request.text, tokenizer.decode(s.response_ids))) for s in samples]
    perfect = credit_quality(golds, samples, tokenizer)
    assert (perfect.token_auc, perfect.phrase_auc) == (1.0, 1.0)
    assert perfect.token_pearson == pytest.approx(1.0)
    assert perfect.phrase_pearson == pytest.approx(1.0)
    reverse = credit_quality([-gold for gold in golds], samples, tokenizer)
    assert (reverse.token_auc, reverse.phrase_auc) == (0.0, 0.0)
    assert reverse.token_pearson == pytest.approx(-1.0)


def test_credit_one_token_late_is_right_by_phrase(toy_world: Path) -> None:
    """Facts and fillers whose credit lands on the stop behind them: chance by token, perfect by phrase."""
    tokenizer = AutoTokenizer.from_pretrained(toy_world / "base")
    rng = random.Random(0)
    text = "gardens grow . um . gardens age . well . <eos>"
    request = next(r for r in iter(lambda: make_request(rng), None) if r.text == "gardening no-slang casually")
    sample = ToySample(request=request, prompt_ids=[1], response_ids=tokenizer.encode(text))
    late = np.array([0, 0, 1, 0, -0.1, 0, 0, 1, 0, -0.1, 0.0])
    quality = credit_quality([late], [sample], tokenizer)
    assert (quality.token_auc, quality.phrase_auc) == (0.5, 1.0)
    assert quality.phrase_pearson == pytest.approx(1.0)


def test_token_rewards_are_differences_of_prefix_scores(toy_world: Path, samples: list[ToySample]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy_world / "base")
    model = LlamaForSequenceClassification.from_pretrained(toy_world / "reward").eval()
    rewards = token_rewards(model, tokenizer, samples[:7], batch_size=3)
    for sample, reward in zip(samples[:7], rewards, strict=True):
        ids = sample.prompt_ids + sample.response_ids
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            prefixes = model.score(states)[0, :, 0].double().numpy()
        first = len(sample.prompt_ids) - 1
        assert reward == pytest.approx(np.diff(prefixes[first:]), abs=1e-5)
        assert reward.sum() == pytest.approx(prefixes[-1] - prefixes[first], abs=1e-5)


def test_reward_model_credit_reads_folders(toy_world: Path) -> None:
    rng = random.Random(1)
    quality = reward_model_credit(toy_world / "reward", toy_world / "base", [make_request(rng) for _ in range(30)])
    assert quality.responses == 30
    assert 0.0 < quality.token_auc < 1.0
    assert abs(quality.phrase_pearson) < 0.7, "an untrained reward model knows nothing"
