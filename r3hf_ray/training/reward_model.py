"""Bradley-Terry reward models: TRL's `RewardTrainer` for plain pairs, `ranking` for ranked groups (layer 2).

TRL gets rows that are tokenised already: from plain text it would drop over-long pairs and append EOS in silence. It is
imported inside the function (9 s). Both ways end in the same folder, with the score head in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from r3hf_ray.config import RewardConfig
from r3hf_ray.models.load import ensure_distinct_pad, load_tokenizer
from r3hf_ray.training.ranking import RankedGroup, pair_accuracy, train_ranked
from r3hf_ray.training.trl_settings import MetricsCallback, arguments, is_first_rank, save_model

Sink = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the first preferred.

    Example: ``Pair(prompt_ids=[1, 5, 3], chosen_ids=[7, 8, 2], rejected_ids=[9, 2])`` with 2 the EOS token
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def as_group(self) -> RankedGroup:
        """The same preference as a ranked group of two."""
        return RankedGroup(
            sequences=[self.prompt_ids + self.chosen_ids, self.prompt_ids + self.rejected_ids], pairs=[(0, 1)]
        )


def train_on_pairs(
    config: RewardConfig, pairs: Sequence[Pair], heldout: Sequence[Pair], *, folder: Path, on_metrics: Sink
) -> None:
    """Train a reward model on pairs by TRL and save a plain Hugging Face folder. Every rank calls it.

    Args:
        config: base model, batch sizes, learning rate, epochs.
        pairs: the training rows.
        heldout: pairs whose accuracy is taken at the end; may be empty.
        folder: where rank 0 saves model and tokenizer.
        on_metrics: called on rank 0 with the optimizer step and that step's metrics.

    Raises:
        FloatingPointError: the loss is not finite; nothing is saved.
    """
    from trl import RewardConfig as Arguments
    from trl import RewardTrainer

    section = config.reward_training
    model, tokenizer = _start(config)
    trainer = RewardTrainer(
        model=model,
        args=Arguments(
            max_length=None,
            center_rewards_coefficient=section.center_coef or None,
            **arguments(section, config.trainer, config.model, seed=config.run.seed, folder=folder.parent),
        ),
        train_dataset=_rows(pairs),
        processing_class=tokenizer,
        callbacks=[MetricsCallback("reward_model", on_metrics)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    _finish(config, trained, tokenizer, [p.as_group() for p in heldout], trainer.state.global_step, folder, on_metrics)


def train_on_groups(
    config: RewardConfig,
    groups: Sequence[RankedGroup],
    heldout: Sequence[RankedGroup],
    *,
    folder: Path,
    on_metrics: Sink,
) -> None:
    """Train a reward model on ranked groups, each answer forwarded once. Every rank calls it; as `train_on_pairs`."""
    section = config.reward_training
    model, tokenizer = _start(config)
    if config.trainer.gpus_per_rank > 0:
        model.to("cuda")
    if config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    steps = section.steps or math.ceil(section.epochs * len(groups) / section.groups_per_step)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if is_first_rank():
            on_metrics(step, {f"reward_model/{name}": value for name, value in metrics.items()})

    train_ranked(
        model,
        groups,
        pad_id=_pad_id(tokenizer),
        learning_rate=section.learning_rate,
        steps=steps,
        groups_per_step=section.groups_per_step,
        seed=config.run.seed,
        on_step=on_step,
        warmup_steps=section.warmup_steps,
        center_coef=section.center_coef,
        microbatch_size=section.microbatch_size,
    )
    _finish(config, model, tokenizer, heldout, steps, folder, on_metrics)


def binomial_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion.

    Example: ``binomial_interval(60, 100)`` is about ``(0.502, 0.691)``
    """
    z = 1.959964
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _start(config: RewardConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model's trunk under a fresh score head, the same on every rank; weights stay float32 in training."""
    set_seed(config.run.seed)
    tokenizer = load_tokenizer(config.model.base)
    model = AutoModelForSequenceClassification.from_pretrained(config.model.base, num_labels=1, dtype=torch.float32)
    ensure_distinct_pad(tokenizer, model)
    return model, tokenizer


def _finish(
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[RankedGroup],
    step: int,
    folder: Path,
    on_metrics: Sink,
) -> None:
    if heldout:
        size = 2 * config.reward_training.microbatch_size
        accuracy = pair_accuracy(model, heldout, pad_id=_pad_id(tokenizer), microbatch_size=size)
        trials = sum(len(group.pairs) for group in heldout)
        low, high = binomial_interval(accuracy * trials, trials)
        if is_first_rank():
            metrics = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "pairs": float(trials)}
            on_metrics(step, {f"eval/heldout/pair_{name}": value for name, value in metrics.items()})
    save_model(model, tokenizer, folder)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)


def _rows(pairs: Sequence[Pair]) -> Dataset:
    chosen, rejected = ([p.prompt_ids + p.chosen_ids for p in pairs], [p.prompt_ids + p.rejected_ids for p in pairs])
    return Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})
