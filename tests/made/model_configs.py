"""Configurations of well-known models, as they are published, written where a folder is needed."""

import json
from pathlib import Path
from typing import Any


def _llama(**sizes: int | bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "tie_word_embeddings": False,
        **sizes,
    }


def _qwen(*, tied: bool = True, **sizes: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": tied,
        **sizes,
    }


CONFIGS = {
    "tiny": _llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8),
    "SmolLM2-135M": _llama(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": _qwen(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "Qwen2.5-1.5B": _qwen(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "Llama-3-8B": _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Llama-3-70B": _llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}
"""By name: what config.json says."""


def write_config(folder: Path, name: str, *, scores: bool = False) -> Path:
    """A folder that holds a config.json and nothing else, of a language model or of a reward model of that trunk."""
    config = dict(CONFIGS[name])
    if scores:
        kind = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        config |= {"architectures": [kind], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HUB = {
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen2.5-0.5B",
    "Qwen/Qwen2-0.5B-Instruct": "Qwen2.5-0.5B",
    "trl-lib/Qwen2-0.5B-Reward": "Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen2.5-1.5B",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "Llama-3-70B",
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": "Llama-3-8B",
}
"""Models on the hub that jobs name, and their sizes."""


def write_hub_cache(cache: Path) -> None:
    """A cache of the hub that holds every config.json of `HUB`, as if it had been fetched, and nothing else."""
    for source, name in HUB.items():
        folder = cache / f"models--{source.replace('/', '--')}"
        write_config(folder / "snapshots" / "0", name, scores="Reward" in source)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("0")
