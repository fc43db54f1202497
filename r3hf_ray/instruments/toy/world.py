"""Writes the toy world to disk: an untrained policy, texts to imitate, prompts, and noisy preferences.

Everything is plain files that the ordinary commands read: Hugging Face folders and JSONL.
"""

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r3hf_ray.draws import seed_of
from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import ToyRequest, gold_reward, make_request, make_tokenizer
from r3hf_ray.instruments.toy.sampling import sample_responses
from r3hf_ray.instruments.toy.settings import ToySection

LABEL_TEMPERATURE = 0.7
"""In units of gold: a label prefers response a to b with probability sigmoid((gold(a) - gold(b)) / 0.7)."""


def make_world(folder: Path, toy: ToySection) -> None:
    """Write ``base/``, ``sft.jsonl`` and ``prompts.jsonl`` below `folder`.

    - ``base/``: a Llama of 0.11M random parameters (2 layers, width 64) and the language's tokenizer.
    - ``sft.jsonl``: ``{"messages": [user, assistant]}``, answers by the noisy author; ``<eos>`` is part of an answer,
      and an answer cut at the limit has none.
    - ``prompts.jsonl``: ``{"prompt": "gardening no-slang politely"}``; the last `heldout_prompts` are for evaluation.
      There are only 24 different prompts: held-out means fresh draws.
    """
    rng = random.Random(seed_of(toy.seed, "toy world"))
    tokenizer = make_tokenizer()
    make_base_model(tokenizer, seed=toy.seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = []
    for _ in range(toy.sft_rows):
        request = make_request(rng)
        answer = {"role": "assistant", "content": noisy_response(request, toy.max_response_tokens, rng)}
        rows.append({"messages": [_user(request), answer]})
    _write(folder / "sft.jsonl", rows)
    prompts = [make_request(rng) for _ in range(toy.train_prompts + toy.heldout_prompts)]
    _write(folder / "prompts.jsonl", ({"prompt": request.text} for request in prompts))


def make_base_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """The untrained policy: a Llama with 2 layers, 2 heads, width 64 and untied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def make_ranked(policy_folder: Path, path: Path, toy: ToySection) -> None:
    """Write noisy preferences as ``{"prompt": messages, "responses": [8 texts], "pairs": [[winner, loser], ...]}``.

    Of 8 responses to a prompt 4 are the noisy author's and 4 the policy's; each of the 28 pairs has its own noisy
    label, so they may contradict each other, as people do. The last `heldout_pairs` rows are one pair each, both
    responses the policy's: the distribution on which the reward model will be used. Gold stays out of the file.
    """
    rng = random.Random(seed_of(toy.seed, "toy preferences"))
    requests = [make_request(rng) for _ in range(toy.groups)]
    asked = [request for request in requests for _ in range(4)]
    heldout = [make_request(rng) for _ in range(toy.heldout_pairs)]
    asked += [request for request in heldout for _ in range(2)]
    sampled = iter(_policy_texts(policy_folder, asked, toy))
    rows = []
    for request in requests:
        written = [noisy_response(request, toy.max_response_tokens, rng) for _ in range(4)]
        responses = [*written, *(next(sampled) for _ in range(4))]
        rows.append(_ranked_row(request, responses, toy, rng))
    rows += [_ranked_row(request, [next(sampled), next(sampled)], toy, rng) for request in heldout]
    _write(path, rows)


def noisy_pairs(golds: Sequence[float], rng: random.Random) -> list[tuple[int, int]]:
    """A (winner, loser) label for every pair of a group, each drawn for itself: sigmoid(gold difference / 0.7)."""
    pairs = []
    for a in range(len(golds)):
        for b in range(a + 1, len(golds)):
            a_wins = 1.0 / (1.0 + math.exp((golds[b] - golds[a]) / LABEL_TEMPERATURE))
            pairs.append((a, b) if rng.random() < a_wins else (b, a))
    return pairs


def _policy_texts(folder: Path, requests: list[ToyRequest], toy: ToySection) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seed = seed_of(toy.seed, "toy policy samples")
    samples = sample_responses(model, tokenizer, requests, max_response_tokens=toy.max_response_tokens, seed=seed)
    texts: list[str] = tokenizer.batch_decode(samples)
    return texts


def _ranked_row(request: ToyRequest, responses: list[str], toy: ToySection, rng: random.Random) -> dict[str, Any]:
    golds = [gold_reward(request.text, text, max_response_tokens=toy.max_response_tokens) for text in responses]
    return {"prompt": [_user(request)], "responses": responses, "pairs": noisy_pairs(golds, rng)}


def _user(request: ToyRequest) -> dict[str, str]:
    return {"role": "user", "content": request.text}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
