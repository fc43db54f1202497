"""A comparison of runs that the test writes itself: what is run, what is read, what the page and the table say."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from r3hf_ray import cli
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError, RunFailed
from r3hf_ray.instruments.compare import comparison
from r3hf_ray.instruments.compare.arm_runs import PlannedRun
from r3hf_ray.instruments.compare.baselines import lacking
from r3hf_ray.instruments.compare.comparison import compare, plan_runs, read_runs
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.run_folder import to_toml
from r3hf_ray.settings import load

STEPS = 10
JOB = """
[run]
name = "shared"
[model]
policy = "some/policy"
reward_model = "some/reward"
[data]
source = "prompts.jsonl"
[reward]
gold = "some.module:gold"
[ppo]
steps = 10
"""
COMPARISON = """
[run]
name = "small"
[compare]
job = "job.toml"
seeds = [0]
baseline = "sparse"
threshold = 2.0
window = 2
equal_kl = 5.0
[[arms]]
name = "sparse"
seeds = [0, 1]
overrides = ["--reward.mode", "terminal", "--critic.init", "sft"]
[[arms]]
name = "dense"
seeds = [0, 1]
overrides = ["--critic.init", "sft"]
[[arms]]
name = "uniform"
group = "controls"
overrides = ["--reward.mode", "uniform"]
[[bars]]
arm = "dense"
against = "sparse"
measure = "samples"
bound = 0.75
[[bars]]
arm = "dense"
against = "sparse"
measure = "level"
bound = 0.15
[[bars]]
arm = "dense"
against = "sparse"
measure = "gold"
bound = 0.2
[[bars]]
arm = "uniform"
against = "sparse"
measure = "gold"
bound = 0.2
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareConfig:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    Path("compare.toml").write_text(COMPARISON)
    return load(CompareConfig, Path("compare.toml"), [])


