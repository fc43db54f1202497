"""Bradley-Terry reward models: TRL's `RewardTrainer` for plain pairs, `ranking` for ranked groups (layer 2).

TRL gets rows that are tokenised already: from plain text it would drop over-long pairs and append EOS in silence. It is
imported inside functions (9 s). Both ways end in the same kind of folder, with the score head in float32.

Both ways take the same two options. With ``reward_training.prefix_weight`` the model also learns to compare the two
answers cut at one random fraction of their lengths; ``reward_training.head`` says what the score of an answer is
(`models/running_sum.py`).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from r3hf_ray.algorithms.credit import binomial_interval
from r3hf_ray.config import RewardConfig
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.load import score_head, untrained_reward_model
from r3hf_ray.models.sharding import DTYPES
from r3hf_ray.scoring.prefix_scores import scores_so_far
from r3hf_ray.training.ranking import cut_fraction, cut_length, pair_accuracy, train_ranked
from r3hf_ray.training.trl_settings import MetricsCallback, arguments, is_first_rank, save_model
from r3hf_ray.types import Pair, RankedGroup

Sink = Callable[[int, dict[str, float]], None]


def train_on_pairs(
    config: RewardConfig, pairs: Sequence[Pair], heldout: Sequence[Pair], *, folder: Path, on_metrics: Sink
) -> None:
    """Train a reward model on pairs by TRL and save a plain Hugging Face folder. Every rank calls it.

    Args:
        config: base model, head, batch sizes, learning rate, epochs, weights of the losses.
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
    weight, seed = section.prefix_weight, config.run.seed
    trainer = (_prefix_aware_trainer(weight, seed) if weight else RewardTrainer)(
        model=model,
        args=Arguments(
            max_length=None,
            center_rewards_coefficient=section.center_coef or None,
            **arguments(section, config.trainer, config.model, seed=seed, folder=folder.parent),
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
        prefix_weight=section.prefix_weight,
        microbatch_size=section.microbatch_size,
        dtype=DTYPES[config.model.dtype],
    )
    _finish(config, model, tokenizer, heldout, steps, folder, on_metrics)


def _start(config: RewardConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model's trunk under a fresh score head, the same on every rank; weights stay float32 in training."""
    set_seed(config.run.seed)
    base = ModelFolder(config.model.base, "base model")
    model = untrained_reward_model(
        config.model.base, head=config.reward_training.head, attention=config.model.attention
    )
    base.settle_tokens(model)
    return model, base.tokenizer


def _prefix_aware_trainer(weight: float, seed: int) -> Any:
    """TRL's trainer, whose loss also compares both answers of each pair cut at one random fraction of their lengths.

    TRL's forward already asks the score head at every position and keeps the last one; a hook keeps the others.
    """
    from trl import RewardTrainer

    class PrefixAwareTrainer(RewardTrainer):
        data_collator: Any

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            collate = self.data_collator

            def with_pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
                pairs = torch.tensor([[example["row"], example["prompt_tokens"]] for example in examples])
                return {**collate(examples), "pairs": pairs}

            self.data_collator = with_pairs

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            pairs, is_token = inputs.pop("pairs"), inputs["attention_mask"].bool()
            said: list[Tensor] = []
            with score_head(self.model).register_forward_hook(lambda head, given, scores: said.append(scores)):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            scores = scores_so_far(self.model, said[0][..., 0].float(), is_token)
            cuts = _cut_lengths(pairs.tolist(), is_token.sum(1).tolist(), seed=seed, step=self.state.global_step)
            cut_scores = scores[torch.arange(len(cuts)), torch.tensor(cuts) - 1]  # all chosen ones, then all rejected
            margins = cut_scores[: len(pairs)] - cut_scores[len(pairs) :]
            prefix_loss = -logsigmoid(margins).mean()
            metrics = {"prefix_loss": prefix_loss.detach(), "prefix_accuracy": (margins > 0).float().mean()}
            for name, value in metrics.items():
                mean = self.accelerator.gather_for_metrics(value).mean().item()
                self._metrics["train" if self.model.training else "eval"][name].append(mean)
            loss = loss + weight * prefix_loss
            return (loss, outputs) if return_outputs else loss

    return PrefixAwareTrainer


def _cut_lengths(pairs: list[list[int]], lengths: list[int], *, seed: int, step: int) -> list[int]:
    """Where each sequence of a batch is cut: the chosen one and the rejected one of a pair at the same fraction.

    Args:
        pairs: row of the data and prompt tokens of each.
        lengths: of the chosen sequences, then of the rejected ones. [tokens]
        seed: of the run.
        step: optimizer steps done, so that a pair is cut elsewhere when it comes again.
    """
    drawn = [(prompt, cut_fraction(seed, step, row)) for row, prompt in pairs] * 2
    return [cut_length(prompt, length, fraction) for (prompt, fraction), length in zip(drawn, lengths, strict=True)]


def _finish(
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[RankedGroup],
    step: int,
    folder: Path,
    on_metrics: Sink,
) -> None:
    save_model(model, tokenizer, folder)  # first: a model that could not be measured is not lost
    if heldout:
        size = 2 * config.reward_training.microbatch_size
        accuracy = pair_accuracy(model, heldout, pad_id=_pad_id(tokenizer), microbatch_size=size)
        trials = sum(len(group.pairs) for group in heldout)
        low, high = binomial_interval(accuracy * trials, trials)
        if is_first_rank():
            metrics = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "pairs": float(trials)}
            on_metrics(step, {f"eval/heldout/pair_{name}": value for name, value in metrics.items()})


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)


def _rows(pairs: Sequence[Pair]) -> Dataset:
    """``row`` and ``prompt_tokens`` say where a pair is cut; TRL's own collator leaves them out."""
    chosen, rejected = ([p.prompt_ids + p.chosen_ids for p in pairs], [p.prompt_ids + p.rejected_ids for p in pairs])
    columns = {"chosen_ids": chosen, "rejected_ids": rejected}
    return Dataset.from_dict(
        columns | {"row": list(range(len(pairs))), "prompt_tokens": [len(p.prompt_ids) for p in pairs]}
    )
