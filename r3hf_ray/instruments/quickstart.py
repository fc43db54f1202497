"""`r3hf quickstart`: toy SFT, toy reward model, PPO with redistributed rewards, through the real distributed system.

It ends with what can be known only in a world with known credit: gold reward before and after, and how well the reward
model's token rewards point at the tokens that earned it.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from r3hf_ray.config import PPOConfig
from r3hf_ray.driver import RunResult, run_ppo
from r3hf_ray.errors import ConfigError
from r3hf_ray.flags import QuickstartFlags
from r3hf_ray.instruments.credit.toy_credit import ToyMeasures, reward_model_agreement
from r3hf_ray.instruments.report.report import write_report
from r3hf_ray.instruments.toy.settings import ToySection
from r3hf_ray.instruments.toy.trained_models import ToyModels
from r3hf_ray.records.progress import row_printer
from r3hf_ray.session import ray_session
from r3hf_ray.settings import load

JOBS = Path(__file__).resolve().parents[2] / "jobs"
GOLD_BAR = 3.0
"""Held-out gold reward that the default run must reach."""
ACCURACY_BARS = (0.65, 0.80)
"""Held-out pair accuracy of the reward model: below, it has not learned; above, the labels are not noisy enough."""
LINE_SECONDS = 5.0
"""Time between two lines of a stage before PPO. [s]"""
SHORT_WORLD = {"sft_rows": 4_000, "groups": 400, "heldout_pairs": 200}
SHORT_PPO = ("--ppo.steps", "6", "--evaluation.prompts", "64", "--reward.calibration_samples", "64")


def quickstart(options: QuickstartFlags, console: Console) -> int:
    """Run everything into a new folder below `options.folder`; returns the exit code.

    The default run exits with 1 and says which bar was missed; the short one is a smoke test without bars.
    """
    start, root = time.monotonic(), _new_folder(options.folder / "quickstart")
    seed, short = options.seed, options.short
    jobs = {"sft_job": _job("toy_sft"), "reward_job": _job("toy_reward")}
    models = ToyModels(ToySection.model_validate(jobs | {"seed": seed} | (SHORT_WORLD if short else {})), root)
    run = ["--run.folder", str(root), "--run.name", "ppo", "--run.seed", str(seed)]
    job = load(PPOConfig, _job("toy_ppo"), [*run, *models.overrides(), *(SHORT_PPO if short else ())])
    with ray_session(job.run.cpus):
        policy, (judge,) = models.prepare(console, on_row=row_printer(console, seconds=LINE_SECONDS))
        credit = reward_model_agreement(
            str(models.reward_model), str(models.policy), count=100 if short else 400, seed=seed
        )
        console.rule("[bold]ppo[/bold]  PPO with token-level redistributed rewards", align="left")
        result = run_ppo(job, resume=False, console=console)
    seconds = {"sft": policy.seconds, "rm": judge.seconds, "ppo": result.seconds}
    accuracy = judge.metrics["eval/heldout/pair_accuracy"]
    _print_end(console, result, write_report(result.folder), credit, accuracy, seconds, time.monotonic() - start)
    missed = [] if short else _missed(result, accuracy)
    for sentence in missed:
        console.print(f"missed: {sentence}")
    return 1 if missed else 0


def _new_folder(wished: Path) -> Path:
    """`quickstart`, or `quickstart-2` and so on when it is there: nothing is overwritten."""
    candidates = [wished, *(wished.with_name(f"{wished.name}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def _job(name: str) -> Path:
    path = JOBS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the quickstart runs from a checkout of the repository")
    return path


def _print_end(
    console: Console,
    result: RunResult,
    report: Path,
    credit: ToyMeasures,
    accuracy: float,
    seconds: dict[str, float],
    total: float,
) -> None:
    before, after = result.rows[0], result.rows[-1]
    phrase, token = credit.phrase, credit.token
    console.rule("[bold]done[/bold]", align="left")
    console.print(f"gold reward on held-out prompts   {_gold(before)} before, {_gold(after)} after")
    console.print(f"reward model, held-out pairs      {accuracy:.3f} agree with the noisy labels")
    console.print(
        f"token credit of its rewards       phrase AUC {phrase.auc.value:.3f}, token AUC {token.auc.value:.3f}, "
        f"phrase r {phrase.pearson.value:.2f} (0.5 and 0 are chance)"
    )
    parts = seconds | {"rest": total - sum(seconds.values())}
    console.print(f"seconds by stage                  {'  '.join(f'{name} {s:.0f}' for name, s in parts.items())}")
    console.print(f"model                             {result.folder / 'model'}")
    stages = " ".join(f"{name} {_minutes(spent)}" for name, spent in seconds.items())
    console.print(
        f"gold {_gold(before)} -> {_gold(after)} | RM accuracy {accuracy:.2f} | phrase AUC {phrase.auc.value:.2f} | "
        f"{_minutes(total)} ({stages}) | report: {_short_path(report)}"
    )


def _gold(row: Mapping[str, float]) -> str:
    return f"{row['eval/heldout/gold/mean']:.2f}+-{row['eval/heldout/gold/sem']:.2f}"


def _missed(result: RunResult, accuracy: float) -> list[str]:
    gold, (low, high) = result.rows[-1]["eval/heldout/gold/mean"], ACCURACY_BARS
    bars = [
        (gold >= GOLD_BAR, f"held-out gold reward {gold:.2f} is below {GOLD_BAR}"),
        (low <= accuracy <= high, f"reward model accuracy {accuracy:.3f} is outside {low} to {high}"),
    ]
    return [sentence for holds, sentence in bars if not holds]


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s"


def _short_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
