"""`r3hf quickstart`: toy SFT, toy reward model, PPO with redistributed rewards, through the real distributed system.

It ends with what can be known only in a world with known credit: gold reward before and after, and how well the reward
model's token rewards point at the tokens that earned it.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from r3hf_ray.config import PPOConfig, RewardConfig, SFTConfig, load
from r3hf_ray.draws import seed_of
from r3hf_ray.driver import RunResult, run_ppo
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.toy.language import make_request
from r3hf_ray.instruments.toy.measure import CreditQuality, reward_model_credit
from r3hf_ray.instruments.toy.world import make_ranked, make_world
from r3hf_ray.prepare import train_reward, train_sft
from r3hf_ray.session import ray_session

JOBS = Path(__file__).resolve().parents[2] / "jobs"
GOLD_BAR = 3.0
"""Held-out gold reward that the default run must reach."""
ACCURACY_BARS = (0.65, 0.80)
"""Held-out pair accuracy of the reward model: below, it has not learned; above, the labels are not noisy enough."""
LINE_SECONDS = 5.0
"""Time between two lines of a stage before PPO. [s]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    sft_rows: int = 20_000
    groups: int = 2_000
    heldout_pairs: int = 1_000
    credit_responses: int = 400
    overrides: tuple[str, ...] = ()
    """Of the PPO job."""


FULL = Size()
SHORT = Size(
    sft_rows=4_000,
    groups=400,
    heldout_pairs=200,
    credit_responses=100,
    overrides=("--ppo.steps", "6", "--evaluation.prompts", "64", "--reward.calibration_samples", "64"),
)


def quickstart(folder: Path, *, seed: int, short: bool, console: Console) -> int:
    """Run everything into a new folder below `folder`; returns the exit code.

    The default run exits with 1 and says which bar was missed; the short one is a smoke test without bars.
    """
    size, start = (SHORT if short else FULL), time.monotonic()
    root = _new_folder(folder / "quickstart")
    common = ["--run.folder", str(root), "--run.seed", str(seed)]
    seconds: dict[str, float] = {}
    with ray_session(load(PPOConfig, _job("toy_ppo"), []).run.cpus), _Timer(seconds, console) as timer:
        timer.stage("world", f"writing the toy world to {root / 'world'}")
        make_world(root / "world", seed=seed, sft_rows=size.sft_rows)

        timer.stage("sft", "training the initial policy on the noisy author's texts")
        data = ["--model.base", str(root / "world/base"), "--data.source", str(root / "world/sft.jsonl")]
        sft = load(SFTConfig, _job("toy_sft"), [*common, "--run.name", "sft", *data])
        policy = train_sft(sft, on_row=_lines(console), note=console.print).model

        timer.stage("rm", "training the reward model on noisy preferences")
        ranked = root / "world/ranked.jsonl"
        make_ranked(policy, ranked, seed=seed, groups=size.groups, heldout_pairs=size.heldout_pairs)
        data = ["--model.base", str(policy), "--data.source", str(ranked), "--data.heldout", str(size.heldout_pairs)]
        reward = load(RewardConfig, _job("toy_reward"), [*common, "--run.name", "reward", *data])
        judged = train_reward(reward, on_row=_lines(console), note=console.print)
        credit = _credit(judged.model, policy, seed, size)

        timer.stage("ppo", "PPO with token-level redistributed rewards")
        models = ["--model.policy", str(policy), "--model.reward_model", str(judged.model)]
        data = ["--data.source", str(root / "world/prompts.jsonl")]
        ppo = load(PPOConfig, _job("toy_ppo"), [*common, "--run.name", "ppo", *models, *data, *size.overrides])
        result = run_ppo(ppo, resume=False, console=console)
    accuracy = judged.metrics["eval/heldout/pair_accuracy"]
    _print_end(console, result, credit, judged.metrics, seconds, time.monotonic() - start)
    missed = [] if short else _missed(result, accuracy)
    for sentence in missed:
        console.print(f"missed: {sentence}")
    return 1 if missed else 0


class _Timer:
    """Seconds by stage."""

    def __init__(self, seconds: dict[str, float], console: Console) -> None:
        self._seconds, self._console, self._name, self._since = seconds, console, "", 0.0

    def stage(self, name: str, text: str) -> None:
        """End the last stage and begin another."""
        self._end()
        self._name, self._since = name, time.monotonic()
        self._console.rule(f"[bold]{name}[/bold]  {text}", align="left")

    def _end(self) -> None:
        if self._name:
            self._seconds[self._name] = time.monotonic() - self._since

    def __enter__(self) -> "_Timer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end()


def _new_folder(wished: Path) -> Path:
    """`quickstart`, or `quickstart-2` and so on when it is there: nothing is overwritten."""
    candidates = [wished, *(wished.with_name(f"{wished.name}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def _job(name: str) -> Path:
    path = JOBS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the quickstart runs from a checkout of the repository")
    return path


def _lines(console: Console) -> Callable[[Mapping[str, Any]], None]:
    """Print a stage's metrics now and then."""
    last = [0.0]

    def show(row: Mapping[str, Any]) -> None:
        if time.monotonic() - last[0] >= LINE_SECONDS:
            last[0] = time.monotonic()
            facts = {name: value for name, value in row.items() if isinstance(value, float) and "/" in name}
            values = "  ".join(f"{name} {value:.3g}" for name, value in facts.items())
            console.print(f"step {row['train/global_step']}  {values}")

    return show


def _credit(reward_model: Path, policy: Path, seed: int, size: Size) -> CreditQuality:
    rng = random.Random(seed_of(seed, "quickstart credit"))
    requests = [make_request(rng) for _ in range(size.credit_responses)]
    return reward_model_credit(reward_model, policy, requests, seed=seed)


def _print_end(
    console: Console,
    result: RunResult,
    credit: CreditQuality,
    judged: Mapping[str, float],
    seconds: dict[str, float],
    total: float,
) -> None:
    before, after = result.rows[0], result.rows[-1]
    accuracy = judged["eval/heldout/pair_accuracy"]
    console.rule("[bold]done[/bold]", align="left")
    console.print(f"gold reward on held-out prompts   {_gold(before)} before, {_gold(after)} after")
    console.print(f"reward model, held-out pairs      {accuracy:.3f} agree with the noisy labels")
    console.print(
        f"token credit of its rewards       phrase AUC {credit.phrase_auc:.3f}, token AUC {credit.token_auc:.3f}, "
        f"phrase r {credit.phrase_pearson:.2f} (0.5 and 0 are chance)"
    )
    console.print(f"seconds by stage                  {'  '.join(f'{name} {s:.0f}' for name, s in seconds.items())}")
    console.print(f"model                             {result.folder / 'model'}")
    stages = " ".join(f"{name} {_minutes(seconds[name])}" for name in ("sft", "rm", "ppo"))
    console.print(
        f"gold {_gold(before)} -> {_gold(after)} | RM accuracy {accuracy:.2f} | phrase AUC {credit.phrase_auc:.2f} | "
        f"{_minutes(total)} ({stages}) | report: {_short_path(result.report)}"
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
