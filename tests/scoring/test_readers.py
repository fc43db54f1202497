"""Readers against a reward model run by hand: the same ids, and ids of its own at the ends of the policy's tokens."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from r3hf_ray.algorithms.redistribution import PrefixScores, r3hf
from r3hf_ray.errors import ModelError
from r3hf_ray.scoring import readers
from r3hf_ray.scoring.readers import Aligned, ReaderSettings, Reading, SameIds, Sampled
from r3hf_ray.scoring.translation import Translation, Translator, prompt_key

EOS, SUFFIX = 2, (7,)
CPU = torch.device("cpu")
PROMPTS = ["What is it?\n", "猫 said: ", "5 € for "]
RESPONSES = st.text(st.sampled_from("the catdog 5€é猫😀\u200b\n"), max_size=12)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a random reward model that knows the ids of every tokenizer here."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=500, initializer_range=0.2, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return ReaderSettings(source=str(folder), suffix_ids=SUFFIX, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def reader(settings):
    return SameIds(settings)


@pytest.fixture(scope="module")
def with_end(settings):
    """It reads the EOS of its own format behind a finished response, and then the suffix."""
    return SameIds(replace(settings, suffix_ids=(EOS, *SUFFIX)))


@pytest.fixture(scope="module")
def plain_score(settings):
    """Transformers' own classifier on one unpadded row."""
    model = AutoModelForSequenceClassification.from_pretrained(settings.source).eval()

    def score(ids):
        with torch.no_grad():
            return float(model(torch.tensor([list(ids)])).logits[0, 0])

    return score


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def translator(policy, own, *, max_tokens=1000, **change):
    prompts = {prompt_key(np.array(encode(policy, text))): np.array(encode(own, text), np.int32) for text in PROMPTS}
    values = {"policy_before": "", "before": "", "end_ids": (EOS,), "max_tokens": max_tokens}
    return Translator(Translation(prompts=prompts, **(values | change)), policy, own)


def sampled(policy, texts, finished):
    rows, lens = [], []
    for number, (text, ended) in enumerate(zip(texts, finished, strict=True)):
        prompt = encode(policy, PROMPTS[number % len(PROMPTS)])
        response = encode(policy, text) + ([EOS] if ended or not text else [])
        rows.append(np.array(prompt + response, np.int32))
        lens.append(len(prompt))
    ended = [bool(ended or not text) for text, ended in zip(texts, finished, strict=True)]
    return Sampled.of(rows, lens, ended, device=CPU)


def test_rows_are_padded_behind():
    batch = Sampled.of([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], [2, 1], [True, False], device=CPU)
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.response_mask.tolist() == [[False, False, True], [False] * 3]
    assert batch.finished.tolist() == [True, False]


def test_the_same_ids_lose_nothing(reader, tokenizers, plain_score):
    policy = tokenizers["short"]
    batch = sampled(policy, ["the cat", "a dog"], [True, False])
    reading = reader.read(batch)
    assert (reading.alignment_loss.tolist(), reading.attention, reading.refused) == ([0.0, 0.0], None, {})
    ids = [*encode(policy, PROMPTS[0] + "the cat"), EOS, *SUFFIX]
    assert float(reading.scores.pooled[0]) == pytest.approx(plain_score(ids), abs=2e-6)


@pytest.mark.parametrize("pair", [("short", "long"), ("bytes", "backwards"), ("long", "fallback")], ids="-".join)
def test_scores_are_the_reward_models_own_at_its_own_tokens(with_end, tokenizers, plain_score, pair):
    policy, own = (tokenizers[name] for name in pair)
    texts, finished = ["the cat 😀 sat", "5 € é", "a dog ran"], [True, False, True]
    batch, retell = sampled(policy, texts, finished), translator(policy, own)
    reading = Aligned(with_end, retell).read(batch)
    assert reading.attention is None
    for row, (text, ended) in enumerate(zip(texts, finished, strict=True)):
        prompt, response = encode(own, PROMPTS[row]), encode(own, text)
        tail = [EOS, *SUFFIX] if ended else []
        spoken = encode(policy, text) + ([EOS] if ended else [])
        retold = retell.response(spoken, finished=ended)
        assert float(reading.scores.prompt[row]) == pytest.approx(plain_score(prompt), abs=2e-6)
        assert float(reading.scores.pooled[row]) == pytest.approx(plain_score(prompt + response + tail), abs=2e-6)
        expected = [plain_score(prompt + response[: last + 1]) for last in retold.boundary[:-1]]
        given_scores = reading.scores.prefix[row][batch.response_mask[row]]
        np.testing.assert_allclose(given_scores[:-1], expected, rtol=0, atol=4e-6)
        assert given_scores[-1] == reading.scores.pooled[row]
        assert float(reading.alignment_loss[row]) == pytest.approx(retold.loss)
    assert not reading.scores.prefix[~batch.response_mask].any()