def write_run(run: PlannedRun, *, slope: float, final: float, end: str = "finished") -> None:
    """Gold is `slope` a step and KL one nat a step; `end` is the last event."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.toml").write_text(to_toml(run.config))
    with JsonlLog(run.folder / "metrics.jsonl") as metrics:
        metrics.write({"train/global_step": 0, "attempt": 0, "eval/heldout/gold/mean": 0.5})
        for step in range(1, STEPS + 1):
            row = {"reward/gold/mean": slope * step, "kl/ref/mean": float(step)}
            metrics.write({"train/global_step": step, "attempt": 0, **row})
        last = {"gold/mean": final, "gold/sem": 0.07, "response_length/mean": 40.0, "eos_frac": 0.9}
        metrics.write({"train/global_step": STEPS, "attempt": 0} | {f"eval/heldout/{k}": v for k, v in last.items()})
    with JsonlLog(run.folder / "events.jsonl") as events:
        events.write({"event": end, "step": STEPS, "reason": "out of <memory> | again"})


def write_all(config: CompareConfig) -> list[PlannedRun]:
    """Dense is twice as fast as sparse and ends the same; uniform fails."""
    plan = plan_runs(config)
    slopes = {"sparse": 0.4, "dense": 0.8, "uniform": 0.1}
    for run in plan:
        end = "failure" if run.arm == "uniform" else "finished"
        write_run(run, slope=slopes[run.arm], final=4.0 + 0.1 * run.seed, end=end)
    return plan


def quiet() -> Console:
    return Console(quiet=True)


def test_plan_has_every_arm_of_a_seed_before_the_next_seed(config: CompareConfig) -> None:
    plan = plan_runs(config)
    assert [run.folder.name for run in plan] == ["sparse-s0", "dense-s0", "uniform-s0", "sparse-s1", "dense-s1"]
    assert [run.config.run.seed for run in plan] == [0, 0, 0, 1, 1]
    assert [run.config.reward.mode for run in plan[:3]] == ["terminal", "r3hf", "uniform"]
    assert {run.folder.parent for run in plan} == {Path("runs/small").resolve()}


def test_toy_models_are_shared_and_the_length_goes_with_the_judge(config: CompareConfig) -> None:
    dense = 'name = "dense"\nseeds = [0, 1]\noverrides = ["--critic.'
    arms = COMPARISON.replace(dense + 'init", "sft"]', dense + 'source", "{folder}/second/model"]')
    Path("toy.toml").write_text(arms + "\n[toy]\nmax_response_tokens = 96\n")
    plan = plan_runs(load(CompareConfig, Path("toy.toml"), []))
    root = Path("runs/small").resolve()
    assert {run.config.model.policy for run in plan} == {str(root / "sft/model")}
    assert {run.config.model.reward_model for run in plan} == {str(root / "reward/model")}
    assert plan[1].config.critic.source == str(root / "second/model")
    assert {run.config.rollout.max_response_tokens for run in plan} == {96}
    assert {run.config.reward.gold for run in plan} == {"r3hf_ray.instruments.toy.language:gold_reward_96"}
    assert {run.config.reward.gold_credit for run in plan} == {"r3hf_ray.instruments.toy.language:token_credit_96"}


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ('baseline = "sparse"', 'baseline = "spares"', "no arm is called spares"),
        ('name = "dense"', 'name = "sparse"', "two arms are called sparse"),
        ('"--reward.mode", "uniform"', '"--run.seed", "3"', "cannot set run"),
        ('"--reward.mode", "uniform"', '"--reward.mode", "unifrom"', "arm uniform: .*unifrom"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"each seed once: 1 is there again"),
        ("threshold", 'judge = "helpful"\nthreshold', r"arm sparse: compare.judge = helpful must be one of \[\[model"),
        ('"--reward.mode", "uniform"', '"--reward.gold", "None"', "arm uniform: nothing tells the arms apart"),
        ("threshold", "in_process = 1\nthreshold", r"arm sparse: compare.in_process: learner.ranks cannot be had"),
        ("[compare]", "[toy]\nreward_models = [{name = 'sft'}]\n[compare]", "not world, sft or reward; change sft"),
    ],
)
def test_wrong_settings_are_one_sentence(config: CompareConfig, wrong: str, right: str, sentence: str) -> None:
    Path("wrong.toml").write_text(COMPARISON.replace(wrong, right))
    with pytest.raises(ConfigError, match=sentence):
        plan_runs(load(CompareConfig, Path("wrong.toml"), []))


def test_a_record_is_what_the_folder_says(config: CompareConfig) -> None:
    plan = write_all(config)
    sparse, dense, uniform, *_ = read_runs(config, plan)
    assert sparse.status == "finished" and sparse.samples == tuple(32 * step for step in range(1, 11))
    assert (sparse.reached.at, sparse.reached.of) == (192, 320)  # steps 5 and 6: (2.0 + 2.4) / 2
    assert dense.reached.at == 96  # steps 2 and 3: (1.6 + 2.4) / 2
    assert (dense.final_gold, dense.final_sem, dense.final_length, dense.final_eos) == (4.0, 0.07, 40.0, 0.9)
    assert dense.final_kl == 8.0 and dense.mean_gold == pytest.approx(4.4)
    assert dense.gold_at_kl == pytest.approx(4.0)  # steps 4, 5, 6
    assert uniform.status == "failed" and uniform.reason.startswith("out of") and uniform.reached.at is None


def test_a_run_that_stopped_early_or_never_began_is_not_finished(config: CompareConfig) -> None:
    plan = plan_runs(config)
    write_run(plan[0], slope=1.0, final=4.0, end="checkpoint")
    write_run(plan[1], slope=1.0, final=4.0)
    longer = load(CompareConfig, Path("compare.toml"), ["--compare.overrides", '["--ppo.steps", "20"]'])
    assert [record.status for record in read_runs(config, plan)][:3] == ["unfinished", "finished", "not run"]
    assert read_runs(longer, plan_runs(longer))[1].status == "unfinished"


def test_page_table_and_numbers_say_the_same(config: CompareConfig) -> None:
    write_all(config)
    assert compare(config, only=[], report_only=True, console=quiet()) == 0
    page, table = (Path(f"runs/small/comparison.{kind}").read_text() for kind in ("html", "md"))
    numbers = json.loads(Path("runs/small/comparison.json").read_text())

    assert "| sparse | 2 of 2 | 192 | baseline | 4.05 ± 0.07 | 0.05 |" in table
    assert "| dense | 2 of 2 | 96 | 0.50 | 4.05 ± 0.07 | 0.05 | 4.00 | 4.40 | 8.0 | 40.0 | 0.90 |" in table
    assert "| uniform | 0 of 1 | – | – | – |" in table
    assert r"out of <memory> \| again" in table
    assert "## Minus sparse, paired by seed" in table
    assert "| dense | +0.00 ± 0.00 (0 of 2) | +2.20 ± 0.00 (2 of 2) |" in table
    assert "| uniform | – | – |" in table
    verdicts = [line.split(":")[0] for line in table.splitlines() if line.startswith("- **")]
    assert verdicts == ["- **met**", "- **missed**", "- **met**", "- **not run**"]
    assert "seed 0 0.50, seed 1 0.50" in table

    assert [arm["samples"] for arm in numbers["arms"]] == [192.0, 96.0, None]
    assert [bar["verdict"] for bar in numbers["bars"]] == ["met", "missed", "met", "not run"]
    assert "4 of 5 runs of 3 arms are finished, 1 failed; of 4 expectations 3 can be judged and 2 are met." in page
    assert "out of &lt;memory&gt;" in page and "out of <memory>" not in page
    assert page.count("* plotly.js v") == 1 and "default-src 'none'" in page
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=", page)


def test_baselines_that_are_not_there_are_named(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config, only=[], report_only=True, console=quiet())
    page, table = (Path(f"runs/small/comparison.{kind}").read_text() for kind in ("html", "md"))
    for text in (page, table):
        assert "Not compared here: terminal, cold critic, lambda 1; terminal, reward model" in text
        assert "terminal, cold critic, lambda 0.95" not in text and "r3hf, cold critic, lambda 0.95" not in text
    monkeypatch.chdir(Path(__file__).parents[3])
    assert lacking(plan_runs(load(CompareConfig, Path("jobs/compare_toy.toml"), []))) == ""


def test_curves_have_bands_over_seeds_and_the_baseline_is_grey(config: CompareConfig) -> None:
    write_all(config)
    compare(config, only=[], report_only=True, console=quiet())
    page = Path("runs/small/comparison.html").read_text()
    data = json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    samples, kl = data["charts"][:2]
    sparse, dense = samples["series"]
    assert (sparse["label"], sparse["quiet"], dense["label"]) == ("sparse", True, "dense")
    assert dense["x"] == [32 * step for step in range(2, 11)]
    assert dense["y"] == pytest.approx([0.8 * (step - 0.5) for step in range(2, 11)])
    assert dense["low"] == dense["high"] == dense["y"]  # the seeds are alike here
    assert kl["series"][0]["x"] == [step + 0.5 for step in range(1, 10)]


def test_finished_runs_are_not_run_again_and_a_failure_does_not_stop_the_rest(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, bool]] = []

    def run_ppo(ppo: PPOConfig, *, resume: bool, console: Console) -> SimpleNamespace:
        ran.append((ppo.run.name, resume))
        arm, seed = ppo.run.name.split("-s")
        write_run(PlannedRun(arm=arm, seed=int(seed), config=ppo), slope=0.4, final=4.0)
        if ran == [("sparse-s0", False)]:
            (ppo.run.folder / ppo.run.name / "events.jsonl").unlink()
            raise RunFailed("a rank died")
        return SimpleNamespace(folder=ppo.run.folder / ppo.run.name)

    reported: list[Path] = []
    monkeypatch.setattr(comparison, "run_ppo", run_ppo)
    monkeypatch.setattr(comparison, "write_report", reported.append)
    monkeypatch.setattr(comparison, "ray_session", lambda cpus: nullcontext())
    assert compare(config, only=["sparse", "dense"], report_only=False, console=quiet()) == 1
    assert ran == [("sparse-s0", False), ("dense-s0", False), ("sparse-s1", False), ("dense-s1", False)]
    failed = read_runs(config, plan_runs(config))[0]
    assert (failed.status, failed.reason) == ("failed", "a rank died")
    ran.append(("next call", True))
    assert compare(config, only=[], report_only=False, console=quiet()) == 0
    assert ran[5:] == [("sparse-s0", True), ("uniform-s0", False)]
    assert compare(config, only=[], report_only=False, console=quiet()) == 0
    assert len(ran) == 7
    assert len(reported) == 5, "each run that finished has a report"


def test_a_finished_run_of_other_settings_is_refused(config: CompareConfig) -> None:
    write_all(config)
    changed = load(CompareConfig, Path("compare.toml"), ["--compare.overrides", '["--ppo.kl_coef", "0.1"]'])
    with pytest.raises(ConfigError, match=r"ppo\.kl_coef"):
        compare(changed, only=[], report_only=False, console=quiet())


def test_a_finished_run_of_another_kind_is_refused(config: CompareConfig) -> None:
    """Nothing in config.toml says how a run was run, with which schedule, or that it went further than asked."""
    write_all(config)
    one_rank = ["--compare.overrides", '["--learner.ranks", "1"]']
    for run in plan_runs(load(CompareConfig, Path("compare.toml"), one_rank)):
        (run.folder / "config.toml").write_text(to_toml(run.config))
    screened = load(CompareConfig, Path("compare.toml"), [*one_rank, "--compare.in_process", "1"])
    with pytest.raises(ConfigError, match="sparse-s0: was run by the system and is now to be screened"):
        compare(screened, only=["uniform"], report_only=True, console=quiet())
    for run in plan_runs(screened):
        with JsonlLog(run.folder / "events.jsonl") as events:
            events.write({"event": "started", "in_process": True, "schedules": ["ppo.gae_lambda=0.95:1"]})
    with pytest.raises(ConfigError, match=r"was screened with ppo.gae_lambda=0.95:1 and is now to be screened; set it"):
        compare(screened, only=[], report_only=True, console=quiet())
    shutil.rmtree("runs")
    write_all(config)
    shorter = load(CompareConfig, Path("compare.toml"), ["--compare.overrides", '["--ppo.steps", "5"]'])
    with pytest.raises(ConfigError, match=r"ppo\.steps: .*started with 10 and cannot go on with 5"):
        compare(shorter, only=[], report_only=True, console=quiet())


def test_what_auto_came_to_does_not_stop_the_next_call(config: CompareConfig) -> None:
    plan = plan_runs(load(CompareConfig, Path("compare.toml"), ["--compare.overrides", '["--critic.init", "sft"]']))
    write_run(plan[2], slope=0.4, final=4.0)
    assert plan_runs(config)[2].config.critic.init == "auto"
    assert compare(config, only=[], report_only=True, console=quiet()) == 0


def test_a_judge_is_called_by_its_name(config: CompareConfig) -> None:
    rewards = '[{"name": "helpful", "source": "some/judge", "weight": 0.0}]'
    judged = f"[compare]\njudge = 'helpful'\noverrides = ['--model.rewards', '{rewards}']"
    Path("judged.toml").write_text(COMPARISON.replace("[compare]", judged))
    assert compare(load(CompareConfig, Path("judged.toml"), []), only=[], report_only=True, console=quiet()) == 0
    table = Path("runs/small/comparison.md").read_text()
    assert "final score of helpful" in table and "gold" not in table


def test_command(config: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(config)
    assert cli.main(["compare", "compare.toml", "--report-only"]) == 0
    assert "met: dense reaches gold 2 in at most 75% of the samples of sparse" in capsys.readouterr().out
    assert cli.main(["compare", "compare.toml", "--report-only", "--only", "spares"]) == 2
    assert cli.main(["compare", "compare.toml", "--report-only", "--run.name", "other"]) == 0
    assert Path("runs/other/comparison.html").is_file()
