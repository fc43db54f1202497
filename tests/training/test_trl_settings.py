"""What the TRL trainers are told, and what comes out of them."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from r3hf_ray.errors import ConfigError
from r3hf_ray.sections.actors import TrainerSection
from r3hf_ray.sections.models import BaseModelSection
from r3hf_ray.sections.stages import SFTSection
from r3hf_ray.training.trl_settings import MetricsCallback, arguments, split_batch


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [(32, 8, 2, (8, 2)), (32, 32, 2, (16, 1)), (15, 5, 1, (5, 3)), (1, 32, 1, (1, 1))],
)
def test_batches_are_split_exactly(batch: int, micro: int, ranks: int, expected: tuple[int, int]) -> None:
    size, forwards = split_batch(batch, micro, ranks)
    assert (size, forwards) == expected
    assert size * forwards * ranks == batch


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(32, 5, 1), (33, 8, 2), (1, 1, 2)])
def test_batches_that_do_not_divide_are_refused(batch: int, micro: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"batch_size \({batch}\)"):
        split_batch(batch, micro, ranks)


def test_arguments_are_ones_transformers_knows(tmp_path: Path) -> None:
    given = arguments(SFTSection(), TrainerSection(ranks=2), BaseModelSection(base="x"), seed=3, folder=tmp_path)
    made = TrainingArguments(**{name: value for name, value in given.items() if name != "pad_to_multiple_of"})
    assert (made.train_batch_size, made.seed, made.report_to, made.bf16) == (16, 3, [], False)


def test_metrics_come_out_under_our_names(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    callback = MetricsCallback("sft", lambda step, metrics: seen.append((step, metrics)))
    state, args = TrainerState(global_step=4), TrainingArguments(output_dir=str(tmp_path), report_to="none")
    callback.on_log(args, state, TrainerControl(), {"loss": 1.5, "epoch": 1.0, "learning_rate": 0.1})
    callback.on_log(args, state, TrainerControl(), {"train_runtime": 3.0})
    assert seen == [(4, {"sft/loss": 1.5, "sft/lr": 0.1})]
    with pytest.raises(FloatingPointError, match="sft/loss not finite at step 4"):
        callback.on_log(args, state, TrainerControl(), {"loss": float("nan")})
