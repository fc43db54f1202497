import json
import math
import re

import numpy as np
import pytest

from r3hf_ray.errors import ConfigError
from r3hf_ray.records.jsonl import JsonlLog, read_jsonl
from r3hf_ray.records.metrics import METRICS, describe, next_attempt, read_metrics


def step_row(step, attempt=0, **values):
    return {"train/global_step": step, "attempt": attempt, "time": 1.0} | values


def test_rows_come_back_as_written(tmp_path):
    rows = [step_row(1, loss=0.1), step_row(2, loss=-3.5e-7)]
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        assert [log.write(row) for row in rows] == rows
    assert read_jsonl(tmp_path / "metrics.jsonl") == rows


def test_a_row_is_on_disk_before_the_log_is_closed(tmp_path):
    log = JsonlLog(tmp_path / "events.jsonl")
    log.write({"event": "started", "path": tmp_path, "count": np.int64(3)})
    (row,) = read_jsonl(tmp_path / "events.jsonl")
    assert row["path"] == str(tmp_path) and row["count"] == 3 and row["time"] > 1e9
    log.close()


def test_a_torn_last_line_is_left_out_and_mended_by_the_next_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/global_step": 1, "a": 1.0}\n{"train/global_step": 2, "a"')
    assert [row["train/global_step"] for row in read_jsonl(path)] == [1]
    with JsonlLog(path) as log:
        log.write(step_row(2, a=5.0))
    assert [row["a"] for row in read_jsonl(path)] == [1.0, 5.0]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/global_step": 1, "a": 1.0}')
    with JsonlLog(path) as log:
        log.write(step_row(2, a=5.0))
    assert [row["a"] for row in read_jsonl(path)] == [1.0, 5.0]


def test_a_damaged_line_inside_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ConfigError, match=re.escape("metrics.jsonl:2: is no JSON object; remove the line")):
        read_jsonl(path)


def test_the_last_attempt_of_a_step_replaces_earlier_ones(tmp_path):
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(step_row(1, loss=1.0))
        log.write(step_row(2, loss=2.0, only_before=1.0))
        log.write(step_row(2, attempt=1, loss=20.0))
        log.write(step_row(3, attempt=1, loss=30.0))
    rows = read_metrics(tmp_path)
    assert [(row["train/global_step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 20.0), (3, 30.0)]
    assert "only_before" not in rows[1]


def test_training_and_evaluation_rows_of_one_attempt_are_merged(tmp_path):
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(step_row(1, loss=1.0))
        log.write(step_row(1, gold=4.0))
    (row,) = read_metrics(tmp_path)
    assert (row["loss"], row["gold"]) == (1.0, 4.0)


def test_an_evaluation_done_again_after_a_restart_keeps_the_training_row(tmp_path):
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(step_row(2, loss=1.0))
        log.write(step_row(2, attempt=1, **{"eval/heldout/score/mean": 4.0}))
    (row,) = read_metrics(tmp_path)
    assert (row["loss"], row["eval/heldout/score/mean"]) == (1.0, 4.0)


def test_numbers_that_are_not_finite_are_null_on_disk_and_nan_when_read(tmp_path):
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(step_row(1, a=math.nan, b=math.inf, c=np.float32("nan")))
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(tmp_path)
    assert all(math.isnan(row[name]) for name in "abc")


def test_next_attempt_counts_on(tmp_path):
    assert next_attempt(tmp_path) == 0
    with JsonlLog(tmp_path / "metrics.jsonl") as log:
        log.write(step_row(1, attempt=2))
    assert next_attempt(tmp_path) == 3


def test_every_metric_is_explained():
    assert all(metric.meaning.endswith(".") for metric in METRICS.values())


def test_metrics_of_a_further_model_are_explained_by_its_name():
    assert describe("kl/ref/mean") is METRICS["kl/ref/mean"]
    for name in ("reward/brevity/score/mean", "reward/brevity/score/std", "eval/heldout/brevity/score/mean"):
        metric = describe(name)
        assert metric.unit == "score" and "brevity" in metric.meaning and metric.meaning.endswith(".")
    assert describe("eval/heldout/cost/score/mean") is METRICS["eval/heldout/cost/score/mean"]
    assert "catalogue" in describe("reward/brevity/other").meaning