@pytest.mark.parametrize("pair", [("short", "long"), ("bytes", "backwards"), ("fallback", "bytes")], ids="-".join)
@given(texts=st.lists(RESPONSES, min_size=1, max_size=3), seed=st.integers(0, 7))
def test_rewards_add_up_and_unmapped_tokens_earn_nothing(with_end, tokenizers, pair, texts, seed):
    policy, own = (tokenizers[name] for name in pair)
    batch = sampled(policy, texts, [bool(seed >> row & 1) for row in range(len(texts))])
    retell = translator(policy, own)
    reading = Aligned(with_end, retell).read(batch)
    rewards = r3hf(reading.scores, batch.response_mask)
    assert not rewards[~batch.response_mask].any()
    for row in range(len(texts)):
        earned, ids = rewards[row][batch.response_mask[row]], batch.token_ids[row][batch.response_mask[row]]
        total = float(reading.scores.pooled[row] - reading.scores.prompt[row])
        size = max(1.0, float(reading.scores.prefix[row].abs().max()))
        assert math.isclose(float(earned.double().sum()), total, rel_tol=1e-6, abs_tol=1e-6 * size)
        boundary = retell.response(ids.tolist(), finished=bool(batch.finished[row])).boundary
        assert not earned[:-1][torch.from_numpy(np.diff(boundary, prepend=-1) == 0)[:-1]].any()


@given(texts=st.lists(RESPONSES.filter(len), min_size=1, max_size=3), ended=st.booleans())
def test_an_identical_tokenizer_gives_the_same_bits(reader, with_end, tokenizers, texts, ended):
    """Rows that all end alike, so that both batches have one shape; half characters included."""
    policy = tokenizers["bytes"]
    batch = sampled(policy, texts, [ended] * len(texts))
    same, aligned = reader.read(batch), Aligned(with_end, translator(policy, policy)).read(batch)
    for ours, theirs in zip(*(r3hf(x.scores, batch.response_mask) for x in (same, aligned)), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert same.scores.pooled.tolist() == aligned.scores.pooled.tolist()
    assert same.scores.prompt.tolist() == aligned.scores.prompt.tolist()
    assert not aligned.alignment_loss.any()


def test_renumbered_ids_give_the_same_bits(settings, reader, tokenizers, renumbered, tmp_path):
    """The way through the text, on a text whose tokens are whole characters: nothing moves by a bit."""
    policy = tokenizers["long"]
    own, shuffle = renumbered(policy)
    model = AutoModelForSequenceClassification.from_pretrained(settings.source)
    embedding = model.get_input_embeddings().weight.data
    embedding[shuffle] = embedding[: len(policy)].clone()
    model.save_pretrained(tmp_path)
    tail = tuple(int(shuffle[token]) for token in (EOS, *SUFFIX))
    other = SameIds(replace(settings, source=str(tmp_path), suffix_ids=tail))
    for ended in (True, False):
        batch = sampled(policy, ["the cat, the dog", "on the mat: 5", "It is not"], [ended] * 3)
        same, aligned = reader.read(batch), Aligned(other, translator(policy, own)).read(batch)
        assert not aligned.alignment_loss.any()
        for ours, theirs in zip(*(r3hf(x.scores, batch.response_mask) for x in (same, aligned)), strict=True):
            assert ours.tolist() == theirs.tolist()


@pytest.fixture
def renumbered():
    """The same tokenizer with its ids shuffled, and the new id of each old one."""

    def shuffled(tokenizer):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        order = np.random.default_rng(0).permutation(len(tokenizer))
        vocab = backend["model"]["vocab"]
        backend["model"]["vocab"] = {token: int(order[index]) for token, index in vocab.items()}
        for added in backend["added_tokens"]:
            added["id"] = int(order[added["id"]])
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend))), order

    return shuffled


def test_a_row_that_is_too_long_is_refused_alone(with_end, tokenizers):
    policy, own = tokenizers["long"], tokenizers["bytes"]
    batch = sampled(policy, ["the cat sat on the mat", "猫"], [True, True])
    limit = len(encode(own, PROMPTS[0])) + 10
    reading = Aligned(with_end, translator(policy, own, max_tokens=limit)).read(batch)
    assert list(reading.refused) == [0] and reading.scores.pooled.isfinite().all()
    assert f"has {limit - 10 + 22} tokens in a reward model's tokenizer, which can read {limit}" in reading.refused[0]
    alone = Aligned(with_end, translator(policy, own)).read(batch)
    assert reading.scores.pooled[1] == pytest.approx(float(alone.scores.pooled[1]), abs=1e-6)


def test_what_its_own_reader_refuses_stays_refused(tokenizers):
    class Refuses:
        def read(self, batch):
            scores = PrefixScores(
                prefix=torch.zeros(batch.token_ids.shape), prompt=torch.zeros(2), pooled=torch.zeros(2)
            )
            return Reading(scores=scores, alignment_loss=torch.zeros(2), refused={1: "no room"})

    policy, own = tokenizers["long"], tokenizers["bytes"]
    batch = sampled(policy, ["the cat sat on the mat", "猫"], [True, True])
    limit = len(encode(own, PROMPTS[0])) + 10
    refused = Aligned(Refuses(), translator(policy, own, max_tokens=limit)).read(batch).refused
    assert sorted(refused) == [0, 1] and refused[1] == "no room"


def test_a_model_that_looks_ahead_reads_no_prefixes(settings, monkeypatch):
    def refuse(*_):
        raise ModelError("it looks ahead")

    monkeypatch.setattr(readers, "require_causal", refuse)
    with pytest.raises(ModelError, match="looks ahead"):
        SameIds(settings)
    SameIds(replace(settings, prefixes=False))
