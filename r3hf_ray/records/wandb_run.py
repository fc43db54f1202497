"""One wandb run for a run folder, across resumes. Only the driver talks to wandb, and wandb never stops a run."""

import html
import json
import netrc
import os
import socket
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import wandb
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from r3hf_ray.records.metrics import STEP
from r3hf_ray.records.provenance import redacted
from r3hf_ray.sections.runs import TrackingSection

TRACKER_ERRORS = (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError)
"""How wandb fails: refused, unreachable, disk full, or its service process gone."""

SAMPLE_COLUMNS = ["step", "prompt_id", "sample", "finish", "score", "gold", "prompt", "response", "rewards"]

Mode = Literal["online", "offline", "disabled"]


class WandbRun:
    """Logs scalars and samples to wandb; the first failure is reported once and switches it off.

    The run's id is kept in `folder/wandb_id`, so a resumed run continues it. Offline files are below `folder/wandb`;
    `wandb sync` uploads them. Scalars are plotted over `train/global_step`; steps done again after a restart appear
    again, told apart by `attempt`.
    """

    def __init__(
        self,
        folder: Path,
        tracking: TrackingSection,
        *,
        name: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: wandb.Run | None = None
        mode = resolve_mode(tracking.wandb)
        if mode == "disabled":
            return
        try:
            self._run = self._start(folder, tracking, name, config, mode)
        except TRACKER_ERRORS as error:
            self._give_up("could not start", error)
            if mode == "online":
                self._start_offline(folder, tracking, name, config)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of `metrics.jsonl` as it is."""
        self._guarded(lambda run: run.log(dict(row)))

    def log_samples(self, step: int, responses: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Log the token rows of some responses (`samples.read_samples`) as a table, tokens coloured by their reward."""
        self._guarded(lambda run: run.log({STEP: step, "samples/train": _table(step, responses)}))

    def finish(self, *, failed: bool = False) -> None:
        """Close the run; waits for the upload when online. Later calls do nothing."""
        self._guarded(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _start(
        self, folder: Path, tracking: TrackingSection, name: str, config: Mapping[str, Any], mode: Mode
    ) -> wandb.Run:
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            name=name,
            id=_run_id(folder),
            resume="allow",
            mode=mode,
            dir=folder,
            config=redacted(config),
            settings=wandb.Settings(console="off", silent=True, disable_code=True, save_code=False, init_timeout=30),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return run

    def _start_offline(self, folder: Path, tracking: TrackingSection, name: str, config: Mapping[str, Any]) -> None:
        try:
            self._run = self._start(folder, tracking, name, config, "offline")
        except TRACKER_ERRORS as error:
            self._give_up("could not start offline either", error)

    def _guarded(self, action: Callable[[wandb.Run], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except TRACKER_ERRORS as error:
            self._give_up("failed and is off for the rest of this run", error)

    def _give_up(self, what: str, error: BaseException) -> None:
        self._run = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._warn(f"wandb {what}: {reason}; metrics.jsonl has every metric")


def resolve_mode(setting: Literal["auto", "online", "offline", "disabled"]) -> Mode:
    """What `auto` means here: WANDB_MODE if set, else online with a key and a reachable server, otherwise offline."""
    if setting != "auto":
        return setting
    wished = os.environ.get("WANDB_MODE", "")
    if wished in ("offline", "dryrun"):
        return "offline"
    if wished == "disabled":
        return "disabled"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = server.hostname or "", server.port or (80 if server.scheme == "http" else 443)
    return "online" if _has_key(host) and _reachable(host, port) else "offline"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(host: str, port: int) -> bool:
    if urllib.request.getproxies():
        return True  # the proxy resolves the name, not this machine; a failing init falls back to offline
    try:
        socket.create_connection((host, port), timeout=3.0).close()
    except OSError:
        return False
    return True


def _run_id(folder: Path) -> str:
    path = folder / "wandb_id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


def _table(step: int, responses: Sequence[Sequence[Mapping[str, Any]]]) -> wandb.Table:
    table = wandb.Table(columns=SAMPLE_COLUMNS)
    for tokens in responses:
        first = tokens[0]
        facts = [first["prompt_id"], first["sample"], first["finish"], first["score"], first["gold"], first["prompt"]]
        rewards = json.dumps([round(token["reward"], 4) for token in tokens])
        table.add_data(step, *facts, wandb.Html(coloured_tokens(tokens), inject=False), rewards)
    return table


def coloured_tokens(tokens: Sequence[Mapping[str, Any]]) -> str:
    """A response as HTML, tokens on blue (earned) or orange (lost) by their reward; all text is escaped."""
    scale = max((abs(token["reward"]) for token in tokens), default=0.0) or 1.0
    spans = []
    for token in tokens:
        colour = "33,102,172" if token["reward"] > 0 else "230,97,1"
        strength = 0.6 * abs(token["reward"]) / scale
        spans.append(
            f'<span style="background:rgba({colour},{strength:.2f})" title="{token["reward"]:+.3f}">'
            f"{html.escape(token['token'])}</span>"
        )
    gap = "" if any(character.isspace() for token in tokens for character in token["token"]) else " "
    return f'<div style="font-family:sans-serif;white-space:pre-wrap">{gap.join(spans)}</div>'
