"""The shared model folders of the cases, and small models made here of what real folders may hold."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from made.byte_tokenizer import CHATML, byte_tokenizer

CASES = Path(__file__).parents[3] / "shared" / "cases" / "make_models.py"


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny models of the shared cases."""
    if not CASES.exists():
        pytest.skip("the shared cases are not beside this checkout")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, CASES, folder], check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def padded_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatML policy with seven rows more than tokens, which its head likes best: unmasked, it would sample them."""
    tokenizer = byte_tokenizer(CHATML)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(tokenizer) + 7, **size, **ids, max_position_embeddings=256)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(tokenizer)] *= 10.0  # likes some tokens more than others
        model.lm_head.weight[len(tokenizer) :] *= 30.0
    folder = tmp_path_factory.mktemp("padded")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def metaspace() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """`metaspace(template)`: a tokenizer of letters that marks the first word of a text too, as SentencePiece does."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        letters = [chr(code) for code in range(33, 127)]
        pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("\n", -4.0)]
        pieces += [(letter, -4.0) for letter in letters] + [("▁" + letter, -3.5) for letter in letters]
        core = Tokenizer(models.Unigram(pieces, unk_id=0))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        return PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
        )

    return make
