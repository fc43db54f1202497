"""What both TRL trainers are told, how their metrics come out, and how their models are saved (layer 2)."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from r3hf_ray.errors import ConfigError
from r3hf_ray.sections.actors import TrainerSection
from r3hf_ray.sections.models import BaseModelSection
from r3hf_ray.sections.stages import SFTSection

_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "accuracy": "accuracy",
    "prefix_loss": "prefix_loss",
    "prefix_accuracy": "prefix_accuracy",
    "margin": "margin",
    "mean_reward": "score/mean",
    "num_tokens": "tokens",
    "eval_loss": "eval/loss",
    "eval_mean_token_accuracy": "eval/token_accuracy",
}
"""Names of TRL's metrics in ours; what is not here is not logged."""


def split_batch(batch_size: int, microbatch_size: int, ranks: int) -> tuple[int, int]:
    """Sequences of one forward on one rank, and forwards of one optimizer step.

    Example: ``split_batch(32, 8, 2)`` is ``(8, 2)``: 2 ranks x 8 sequences x 2 forwards

    Raises:
        ConfigError: the numbers do not divide.
    """
    share = batch_size // ranks
    size = min(microbatch_size, share)
    if share * ranks != batch_size or share % size:
        raise ConfigError(
            f"batch_size ({batch_size}) must be a multiple of trainer.ranks ({ranks}) x microbatch_size "
            f"({microbatch_size})"
        )
    return size, share // size


def arguments(
    section: SFTSection, trainer: TrainerSection, model: BaseModelSection, *, seed: int, folder: Path
) -> dict[str, Any]:
    """Keyword arguments of TRL's configurations, those of `transformers.TrainingArguments`.

    TRL's own defaults differ from what a reader of our TOML would expect (bf16 and gradient checkpointing on), so
    everything that matters is stated. Batches are random: batches of rows of like length save padding, but in the toy
    they cost the policy a point of gold reward (0.83 to -0.29, `docs/results.md`). TRL must be given a folder, but
    is told to save nothing.
    """
    size, accumulation = split_batch(section.batch_size, section.microbatch_size, trainer.ranks)
    return {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "num_train_epochs": section.epochs,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": section.learning_rate,
        "warmup_steps": section.warmup_steps,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": trainer.gpus_per_rank == 0,
        "bf16": model.dtype == "bfloat16",
        "gradient_checkpointing": trainer.gradient_checkpointing,
        "pad_to_multiple_of": None,
        "seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": trainer.gpus_per_rank > 0,
        "ddp_find_unused_parameters": False,
    }


class MetricsCallback(TrainerCallback):
    """Hands each logged step to `sink` on the first rank, under our names, and stops on a loss that is not finite."""

    def __init__(self, prefix: str, sink: Callable[[int, dict[str, float]], None]) -> None:
        self.prefix = prefix
        self.sink = sink

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by transformers after each optimizer step and after an evaluation.

        Raises:
            FloatingPointError: loss or gradient norm is not finite.
        """
        known = {name: float(value) for name, value in (logs or {}).items() if name in _NAMES}
        metrics = {f"{self.prefix}/{_NAMES[name]}": value for name, value in known.items()}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"{', '.join(broken)} not finite at step {state.global_step}; lower learning_rate")
        if metrics and state.is_world_process_zero:
            self.sink(state.global_step, metrics)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain Hugging Face folder (safetensors) from rank 0; it appears whole or not at all."""
    if not is_first_rank():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
