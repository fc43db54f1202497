"""TensorBoard beside wandb: every number of `metrics.jsonl` over the step, in `RUN/tensorboard` (layer 4)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from r3hf_ray.records.metrics import STEP


class TensorBoardLog:
    """Writes scalars where `tracking.tensorboard` is on; the first failure is reported and switches it off."""

    def __init__(self, folder: Path, *, on: bool, warn: Callable[[str], None]) -> None:
        """Of a run's folder."""
        self._warn = warn
        self._writer: SummaryWriter | None = None
        if on:
            self._guarded(lambda: SummaryWriter(str(folder / "tensorboard")))

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row of `metrics.jsonl`."""
        if (writer := self._writer) is not None:
            numbers = {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}
            step = int(numbers.pop(STEP))

            def write() -> SummaryWriter:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step, walltime=row.get("time"))
                writer.flush()
                return writer

            self._guarded(write)

    def finish(self) -> None:
        """Close the file; later calls do nothing."""
        if (writer := self._writer) is not None:
            self._guarded(lambda: writer.close())
            self._writer = None

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            self._writer = action()
        except (OSError, ValueError) as error:
            self._writer = None
            self._warn(
                f"tensorboard failed and is off for the rest of this run: {error}; metrics.jsonl has every metric"
            )
