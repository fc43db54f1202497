"""What is measured: two shapes, each with its models, prompts and jobs, written to disk for the commands to read."""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.models.folder import load_tokenizer

PROMPT_TOKENS = 16
PROMPTS = 512
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Chat template that adds nothing to a prompt, so that it has exactly `PROMPT_TOKENS` tokens."""

SectionFields = Mapping[str, Mapping[str, Any]]
"""Section -> field -> value, over the shape's own job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the system.

    Example: ``Variant(name="lag 1", overrides={"rollout": {"max_lag": 1}, "ppo": {"importance_cap": 2.0}})``
    """

    name: str
    overrides: SectionFields = field(default_factory=dict)
    once: bool = False
    """Only in the first repeat, and with `SHORT_STEPS` steps: it is slow, and no target depends on it."""


LAG_0, LAG_1, TERMINAL = (
    Variant(name="lag 0"),
    Variant(name="lag 1", overrides={"rollout": {"max_lag": 1}, "ppo": {"importance_cap": 2.0}}),
    Variant(name="terminal", overrides={"reward": {"mode": "terminal"}}),
)
TWO_RANKS = Variant(name="2 learner ranks", overrides={"learner": {"ranks": 2, "threads": 1}}, once=True)
SHORT_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A size of model and batch, how the system is spread over two cores, and how much is measured."""

    name: str
    responses: int
    """Of one step."""
    response_tokens: int
    """Longest response. Models are untrained or the prompts nonsense, so nearly all get there."""
    steps: int
    """PPO steps of one run of the system."""
    iterations: int
    """Passes of the bare loops in one repeat, on each number of threads."""
    overhead: float
    """Target: wall time of a step at lag 0, at most this many times the sum of the bare loops."""
    job: SectionFields
    """Threads and actors: the same in every variant, so that lag 0 and lag 1 differ in the lag only."""
    variants: tuple[Variant, ...]

    def config(self, variant: Variant, *, inputs: Path, folder: Path, name: str, steps: int) -> PPOConfig:
        """The job of one run: nothing but steps, without tracking, evaluation, calibration and early checkpoints."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"name": name, "folder": folder, "cpus": 2},
            "model": {"policy": str(inputs / "policy"), "reward_model": str(inputs / "reward")},
            "data": {"source": str(inputs / "prompts.jsonl"), "format": "prompt"},
            "rollout": {"prompts_per_step": self.responses, "max_response_tokens": self.response_tokens},
            "reward": {"calibration_samples": 0, "pooling_suffix": "none"},
            "ppo": {"steps": min(steps, SHORT_STEPS) if variant.once else steps, "epochs": 1, "minibatches": 2},
            "critic": {"init": "reward_trunk"},  # in `terminal` too: redistribution is then the only difference
            "optimizer": {"policy_lr": 1e-6, "critic_lr": 1e-6},
            "learner": {"checkpoint_every": 0},
            "evaluation": {"prompts": 0},
            "tracking": {"wandb": "disabled", "samples_per_dump": 0},
        }
        for overrides in (self.job, variant.overrides):
            for section, fields in overrides.items():
                sections[section] = {**sections[section], **fields}
        return PPOConfig(**sections)  # type: ignore[arg-type]


TINY = Shape(
    name="tiny",
    responses=64,
    response_tokens=64,
    steps=8,
    iterations=3,
    overhead=1.3,
    job={
        "rollout": {"actors": 2, "group_size": 32, "threads": 1},
        "reward": {"actors": 2, "threads": 1},
        "learner": {"ranks": 2, "threads": 1},
    },
    variants=(LAG_0, LAG_1, TERMINAL),
)
"""A Llama of 0.9M random parameters: every process has one thread, and there are two of each kind."""

SMOLLM2 = Shape(
    name="smollm2",
    responses=8,
    response_tokens=32,
    steps=6,
    iterations=2,
    overhead=1.15,
    job={
        "rollout": {"actors": 1, "threads": 2},
        "reward": {"actors": 1, "threads": 2},
        "learner": {"ranks": 1, "threads": 2},
    },
    variants=(LAG_0, LAG_1, TERMINAL, TWO_RANKS),
)
"""SmolLM2-135M: one process of each kind with two threads. A step of decoding reads all weights once for the whole
batch, so all of it is in one engine at once; two learner ranks over loopback are several times slower than one."""

SHAPES = {shape.name: shape for shape in (TINY, SMOLLM2)}


def make_inputs(shape: Shape, folder: Path, *, model: Path) -> None:
    """Write ``policy/``, ``reward/`` and ``prompts.jsonl`` below `folder`.

    Args:
        shape: whose.
        folder: for them.
        model: SmolLM2's folder; not read for `tiny`.

    Raises:
        ConfigError: it is not there.
    """
    if shape is not TINY and not (model / "config.json").is_file():
        raise ConfigError(f"{model}: no model folder; r3hf fetch-smollm2 {model} makes it, or name another by --model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy, reward, tokenizer = _tiny_models() if shape is TINY else _smollm2_models(model)
    tokenizer.chat_template = TEMPLATE
    for name, made in (("policy", policy), ("reward", reward)):
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [json.dumps({"prompt": text}) + "\n" for text in _prompts(tokenizer)]
    (folder / "prompts.jsonl").write_text("".join(rows))


Models = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]


def _tiny_models() -> Models:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(997))]
    backend = Tokenizer(WordLevel({word: token_id for token_id, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(words),  # untrained, it ends a response with probability 1/1000 a token
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    policy = LlamaForCausalLM(LlamaConfig(**sizes))
    return policy, LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1)), tokenizer


def _smollm2_models(model: Path) -> Models:
    """The policy as it is, and its trunk under a random score head."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    return policy, reward, load_tokenizer(model)


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Random words, `PROMPT_TOKENS` tokens each."""
    rng = random.Random(0)
    decoded = (tokenizer.decode([token_id]).strip() for token_id in range(len(tokenizer)))
    words = sorted({word for word in decoded if re.fullmatch(r"[a-z][a-z0-9]*", word)})
    prompts: list[str] = []
    while len(prompts) < PROMPTS:
        text = " ".join(rng.sample(words, PROMPT_TOKENS))
        if len(tokenizer.encode(text, add_special_tokens=False)) == PROMPT_TOKENS:
            prompts.append(text)
    return prompts
