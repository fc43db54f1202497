"""`r3hf sft` and `r3hf reward`: from a configuration to a trained model folder (layer 4).

Everything that can be wrong with settings, data or the base model is found before a Ray actor starts. Ray must be
initialised: several stages and PPO can share one instance.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3hf_ray.actors.supervised import fit_stage
from r3hf_ray.config import RewardConfig, SFTConfig
from r3hf_ray.data.loading import Loaded, Report, is_ranked, load_examples, load_groups, load_pairs
from r3hf_ray.models.chat_format import save_format
from r3hf_ray.models.finished import require_finished, what_is_missing
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.lease import hold, new_lease
from r3hf_ray.records.metrics import read_metrics
from r3hf_ray.records.provenance import redacted, versions
from r3hf_ray.records.run_folder import STAGE_MAY_CHANGE, STAGE_MAY_MOVE, check_run, open_run
from r3hf_ray.records.tensorboard import TensorBoardLog
from r3hf_ray.records.wandb_run import WandbRun
from r3hf_ray.session import driver_facts, job_ended
from r3hf_ray.training.trl_settings import split_batch

LoggedRow = Mapping[str, Any]
StageConfig = SFTConfig | RewardConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """A finished stage.

    Example: ``StageResult(folder=Path("runs/toy_sft"), model=Path("runs/toy_sft/model"), seconds=31.0, ...)``
    """

    folder: Path
    model: Path
    """A plain Hugging Face folder."""
    metrics: dict[str, float]
    """The last value of every metric."""
    report: Report | None
    """What was read and left out; None when the stage had been finished before."""
    seconds: float


def train_sft(
    config: SFTConfig,
    *,
    resume: bool = False,
    on_row: Callable[[LoggedRow], None] = lambda row: None,
    note: Callable[[str], None] = lambda text: None,
) -> StageResult:
    """Fine-tune a base model on answers: `runs/<name>/{config.toml,metrics.jsonl,events.jsonl,model/}`.

    Args:
        config: the command's settings.
        resume: take up an existing run folder: nothing is done if its model is there, else the stage starts again,
            with other settings if they are.
        on_row: called with each row of metrics as it appears, for a display.
        note: called with one line to show: what the data held, a tracker that failed.

    Raises:
        ConfigError: settings, data or base model cannot be used, or the finished stage that is to be taken up was
            started with other settings; no actor was started.
        RunFailed: training failed, or left no model that loads.
    """
    base = ModelFolder(config.model.base, "base model")
    base.require_language_model()
    return _train(config, base, load_examples, resume=resume, on_row=on_row, note=note)


def train_reward(
    config: RewardConfig,
    *,
    resume: bool = False,
    on_row: Callable[[LoggedRow], None] = lambda row: None,
    note: Callable[[str], None] = lambda text: None,
) -> StageResult:
    """Train a reward model on preferences; as `train_sft`, with `model/r3hf_format.json` beside the weights."""
    base = ModelFolder(config.model.base, "base model")
    load = load_groups if is_ranked(config.data) else load_pairs
    result = _train(config, base, load, resume=resume, on_row=on_row, note=note)
    save_format(base.chat.form, result.model)
    return result


def _train(
    config: StageConfig,
    base: ModelFolder,
    load: Callable[..., Loaded[Any]],
    *,
    resume: bool,
    on_row: Callable[[LoggedRow], None],
    note: Callable[[str], None],
) -> StageResult:
    started = time.monotonic()
    section = config.sft if isinstance(config, SFTConfig) else config.reward_training
    split_batch(section.batch_size, section.microbatch_size, config.trainer.ranks)
    if resume and (finished := _finished(config)):
        return finished
    data = load(config.data, base.tokenizer, max_tokens=section.max_tokens)
    folder = check_run(config, config.run, resume=resume)
    lease = new_lease(**driver_facts())
    with (
        hold(folder, lease, ended=lambda other: job_ended(other.job, other.session)),
        _Records(config, data, resume=resume, on_row=on_row, note=note) as records,
    ):
        fit_stage(
            config, data.train, data.heldout, folder=records.folder, attempt=records.attempt, on_row=records.on_row
        )
        require_finished(records.folder / "model")
    return _result(records.folder, data.report, started)


class _Records:
    """The run's folder and trackers while a stage runs; events say what it read and how it ended."""

    def __init__(
        self,
        config: StageConfig,
        data: Loaded[Any],
        *,
        resume: bool,
        on_row: Callable[[LoggedRow], None],
        note: Callable[[str], None],
    ) -> None:
        self.folder, self.attempt = open_run(config, config.run, resume=resume)
        settings = config.model_dump(mode="json")
        self._show = on_row
        self._events = JsonlLog(self.folder / "events.jsonl")
        self._wandb = WandbRun(self.folder, config.tracking, name=config.run.name, config=redacted(settings), warn=note)
        self._tensorboard = TensorBoardLog(self.folder, on=config.tracking.tensorboard, warn=note)
        note(str(data.report))
        counts = {"train": len(data.train), "heldout": len(data.heldout)}
        self._events.write({"event": "started", "versions": versions(), "data": str(data.report), **counts})

    def on_row(self, row: LoggedRow) -> None:
        self._wandb.log(row)
        self._tensorboard.log(row)
        self._show(row)

    def __enter__(self) -> "_Records":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        failure = {"reason": str(error) or kind.__name__} if kind else {}
        self._events.write({"event": "failure" if kind else "finished", **failure})
        self._events.close()
        self._wandb.finish(failed=kind is not None)
        self._tensorboard.finish()


def _finished(config: StageConfig) -> StageResult | None:
    if what_is_missing(config.run.folder / config.run.name / "model"):
        return None
    folder = check_run(config, config.run, resume=True, may_change=STAGE_MAY_CHANGE, may_move=STAGE_MAY_MOVE)
    return _result(folder, None, time.monotonic())


def _result(folder: Path, report: Report | None, started: float) -> StageResult:
    metrics: dict[str, float] = {}
    for row in read_metrics(folder):
        metrics.update(row)
    return StageResult(
        folder=folder, model=folder / "model", metrics=metrics, report=report, seconds=time.monotonic() - started
    )
