"""Naive uses of token rewards without a critic blow up in length; what is offered must not, over a whole run."""

from pathlib import Path

import pytest
from rich.console import Console

from r3hf_ray.comparison.run import compare, plan_runs
from r3hf_ray.comparison.settings import CompareConfig
from r3hf_ray.config import load
from r3hf_ray.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ALGORITHMS = ("rloo", "grpo", "reinforce-pp", "r3hf-baseline")
LENGTH = "eval/heldout/response_length/mean"


@pytest.mark.ray
@pytest.mark.slow
def test_lengths_stay_within_30_percent_over_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(CompareConfig, ROOT / "jobs/screen_algorithms.toml", ["--run.folder", str(tmp_path)])
    assert config.toy is not None
    smaller = {"max_response_tokens": 24, "sft_rows": 8000, "heldout_prompts": 128, "groups": 600, "heldout_pairs": 50}
    config = config.model_copy(update={"toy": config.toy.model_copy(update=smaller)})
    assert compare(config, only=ALGORITHMS, report_only=False, console=Console(quiet=True)) == 0
    for run in plan_runs(config):
        if run.arm not in ALGORITHMS:
            continue
        assert run.config.reward.mode == "r3hf"
        rows = [row for row in read_metrics(run.folder) if LENGTH in row]
        assert [row["train/global_step"] for row in rows] == [0, 60]
        start, end = (row[LENGTH] for row in rows)
        assert abs(end / start - 1.0) <= 0.3, f"{run.arm}: {start:.1f} to {end:.1f} tokens"
        assert rows[1]["eval/heldout/gold/mean"] > rows[0]["eval/heldout/gold/mean"] + 0.3, f"{run.arm} learned nothing"
