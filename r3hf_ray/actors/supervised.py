"""The Ray Train group of a stage before PPO: N ranks run one function, their metrics reach the driver (layer 3).

Ray must be initialised; nothing here starts or stops it, so that several stages share one instance. Rank 0 appends a
line a step to `metrics.jsonl` (run folders lie on storage that driver and ranks share); the driver follows that file.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
import transformers

from r3hf_ray.actors.fleet import train_group
from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.models.folder import absolute
from r3hf_ray.sections.actors import TrainerSection
from r3hf_ray.training.reward_model import train_on_groups, train_on_pairs
from r3hf_ray.training.sft import train_policy
from r3hf_ray.types import Example, Pair, RankedGroup

LoggedRow = dict[str, Any]
StageConfig = TypeVar("StageConfig", SFTConfig, RewardConfig)
_POLL_SECONDS = 0.2


def fit_policy(
    config: SFTConfig,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    *,
    folder: Path,
    attempt: int,
    on_row: Callable[[LoggedRow], None],
) -> None:
    """Supervised fine-tuning on `config.trainer.ranks` ranks; leaves `folder/model` and rows in `folder/metrics.jsonl`.

    Args:
        config: what each rank reads.
        examples: training rows.
        heldout: evaluation rows; may be empty.
        folder: the run's folder, absolute.
        attempt: stands in each row; 1 more at each restart of the run.
        on_row: called in this process with each row as it appears.

    Raises:
        RunFailed: a rank failed.
    """
    run = partial(_fit_policy_rank, _with_absolute_base(config), folder=folder, attempt=attempt)
    _fit("sft", run, (examples, heldout), config.trainer, folder, on_row)


def fit_reward_model(
    config: RewardConfig,
    rows: Sequence[Pair] | Sequence[RankedGroup],
    heldout: Sequence[Pair] | Sequence[RankedGroup],
    *,
    folder: Path,
    attempt: int,
    on_row: Callable[[LoggedRow], None],
) -> None:
    """Bradley-Terry training on pairs or ranked groups; as `fit_policy`."""
    run = partial(_fit_reward_rank, _with_absolute_base(config), folder=folder, attempt=attempt)
    _fit("reward", run, (rows, heldout), config.trainer, folder, on_row)


def _with_absolute_base(config: StageConfig) -> StageConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"base": absolute(config.model.base)})})


def _fit_policy_rank(
    config: SFTConfig, examples: list[Example], heldout: list[Example], *, folder: Path, attempt: int
) -> None:
    train_policy(config, examples, heldout, folder=folder / "model", on_metrics=partial(_append, folder, attempt))


def _fit_reward_rank(
    config: RewardConfig,
    rows: list[Pair] | list[RankedGroup],
    heldout: list[Pair] | list[RankedGroup],
    *,
    folder: Path,
    attempt: int,
) -> None:
    pairs, groups = [r for r in rows if isinstance(r, Pair)], [r for r in rows if isinstance(r, RankedGroup)]
    on_metrics = partial(_append, folder, attempt)
    if pairs:
        kept = [r for r in heldout if isinstance(r, Pair)]
        train_on_pairs(config, pairs, kept, folder=folder / "model", on_metrics=on_metrics)
    else:
        ranked = [r for r in heldout if isinstance(r, RankedGroup)]
        train_on_groups(config, groups, ranked, folder=folder / "model", on_metrics=on_metrics)


def _append(folder: Path, attempt: int, step: int, metrics: dict[str, float]) -> None:
    row = {"train/global_step": step, "attempt": attempt, "time": time.time(), **metrics}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _fit(
    stage: str,
    run: Callable[..., None],
    data: tuple[Sequence[Any], Sequence[Any]],
    trainer: TrainerSection,
    folder: Path,
    on_row: Callable[[LoggedRow], None],
) -> None:
    """Run the group and follow its metrics here."""
    settings = {"run": run, "threads": trainer.threads, "data": [ray.put(list(part)) for part in data]}
    group = train_group(_rank, settings, trainer, folder)
    rows = _new_rows(folder / "metrics.jsonl")
    group.start()
    while group.is_alive():
        group.join(_POLL_SECONDS)
        for row in next(rows):
            on_row(row)
    if group.error:
        raise RunFailed(f"{stage} failed: {_cause(group.error)}") from group.error


def _rank(loop: dict[str, Any]) -> None:
    """What Ray Train runs on each rank. `report` is never called: it would cost a poll and nothing needs it."""
    torch.set_num_threads(loop["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    loop["run"](*ray.get(loop["data"]))


def _new_rows(path: Path) -> Iterator[list[LoggedRow]]:
    """Each turn: the whole lines appended since the last one; what was there at the start is left out."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        lines: list[LoggedRow] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            position += len(whole)
            lines = [json.loads(line) for line in whole.splitlines()]
        yield lines


def _cause(error: BaseException) -> str:
    """The first rank's own error in one sentence."""
    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).splitlines() if line.strip()]
        return f"rank {rank}: {lines[-1].strip()}" if lines else f"rank {rank}: {failure!r}"
    return sentence_of(error)
