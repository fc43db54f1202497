"""A judge whose tokens are bytes, so that characters and tokens can be counted by hand; and a toy world."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from r3hf_ray.instruments.scored_answers import Answer, Judge, Scored, load_judge

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model that reads bytes, with a window of 512 tokens."""
    words = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("byte_model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_judge(byte_model: Path) -> Judge:
    return load_judge(str(byte_model))


@pytest.fixture
def scored() -> Callable[..., Scored]:
    """`scored([P_1, .., P_T])`: an answer with these prefix scores, pooled at its last token unless told otherwise."""

    def make(
        prefix: Sequence[float], *, prompt_score: float = 0.0, score: float | None = None, finished: bool = True
    ) -> Scored:
        return Scored(
            answer=Answer([1, 2], list(range(3, 3 + len(prefix)))),
            prompt_score=prompt_score,
            prefix=np.array(prefix, dtype=np.float64),
            score=float(prefix[-1]) if score is None else score,
            finished=finished,
        )

    return make
