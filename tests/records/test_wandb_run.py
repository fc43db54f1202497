import os
import subprocess
import sys

import pytest
import wandb

from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.wandb_run import WandbRun, coloured_tokens, resolve_mode
from r3hf_ray.sections.runs import TrackingSection

PROGRAM = """
import json, sys
from pathlib import Path
from r3hf_ray.sections.runs import TrackingSection
from r3hf_ray.records.metrics import read_jsonl
from r3hf_ray.records.samples import read_samples
from r3hf_ray.records.wandb_run import WandbRun

folder = Path(sys.argv[1])
config = {"ppo": {"steps": 6}, "hf_token": "hunter2"}
run = WandbRun(folder, TrackingSection(wandb="offline"), name="toy", config=config, warn=sys.exit)
for row in read_jsonl(folder / "metrics.jsonl"):
    run.log(row)
run.log_samples(6, read_samples(folder, 6))
run.finish()
"""


@pytest.fixture
def wandb_env(tmp_path, monkeypatch):
    """Nothing of the user's wandb is read or written."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    return tmp_path


def run_program(folder):
    # A process of its own: the file is complete only when wandb's service has ended.
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True, timeout=120, env=os.environ)


@pytest.mark.slow
def test_the_offline_file_equals_metrics_jsonl(wandb_env, make_run, wandb_history):
    folder = make_run(wandb_env / "toy")
    run_program(folder)
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    *logged, table = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_history(file)]
    assert logged == read_jsonl(folder / "metrics.jsonl")
    assert table["train/global_step"] == 6
    assert any("samples" in key for key in table)
    assert list(file.parent.glob("files/media/table/**/*.table.json"))
    assert b"hunter2" not in b"".join(path.read_bytes() for path in file.parent.rglob("*") if path.is_file())

    run_program(folder)
    names = {path.name for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")}
    assert names == {f"run-{(folder / 'wandb_id').read_text().strip()}.wandb"}


def test_auto_is_offline_without_a_key_or_without_a_network(wandb_env, monkeypatch):
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("online") == "online"


def test_a_failing_tracker_warns_once_and_is_off(wandb_env, monkeypatch):
    class Broken(wandb.Run):
        def __init__(self): ...

        def log(self, row):
            raise wandb.errors.CommError("service gone")

        def define_metric(self, *names, **settings): ...

    monkeypatch.setattr(wandb, "init", lambda **settings: Broken())
    warnings = []
    run = WandbRun(wandb_env / "toy", TrackingSection(wandb="offline"), name="toy", config={}, warn=warnings.append)
    for step in range(3):
        run.log({"train/global_step": step})
    run.finish()
    (warning,) = warnings
    assert warning.startswith("wandb failed and is off for the rest of this run: service gone")


def test_a_tracker_that_does_not_start_online_goes_on_offline(wandb_env, monkeypatch):
    modes = []

    def init(**settings):
        modes.append(settings["mode"])
        raise wandb.errors.CommError("refused")

    monkeypatch.setattr(wandb, "init", init)
    warnings = []
    run = WandbRun(wandb_env / "toy", TrackingSection(wandb="online"), name="toy", config={}, warn=warnings.append)
    run.log({"a": 1.0})
    assert modes == ["online", "offline"] and len(warnings) == 2


def test_disabled_leaves_no_trace(wandb_env):
    WandbRun(wandb_env / "toy", TrackingSection(wandb="disabled"), name="toy", config={}, warn=pytest.fail).finish()
    assert not (wandb_env / "toy").exists()


def test_coloured_tokens_are_escaped(token_rows):
    page = coloured_tokens(token_rows(1, ("<script>alert(1)</script>", "x"))[:2])
    assert "<script>" not in page and "&lt;script&gt;" in page
