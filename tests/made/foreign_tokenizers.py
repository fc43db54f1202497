"""Tokenizers that cut the same text in different places, trained in milliseconds; running-sum reward models on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from r3hf_ray.models.load import untrained_reward_model

SPECIAL = ["<pad>", "<bos>", "<eos>"]
TEXTS = [
    "The cat sat on the mat, and the dog ran on the other mat. Is it not nice? It is!",
    "Ein Käse für 5 € – naïve café, jalapeño; e\u0301te\u0301 l'ete\u0301",
    "日本語の文章です。猫が好きです。",
    "smile 😀😀 family 👨‍👩‍👧 flag 🇫🇷 thumb 👍🏽",
]


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def byte_level(merges: int, *, backwards: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as SmolLM2, Llama 3 and Qwen have it: 256 bytes, then so many merges; it trims its offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not backwards)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + merges, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text[::-1] for text in TEXTS] if backwards else TEXTS, trainer)
    return fast(backend)


def byte_fallback(merges: int) -> PreTrainedTokenizerFast:
    """BPE on characters as Llama 2 and Gemma have it: spaces are letters, an unknown character is spelled in bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=120 + merges, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXTS[:2], trainer)
    learned = json.loads(backend.to_str())["model"]
    vocab = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(SPECIAL)
    return fast(backend)


def lower_case_words() -> PreTrainedTokenizerFast:
    """A WordPiece that folds case and accents, drops spaces, and knows few characters: text does not survive it."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [*SPECIAL, "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEXTS[0].lower()], trainer)
    backend.add_tokens([AddedToken("<unk>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """By name; `bytes` spells in single bytes only."""
    return {
        "bytes": byte_level(0),
        "short": byte_level(40),
        "long": byte_level(160),
        "backwards": byte_level(160, backwards=True),
        "fallback": byte_fallback(60),
        "words": lower_case_words(),
    }


@pytest.fixture(scope="session")
def sum_models(tiny_models, tmp_path_factory) -> Callable[[str], Path]:
    """`sum_models("llama" | "qwen2")`: a running-sum reward model as `r3hf reward` saves it, trunk and head random."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            base = tiny_models.policy
            if family == "qwen2":
                base = tmp_path_factory.mktemp("qwen2") / "base"
                shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
                ids = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
                torch.manual_seed(1)
                config = Qwen2Config(**shape, **ids, num_key_value_heads=2, initializer_range=0.2)
                Qwen2ForCausalLM(config).save_pretrained(base)
            model = untrained_reward_model(base, head="running_sum")
            torch.manual_seed(2)
            torch.nn.init.normal_(model.token_score.weight, std=0.1)
            made[family] = tmp_path_factory.mktemp("running_sum") / family
            model.save_pretrained(made[family])
            AutoTokenizer.from_pretrained(tiny_models.policy).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session", params=["last_token", "running_sum"])
def reward_folder(request, tiny_models, sum_models) -> Path:
    """A Llama reward model of either kind of head."""
    return tiny_models.reward if request.param == "last_token" else sum_models("llama")
