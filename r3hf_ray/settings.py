"""How settings are read: dotted overrides over a TOML file, and one sentence for each mistake (floor 0).

Sources are the command line over the TOML file and nothing else: the environment is not read, because ``RUN=x`` in a
shell would then break or silently override a run. Every problem becomes one line, ``file: section.field: what``.
"""

import tomllib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from r3hf_ray.errors import ConfigError

JOBS_OF = {
    "sft": "sft",
    "reward_training": "reward",
    "ppo": "ppo",
    "rollout": "ppo",
    "reward": "ppo",
    "compare": "compare",
    "arms": "compare",
}
"""Sections that jobs of one command alone have, and that command."""


class Command(BaseSettings):
    """What a command reads: a job's sections, or the flags of a command without a job."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )

    command: ClassVar[str] = "COMMAND"
    """What is typed behind `r3hf` for a job of this schema."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given in code: `load` and `read_flags` pass the TOML and the command line."""
        return (init_settings,)


C = TypeVar("C", bound=Command)


def load(schema: type[C], path: Path, overrides: list[str]) -> C:
    """Read a job's TOML file and put dotted command-line overrides (`--ppo.steps 3`) over it.

    Raises:
        ConfigError: a missing or unreadable file, a job of another command, an unknown field, a wrong type, or a broken
            rule between fields; one line per problem, `file: section.field: what`.
    """
    table = _read_toml(path)
    for section in table:
        if section in JOBS_OF and section not in schema.model_fields:
            raise ConfigError(f"{path}: [{section}] is for r3hf {JOBS_OF[section]}, and this is r3hf {schema.command}")
    return _settings(schema, schema.command, overrides, path, table)


def command_of(path: Path) -> str:
    """The command that a job file is for, told by the sections that jobs of one command alone have.

    Raises:
        ConfigError: it has no such section, or the file cannot be read.
    """
    found = {JOBS_OF[section] for section in _read_toml(path) if section in JOBS_OF}
    if len(found) != 1:
        raise ConfigError(f"{path}: is it for {' or '.join(sorted(found or set(JOBS_OF.values())))}? say --kind NAME")
    return found.pop()


def read_flags(schema: type[C], command: str, arguments: list[str]) -> C:
    """Read the command line of a command.

    Raises:
        ConfigError: an unknown flag, a wrong type, or one that must be given; one line per problem.
    """
    return _settings(schema, command, arguments, None, {})


def fields_of(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of everything that can be set, sections before what is in them.

    Example:
        The names of a schema with one section: ``["run", "run.name", "run.folder", "run.seed", "run.cpus"]``.
    """
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", field
        section = section_in(field.annotation)
        if section is not None:
            yield from fields_of(section, f"{prefix}{name}.")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: itself, or None, or several of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """`did you mean ppo.steps?`, or nothing where no name is near.

    A field in another section is nearer than another field of the same section.
    """
    last, names = wrong.rpartition(".")[2], list(names)
    near = [name for name in names if name.rpartition(".")[2] == last] or get_close_matches(wrong, names, cutoff=0.7)
    return f"did you mean {' or '.join(near[:2])}? " if near else ""


def _settings(schema: type[C], command: str, arguments: list[str], path: Path | None, table: dict[str, Any]) -> C:
    help_line = f"(r3hf {command} --help{' all' if path else ''} lists what there is)"
    names = [name for name, _ in fields_of(schema)]
    try:
        source = CliSettingsSource[Any](schema, cli_parse_args=arguments, cli_prog_name=f"r3hf {command}")
        return schema(_cli_settings_source=source, **table)  # type: ignore[call-arg]
    except ValidationError as error:
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        lines = []
        for one in error.errors():
            name = ".".join(map(str, one["loc"])) or "settings"
            typed = f"--{name}" if path else f"--{name.replace('_', '-')}"
            where = f"command line: {typed}" if typed in given or path is None else f"{path}: {name}"
            lines.append(f"{where}: {_sentence(one, names, help_line)}")
        raise ConfigError("\n".join(lines)) from None
    except SettingsError as error:
        message = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
        raise ConfigError(f"command line: {_unparsed(message, names, help_line)}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(str(path), [str(other) for other in sorted(path.parent.glob("*.toml"))])
        raise ConfigError(f"{path}: no such file; {near}name a TOML file first, as in jobs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; name a TOML file, as in jobs/, or the config.toml of a run") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def _sentence(error: Any, names: list[str], help_line: str) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        wrong = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
        return f"no such field; {did_you_mean(wrong, names)}{help_line}"
    if kind == "missing":
        return "must be set"
    if kind == "value_error":
        return message
    if kind in ("model_type", "model_attributes_type"):
        message = f"must be a section: write [{error['loc'][0]}] and its fields below it"
    return f"{message.replace('Input should be', 'must be')}; got {error['input']!r}"


def _unparsed(message: str, names: list[str], help_line: str) -> str:
    """What argparse says, with the nearest field for one that does not exist."""
    what, _, words = message.partition("unrecognized arguments: ")
    unknown = next((word.partition("=")[0] for word in words.split() if word.startswith("--")), None)
    if what or unknown is None:
        return f"{message} {help_line}"
    near = did_you_mean(unknown, [f"--{name}" if "." in name else f"--{name.replace('_', '-')}" for name in names])
    return f"{unknown}: no such field; {near}{help_line}"
