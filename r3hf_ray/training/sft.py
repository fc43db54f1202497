"""Supervised fine-tuning by TRL's `SFTTrainer` on rows that are tokenised already (layer 2).

TRL would append EOS to plain text and cut long rows; given ids and labels it does neither. It is imported inside the
function: the import takes about 9 s, and the ppo path must not pay for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback

from r3hf_ray.config import SFTConfig
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.load import load_policy
from r3hf_ray.training.trl_settings import MetricsCallback, arguments, save_model
from r3hf_ray.types import Example

IGNORED = -100
"""Label of a token without loss."""


def train_policy(
    config: SFTConfig,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    *,
    folder: Path,
    on_metrics: Callable[[int, dict[str, float]], None],
) -> None:
    """Fine-tune `config.model.base` on the answers and save a plain Hugging Face folder. Every rank calls it.

    Args:
        config: batch sizes, learning rate, epochs.
        examples: the training rows.
        heldout: rows whose loss is taken at the end; may be empty.
        folder: where rank 0 saves model and tokenizer.
        on_metrics: called on rank 0 with the optimizer step and that step's metrics.

    Raises:
        FloatingPointError: the loss is not finite; nothing is saved.
    """
    from trl import SFTConfig as Arguments
    from trl import SFTTrainer

    base = ModelFolder(config.model.base, "base model")
    model = load_policy(config.model.base, torch.float32, attention=config.model.attention)
    base.settle_tokens(model)
    model.train()
    settings = arguments(config.sft, config.trainer, config.model, seed=config.run.seed, folder=folder.parent)
    trainer = SFTTrainer(
        model=model,
        args=Arguments(max_length=None, **settings),
        train_dataset=_rows(examples),
        eval_dataset=_rows(heldout) if heldout else None,
        processing_class=base.tokenizer,
        callbacks=[MetricsCallback("sft", on_metrics)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if heldout:
        trainer.evaluate()
    save_model(trainer.accelerator.unwrap_model(trainer.model), base.tokenizer, folder)


def _rows(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [e.prompt_ids + e.answer_ids for e in examples],
            "labels": [[IGNORED] * len(e.prompt_ids) + e.answer_ids for e in examples],
        }
    )
