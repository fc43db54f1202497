"""Naive uses of token rewards without a critic blow up in length; what is offered must not, over a whole run."""

import statistics
from pathlib import Path

import pytest
from rich.console import Console

from r3hf_ray.instruments.compare.comparison import compare, plan_runs
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.records.metrics import read_metrics
from r3hf_ray.settings import load

ROOT = Path(__file__).parents[3]
ALGORITHMS = ("rloo", "grpo", "reinforce-pp", "r3hf-baseline")
"""The last two are one run, as long as advantages are whitened."""
LENGTH = "eval/heldout/response_length/mean"


@pytest.mark.ray
@pytest.mark.slow
def test_lengths_stay_within_30_percent_over_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Fewer groups make a reward model that is soon exploited, by short answers among others: not what is asked here.
    config = load(CompareConfig, ROOT / "jobs/screen_algorithms.toml", ["--run.folder", str(tmp_path)])
    assert config.toy is not None
    smaller = {"max_response_tokens": 24, "sft_rows": 8000, "heldout_prompts": 128, "groups": 2000, "heldout_pairs": 50}
    often = (*config.compare.overrides, "--evaluation.every", "10", "--evaluation.prompts", "128")
    changed = {
        "toy": config.toy.model_copy(update=smaller),
        "compare": config.compare.model_copy(update={"overrides": often}),
    }
    config = config.model_copy(update=changed)
    assert compare(config, only=ALGORITHMS, report_only=False, console=Console(quiet=True)) == 0
    for run in plan_runs(config):
        if run.arm not in ALGORITHMS:
            continue
        assert run.config.reward.mode == "r3hf"
        rows = [row for row in read_metrics(run.folder) if LENGTH in row]
        assert [row["train/global_step"] for row in rows] == [0, 10, 20, 30, 40, 50, 60]
        lengths, ended = [row[LENGTH] for row in rows], [row["eval/heldout/eos_frac"] for row in rows]
        drifts = [length / lengths[0] - 1.0 for length in lengths[1:]]
        # Single evaluations may dip while a policy learns to end its answers; none may grow, nor the run be short.
        assert max(drifts) <= 0.3, f"{run.arm}: {lengths} tokens"
        assert abs(drifts[-1]) <= 0.3 and abs(sum(drifts) / len(drifts)) <= 0.3, f"{run.arm}: {lengths} tokens"
        assert min(ended) >= ended[0] - 0.1, f"{run.arm}: {ended} ended"  # how a blow-up shows where length is capped
        golds = [row["eval/heldout/gold/mean"] for row in rows]
        assert statistics.median(golds[-3:]) > golds[0] + 0.3, f"{run.arm} learned nothing: {golds}"
