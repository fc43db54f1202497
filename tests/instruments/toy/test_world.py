import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from r3hf_ray.instruments.toy.language import EOS, read_request
from r3hf_ray.instruments.toy.sampling import render_prompt, sample_responses
from r3hf_ray.instruments.toy.settings import ToySection
from r3hf_ray.instruments.toy.world import make_ranked, make_world, noisy_pairs


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_base(world: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(world / "base"), AutoTokenizer.from_pretrained(world / "base")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, ToySection(seed=1, sft_rows=40, train_prompts=20, heldout_prompts=10))
    return folder


def test_world_files(world: Path) -> None:
    texts = [row["messages"] for row in rows(world / "sft.jsonl")]
    assert len(texts) == 40
    for user, assistant in texts:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        read_request(user["content"])
        assert assistant["content"].endswith(EOS) or len(assistant["content"].split()) == 48
    prompts = [row["prompt"] for row in rows(world / "prompts.jsonl")]
    assert len(prompts) == 30
    assert all(read_request(prompt).text == prompt for prompt in prompts)


def test_base_loads_as_a_plain_folder(world: Path) -> None:
    model, tokenizer = load_base(world)
    assert 0.10e6 < sum(p.numel() for p in model.parameters()) < 0.12e6
    assert model.config.vocab_size == len(tokenizer) == 52
    assert not model.config.tie_word_embeddings
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_same_seed_writes_the_same_world(world: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for seed in (1, 2):
        make_world(tmp_path / str(seed), ToySection(seed=seed, sft_rows=40, train_prompts=20, heldout_prompts=10))
    assert torch.equal(before, torch.random.get_rng_state()), "the global random state is the caller's"
    for name in ("sft.jsonl", "prompts.jsonl", "base/model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "2" / name).read_bytes() != (world / name).read_bytes()


def test_ranked_file(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    make_ranked(world / "base", path, ToySection(seed=1, groups=6, heldout_pairs=5))
    written = rows(path)
    assert [len(row["responses"]) for row in written] == [8] * 6 + [2] * 5
    for row in written:
        count = len(row["responses"])
        assert set(row) == {"prompt", "responses", "pairs"}, "gold must not reach the reward model"
        read_request(row["prompt"][0]["content"])
        every_pair = [(a, b) for a in range(count) for b in range(a + 1, count)]
        assert sorted(tuple(sorted(pair)) for pair in row["pairs"]) == every_pair
        for response in row["responses"]:
            assert (EOS in response.split()) or len(response.split()) == 48
    make_ranked(world / "base", tmp_path / "again.jsonl", ToySection(seed=1, groups=6, heldout_pairs=5))
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_labels_are_draws_from_the_gold_difference() -> None:
    rng = random.Random(0)
    labels = [noisy_pairs([0.7, 0.0], rng)[0] for _ in range(4000)]
    expected = 1 / (1 + math.exp(-1.0))
    assert labels.count((0, 1)) / 4000 == pytest.approx(expected, abs=4 * math.sqrt(0.2 / 4000))
    assert noisy_pairs([100.0, 0.0, 50.0], rng) == [(0, 1), (0, 2), (2, 1)]


def test_samples_stop_at_eos_and_are_seeded(world: Path) -> None:
    model, tokenizer = load_base(world)
    request = read_request("gardening no-slang politely")

    def sample() -> list[list[int]]:
        return sample_responses(model, tokenizer, [request] * 50, max_response_tokens=12, seed=0, batch_size=30)

    samples = sample()
    finished = [tokenizer.eos_token_id in sample for sample in samples]
    assert len(samples) == 50
    assert 0 < sum(finished) < 50
    for sampled, ended in zip(samples, finished, strict=True):
        assert sampled.count(tokenizer.eos_token_id) == ended
        assert sampled[-1] == tokenizer.eos_token_id if ended else len(sampled) == 12
    assert sample() == samples
    assert len({tuple(sampled) for sampled in samples}) == 50


def test_samples_follow_the_policy(world: Path) -> None:
    """A policy made deterministic by a huge head samples what a loop without cache finds most likely."""
    model, tokenizer = load_base(world)
    with torch.no_grad():
        model.lm_head.weight *= 1e5
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    for text in ("gardening no-slang politely", "baking no-jokes casually"):
        (sampled,) = sample_responses(model, tokenizer, [read_request(text)], max_response_tokens=10, seed=0)
        ids = render_prompt(tokenizer, read_request(text))
        while len(ids) < 15 and ids[-1] != tokenizer.eos_token_id:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[[tokenizer.bos_token_id, tokenizer.pad_token_id]] = -math.inf
            ids.append(int(logits.argmax()))
        assert ids[5:] == sampled


def test_samples_hold_no_control_token_but_the_end(world: Path) -> None:
    """As text in a file they would be letters that the toy's tokenizer cannot read."""
    model, tokenizer = load_base(world)
    requests = [read_request("gardening no-slang politely")] * 100
    samples = sample_responses(model, tokenizer, requests, max_response_tokens=48, seed=0)
    ids = {token for sample in samples for token in sample}
    assert tokenizer.eos_token_id in ids and not ids & {tokenizer.bos_token_id, tokenizer.pad_token_id}
