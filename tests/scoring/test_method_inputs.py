"""Every method through a real scorer: what it reads is measured, and what it pays adds up."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from r3hf_ray.errors import ConfigError, ModelError
from r3hf_ray.scoring.method_inputs import bind_method, sentence_end_ids
from r3hf_ray.scoring.scorer import RewardModel, Scorer, ScoringSettings
from r3hf_ray.sections.models import ModelSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.types import MAIN, Failure, Finish, Trajectory

EOS = 2


def trajectory(prompt_id, prompt_len, response, finish=Finish.EOS):
    ids = np.random.default_rng(prompt_id).integers(3, 39, prompt_len).tolist() + response
    behavior = np.zeros(len(ids), np.float32)
    behavior[prompt_len:] = -1.0 - prompt_id
    return Trajectory(
        prompt_id=prompt_id,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=prompt_len,
        finish=finish,
        token_ids=np.asarray(ids, np.int32),
        behavior_logprobs=behavior,
    )


ALL = [
    trajectory(0, 4, [10, 11, 12, 13, 14, 15, EOS]),
    trajectory(1, 6, [13, 14, 15, 16, 17], Finish.LENGTH),
    trajectory(2, 2, [EOS]),
]


@pytest.fixture(scope="module")
def settings(tiny_models):
    return ScoringSettings(
        reward=RewardSection(),
        model=ModelSection(policy=str(tiny_models.policy), reward_model=str(tiny_models.reward)),
        temperature=1.0,
        reads={MAIN: RewardModel(suffix_ids=(7,))},
    )


def changed(settings, **reward):
    return replace(settings, reward=settings.reward.model_copy(update=reward))


def rewards_of(settings, **change):
    results = Scorer(changed(settings, **change)).score(ALL)
    return [(item, item.main.token_rewards[item.trajectory.prompt_len :]) for item in results]


@pytest.mark.parametrize(
    ("change", "of_prompt"),
    [
        ({"mode": "uniform"}, 0.0),
        ({"mode": "uniform", "beta_c": 0.5}, 0.0),
        ({"mode": "abc", "abc_beta": 0.8}, 0.0),
        ({"mode": "segment", "segment_by": "ngram", "segment_ngram": 3}, 1.0),
        ({"mode": "segment", "segment_by": "entropy", "segment_entropy": 3.0}, 1.0),
        ({"mode": "r3hf", "eos_jump": "spread"}, 1.0),
    ],
)
def test_rewards_add_up(settings, change, of_prompt):
    for item, rewards in rewards_of(settings, **change):
        expected = item.main.score - of_prompt * item.main.prompt_score
        assert rewards.astype(np.float64).sum() == pytest.approx(expected, abs=3e-6)
        assert not item.main.token_rewards[: item.trajectory.prompt_len].any()


def test_abc_shares_the_score_and_leaves_the_rest_at_the_end(settings):
    for item, rewards in rewards_of(settings, mode="abc", abc_beta=0.8):
        shares = rewards / np.float32(item.main.score)
        assert (shares >= 0).all() and shares[-1] >= 0.2 - 1e-6
        assert len(shares) == 1 or (shares[:-1] > 0).all()


def test_ngrams_are_paid_at_every_third_token(settings):
    plain = [rewards for _, rewards in rewards_of(settings)]
    spans = [rewards for _, rewards in rewards_of(settings, mode="segment", segment_by="ngram", segment_ngram=3)]
    np.testing.assert_allclose(
        spans[0], [0, 0, plain[0][:3].sum(), 0, 0, plain[0][3:6].sum(), plain[0][6]], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(spans[1], [0, 0, plain[1][:3].sum(), 0, plain[1][3:].sum()], rtol=0, atol=1e-6)


@torch.no_grad()
def test_entropy_of_the_reference_ends_spans(settings, tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy).eval()
    item = ALL[0]
    logits = model(torch.tensor([item.token_ids.tolist()])).logits[0]
    after = torch.distributions.Categorical(logits=logits).entropy()[item.prompt_len : -1]  # not of the last token
    threshold = float(after.median())
    (_, paid), *_ = rewards_of(settings, mode="segment", segment_by="entropy", segment_entropy=threshold)
    assert (paid[:-1] != 0).tolist() == (after > threshold).tolist()


def test_the_jump_is_dropped_where_there_is_an_eos(settings):
    kept, dropped = rewards_of(settings), rewards_of(settings, eos_jump="drop")
    for (item, before), (_, after) in zip(kept, dropped, strict=True):
        if item.trajectory.finish is Finish.EOS:
            assert after[-1] == pytest.approx(0.0, abs=1e-6)
            np.testing.assert_allclose(after[:-1], before[:-1], rtol=0, atol=1e-6)
        else:
            assert (after == before).all()


OWN = """
import torch

seen = []

def by_surprise(inputs):
    seen.append(inputs)
    return inputs.behavior_logprobs - inputs.ref_logprobs

def broken(inputs):
    return inputs.ref_logprobs / 0.0
"""


def test_a_users_own_function_gets_everything_and_pays_what_it_says(settings, tmp_path, monkeypatch):
    (tmp_path / "my_credit.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for item, rewards in rewards_of(settings, mode="my_credit:by_surprise"):
        start = item.trajectory.prompt_len
        expected = item.trajectory.behavior_logprobs[start:] - item.ref_logprobs[start:]
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-6)
    import my_credit

    (inputs,) = my_credit.seen
    assert inputs.finished.tolist() == [True, False, True]
    assert inputs.token_ids[2, :3].tolist() == ALL[2].token_ids.tolist()
    assert inputs.by_model.keys() == {"reward"}
    assert inputs.by_model["reward"].pooled.tolist() == inputs.scores.pooled.tolist()
    results = Scorer(changed(settings, mode="my_credit:broken")).score(ALL)
    assert all(isinstance(result, Failure) for result in results)
    with pytest.raises(ConfigError, match=r"reward\.mode: 'my_credit:absent' names no function"):
        Scorer(changed(settings, mode="my_credit:absent"))


def tokenizer_of(words):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], eos_token=words[1])


def test_tokens_that_end_sentences_are_found_by_their_text():
    words = ["?unk.", "<end>.", "cat", "cat.", "3.14", "!", "...", "so?", "line\n", ". ", "a.b"]
    assert sentence_end_ids(tokenizer_of(words)) == [3, 5, 6, 7, 8, 9]


def test_a_tokenizer_without_sentences_is_refused(tiny_models):
    with pytest.raises(ModelError, match=r"no token ends a sentence; set reward\.segment_by"):
        bind_method(RewardSection(mode="segment"), str(tiny_models.policy))
