"""`r3hf verify`: what a run's own record proves of it, a line each; what was not measured is said and is not green."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from r3hf_ray.actors.ledger import State
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.methods import TELESCOPING_TOLERANCE
from r3hf_ray.records.jsonl import read_jsonl
from r3hf_ray.records.ledger import LedgerFile, read_ledger, surviving
from r3hf_ray.records.metrics import STEP, read_metrics
from r3hf_ray.settings import load
from r3hf_ray.weights.contract import fingerprint, fingerprint_of_all

SHOWN = 3
"""How many culprits a line names."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim about a run, and whether its record bears it out.

    Example: ``Proof("no sample was trained on twice", True, "1,920 samples in 60 steps")``
    """

    claim: str
    holds: bool | None
    """None: not measured, so not proven."""
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a run folder says of itself."""

    folder: Path
    config: PPOConfig
    files: list[LedgerFile]
    line: list[LedgerFile]
    """Of `files`, those of the surviving line."""
    rows: list[dict[str, float]]
    events: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return any(event["event"] == "finished" for event in self.events)


def verify(folder: Path) -> list[Proof]:
    """Read a finished or interrupted run and prove what can be proven.

    Raises:
        ConfigError: no run of `r3hf ppo`, or a file of it is damaged.
    """
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder}: no run (no config.toml in it); name a run's folder, as runs/NAME")
    files = read_ledger(folder)
    if not files:
        raise ConfigError(f"{folder}: has no ledger: no step was finished, or it is no run of `r3hf ppo`")
    seen = Evidence(
        folder=folder,
        config=load(PPOConfig, folder / "config.toml", []),
        files=files,
        line=surviving(files),
        rows=read_metrics(folder),
        events=read_jsonl(folder / "events.jsonl"),
    )
    return [Proof(claim, *check(seen)) for claim, check in CLAIMS.items()]


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor], dtype: str) -> str:
    """The fingerprint a publication of these weights has in the samplers' data type."""
    prints = {}
    for name, tensor in tensors.items():
        cast = tensor.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
        prints[name] = fingerprint((cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy())
    return fingerprint_of_all(prints)


Judged = tuple[bool | None, str]


def _trained_once(seen: Evidence) -> Judged:
    counts = Counter(key for file in seen.line for key in _keys(file, State.TRAINED))
    twice = [key for key, count in counts.items() if count > 1]
    return not twice, _named("trained twice", twice) if twice else f"{len(counts):,} samples in {len(seen.line)} steps"


def _none_lost(seen: Evidence) -> Judged:
    rollout, lost, quarantined = seen.config.rollout, [], 0
    for file in seen.line:
        first = (file.ledger.step - 1) * rollout.prompts_per_step
        prompts = range(first, first + rollout.prompts_per_step)
        expected = {(prompt, sample) for prompt in prompts for sample in range(rollout.samples_per_prompt)}
        trained, given_up = set(_keys(file, State.TRAINED)), set(_keys(file, State.QUARANTINED))
        lost += sorted(expected ^ (trained | given_up)) + sorted(trained & given_up)
        quarantined += len(given_up)
    return not lost, _named("lost or strange", lost) if lost else f"all accounted for, {quarantined} quarantined"


def _fresh(seen: Evidence) -> Judged:
    bound, stale, oldest = seen.config.rollout.max_lag, [], 0
    for file in seen.line:
        columns, step = file.ledger.columns, file.ledger.step
        last = {(p, s): v for p, s, state, v in _lives(columns) if state == State.SCORED}
        for key in _keys(file, State.TRAINED):
            if key not in last or step - 1 - last[key] > bound or last[key] > step - 1:
                stale.append(key)
            else:
                oldest = max(oldest, step - 1 - last[key])
    return not stale, _named("too old or never scored", stale) if stale else f"oldest {oldest}, allowed {bound}"


def _weights_proven(seen: Evidence) -> Judged:
    loads = [item for file in seen.files for item in file.loads]
    wrong = [item for item in loads if item["matched"] is False or _beyond(item)]
    if wrong:
        return False, _named(
            "not what was published", [f"{item['member']} version {item['version']}" for item in wrong]
        )
    unproven = [item for item in loads if item["matched"] is None or item["gap"] is None]
    versions = {item["version"] for item in loads}
    missing = [file.ledger.step for file in seen.line if file.ledger.step not in versions]
    if missing:
        return False, _named("no sampler ever loaded version", missing)
    if unproven:
        return None, f"{len(unproven)} of {len(loads)} loads carried no fingerprint or no probe"
    gap = max((item["gap"] for item in loads), default=0.0)
    return True, f"{len(loads)} loads of {len(versions)} versions, largest gap {gap:.1e} nats"


def _telescoped(seen: Evidence) -> Judged:
    name = "r3hf/telescoping_error/max"
    errors = {int(row[STEP]): row[name] for row in seen.rows if name in row}
    missing = [file.ledger.step for file in seen.line if file.ledger.step not in errors]
    if missing:
        return False, _named("no sum logged for step", missing)
    if ":" in seen.config.reward.mode:
        return None, f"{seen.config.reward.mode} promises no sum"
    broken = [step for step, error in errors.items() if not error <= TELESCOPING_TOLERANCE]
    return not broken, _named("off at step", broken) if broken else f"largest error {max(errors.values()):.1e}"


def _monotonic(seen: Evidence) -> Judged:
    steps = [file.ledger.step for file in seen.line]
    if steps != list(range(1, len(steps) + 1)):
        return False, f"the surviving steps are {_runs(steps)}"
    logged = {int(row[STEP]) for row in seen.rows if "policy/loss" in row}
    missing = [step for step in steps if step not in logged]
    if missing:
        return False, _named("no metrics of step", missing)
    done = seen.config.ppo.steps
    if seen.finished and len(steps) != done:
        return False, f"it says finished with {len(steps)} of {done} steps"
    return True, f"1 to {len(steps)} of {done}" + ("" if seen.finished else ", not finished")


def _reasons(seen: Evidence) -> Judged:
    restarts = [event for event in seen.events if event["event"] == "restart"]
    silent = [event.get("attempt", "?") for event in restarts if not event.get("reason")]
    return not silent, _named("no reason for attempt", silent) if silent else f"{len(restarts)} restarts"


def _model(seen: Evidence) -> Judged:
    if not seen.finished:
        return None, "the run is not finished"
    loads = [item for file in seen.line for item in file.loads if item["version"] == seen.config.ppo.steps]
    published = {item.get("fingerprint") for item in loads} - {None, ""}
    files = sorted((seen.folder / "model").glob("*.safetensors"))
    if not files:
        return False, "there is no model/"
    if len(published) != 1 or seen.config.learner.dtype != "float32":
        return None, "its weights were rounded, or published without a fingerprint"
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    same = fingerprint_of_tensors(tensors, seen.config.rollout.dtype) == published.pop()
    return same, "the fingerprint of the last version" if same else "holds other weights than the last version"


CLAIMS: Mapping[str, Callable[[Evidence], Judged]] = {
    "no sample was trained on twice": _trained_once,
    "no sample was lost": _none_lost,
    "no sample was older than rollout.max_lag allows": _fresh,
    "every sampler ran the weights it should": _weights_proven,
    "token rewards sum to the score": _telescoped,
    "steps follow each other without a gap": _monotonic,
    "every restart has its reason": _reasons,
    "model/ is the last version": _model,
}


def _lives(columns: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, int, int]]:
    names = ("prompt_id", "sample", "state", "version")
    return zip(*(columns[name].tolist() for name in names), strict=True)


def _keys(file: LedgerFile, state: State) -> list[tuple[int, int]]:
    return [(prompt, sample) for prompt, sample, its, _ in _lives(file.ledger.columns) if its == state]


def _beyond(item: Mapping[str, Any]) -> bool:
    gap, bound = item["gap"], item["bound"]
    return gap is not None and not (math.isfinite(gap) and gap <= bound)


def _named(what: str, culprits: Sequence[object]) -> str:
    shown = ", ".join(str(culprit) for culprit in culprits[:SHOWN])
    more = f" and {len(culprits) - SHOWN} more" if len(culprits) > SHOWN else ""
    return f"{what}: {shown}{more}"


def _runs(steps: Sequence[int]) -> str:
    return _named("steps", steps) if steps else "none"
