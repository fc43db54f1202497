"""`tracking.tensorboard`: what its own file says when it is read back."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from r3hf_ray.records.tensorboard import TensorBoardLog


def events(folder: Path) -> Iterator[Event]:
    """Records of an event file: length, its checksum, the event, its checksum."""
    [path] = folder.glob("tensorboard/events.out.tfevents.*")
    content, at = path.read_bytes(), 0
    while at < len(content):
        [length] = struct.unpack("<Q", content[at : at + 8])
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_every_number_is_there_over_the_step(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, on=True, warn=refuse)
    for step in (1, 2):
        row = {"train/global_step": step, "attempt": 0, "time": 1e9 + step, "kl/ref/mean": 0.25 * step, "x/none": None}
        log.log(row)
    log.finish()
    log.finish()
    found = [
        (event.step, value.tag, value.simple_value, event.wall_time)
        for event in events(tmp_path)
        for value in event.summary.value
    ]
    assert found == [(1, "kl/ref/mean", 0.25, 1e9 + 1), (2, "kl/ref/mean", 0.5, 1e9 + 2)]


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, on=False, warn=refuse)
    log.log({"train/global_step": 1, "kl/ref/mean": 0.25})
    log.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_it_cannot_write_stops_nothing_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    log = TensorBoardLog(tmp_path, on=True, warn=said.append)
    log.log({"train/global_step": 1, "kl/ref/mean": 0.25})
    log.finish()
    [sentence] = said
    assert sentence.startswith("tensorboard failed and is off") and "metrics.jsonl" in sentence
