"""The Ray Train group of a stage before PPO: N ranks run one function, their metrics reach the driver (layer 3).

Ray must be initialised; nothing here starts or stops it, so that several stages share one instance. Rank 0 appends a
line a step to `metrics.jsonl` (run folders lie on storage that driver and ranks share); the driver follows that file.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import transformers

from r3hf_ray.actors.train_group import train_group
from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.models.folder import absolute
from r3hf_ray.training.reward_model import train_on_groups, train_on_pairs
from r3hf_ray.training.sft import train_policy
from r3hf_ray.types import Example, Pair, RankedGroup

LoggedRow = dict[str, Any]
StageRows = Sequence[Example] | Sequence[Pair] | Sequence[RankedGroup]
_POLL_SECONDS = 0.2


def fit_stage(
    config: SFTConfig | RewardConfig,
    rows: StageRows,
    heldout: StageRows,
    *,
    folder: Path,
    attempt: int,
    on_row: Callable[[LoggedRow], None],
) -> None:
    """Train on `config.trainer.ranks` ranks; leaves `folder/model` and rows in `folder/metrics.jsonl`.

    Args:
        config: what each rank reads.
        rows: to train on: examples of `r3hf sft`, or pairs or ranked groups of `r3hf reward`.
        heldout: evaluation rows of the same kind; may be empty.
        folder: the run's folder, absolute.
        attempt: stands in each row; 1 more at each restart of the run.
        on_row: called in this process with each row as it appears.

    Raises:
        RunFailed: a rank failed.
    """
    base = config.model.model_copy(update={"base": absolute(config.model.base)})
    settings = {
        "config": config.model_copy(update={"model": base}),
        "data": [ray.put(list(part)) for part in (rows, heldout)],
        "folder": folder,
        "attempt": attempt,
    }
    group = train_group(_rank, settings, config.trainer, folder)
    seen = _new_rows(folder / "metrics.jsonl")
    group.start()
    while group.is_alive():
        group.join(_POLL_SECONDS)
        for row in next(seen):
            on_row(row)
    if group.error:
        stage = "sft" if isinstance(config, SFTConfig) else "reward"
        raise RunFailed(f"{stage} failed: {_cause(group.error)}") from group.error


def _rank(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each rank. `report` is never called: it would cost a poll and nothing needs it."""
    config, folder = settings["config"], settings["folder"]
    torch.set_num_threads(config.trainer.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, heldout = ray.get(settings["data"])
    if isinstance(config, SFTConfig):
        train: Callable[..., None] = train_policy
    else:
        train = train_on_pairs if isinstance(rows[0], Pair) else train_on_groups
    train(config, rows, heldout, folder=folder / "model", on_metrics=partial(_append, folder, settings["attempt"]))


def _append(folder: Path, attempt: int, step: int, metrics: dict[str, float]) -> None:
    row = {"train/global_step": step, "attempt": attempt, "time": time.time(), **metrics}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


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
