"""What `--help` shows: every command on one screen, a command on one screen, and any field in full (floor 6).

Written from the schemas, so that help says what is read. argparse's own page of `r3hf ppo` has 480 lines.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_settings import CliPositionalArg, CliUnknownArgs

from r3hf_ray.errors import ConfigError
from r3hf_ray.settings import Command, did_you_mean, fields_of, section_in

TITLE = "RLHF with token-level rewards from an ordinary reward model, distributed on Ray."
CLOSING = """\
Any field of a job can be set on the command line: r3hf ppo jobs/toy_ppo.toml --ppo.steps 3 --run.name short
r3hf COMMAND --help says what a command takes, with an example."""
WIDTH, INDENT = 120, 34
KINDS = {"integer": "INT", "number": "FLOAT", "boolean": "true|false", "array": "LIST", "object": "JSON"}
"""Words for JSON's types; what is none of them is text."""
_POSITIONAL, _UNKNOWN = get_args(CliPositionalArg[Path])[1], get_args(CliUnknownArgs)[-2]


def command_page(name: str, flags: type[Command], job: type[Command] | None, example: str) -> str:
    """What a command takes, with an example; a job's sections with a line each."""
    own = list(_flags(flags))
    needed = [_word(*one) for one in own if one[1].is_required()]
    usage = " ".join([f"usage: r3hf {name}", *needed, "[options]", *(["[--SECTION.FIELD VALUE ...]"] if job else [])])
    lines = [usage, "", _one_line((job or flags).__doc__), "", f"example: {example}", ""]
    lines += [_entry(*one) for one in own]
    if job is not None:
        lines += ["", "sections of the job, each with the number of its fields:"]
        for key, field in job.model_fields.items():
            if section := section_in(field.annotation):
                about = _one_line(section.__doc__) + _required(field)
                lines.append(_column(f"{key} ({len(section.model_fields)})", about))
        lines += ["", f"r3hf {name} --help SECTION: its fields; --help WORD: the fields that speak of it; --help all"]
    return "\n".join(lines)


def fields_page(job: type[Command], topic: str) -> str:
    """The fields of a section a line each; one field, or those that speak of a word, or `all` of them, in full.

    Raises:
        ConfigError: nothing in the job speaks of the topic.
    """
    fields = [(name, field) for name, field in fields_of(job) if "." in name]
    topic = topic.removeprefix("--")
    within = [one for one in fields if one[0].startswith(f"{topic}.")]
    if within and all(one[0].count(".") == 1 for one in within):
        about = section_in(job.model_fields[topic].annotation)
        assert about is not None
        doc = textwrap.fill(" ".join((about.__doc__ or "").split()), WIDTH)
        more = f"(r3hf {job.command} --help {within[0][0]} says all of a field)"
        return "\n".join([doc, "", *(_entry(*one, shorten=True) for one in within), "", more])
    found = (
        [one for one in fields if topic in ("all", one[0])]
        or within
        or [one for one in fields if topic.lower() in f"{one[0]} {one[1].description}".lower()]
    )
    if not found:
        near = did_you_mean(topic, [name for name, _ in fields_of(job)])
        raise ConfigError(f"{topic}: no field of r3hf {job.command} speaks of it; {near}r3hf {job.command} --help")
    return "\n".join(_entry(*one) for one in found)


def overview(commands: dict[str, tuple[str, type[Command], type[Command] | None]]) -> str:
    """Every command with its purpose, in groups: `commands` holds the group, the flags and the job of each."""
    lines, last = [TITLE], ""
    for name, (group, flags, job) in commands.items():
        lines += [] if group == last else ["", f"{group}:"]
        last = group
        positional = [_word(*one) for one in _flags(flags) if _POSITIONAL in one[1].metadata]
        lines.append(_column(" ".join(["r3hf", name, *positional]), _one_line((job or flags).__doc__)))
    return "\n".join([*lines, "", CLOSING])


def _flags(schema: type[Command]) -> Iterator[tuple[str, FieldInfo]]:
    return (
        ((field.alias or name).replace("_", "-"), field)
        for name, field in schema.model_fields.items()
        if _UNKNOWN not in field.metadata
    )


def _word(name: str, field: FieldInfo) -> str:
    """A field as it is typed: `--ppo.steps INT`, `--resume`, or `FOLDER`."""
    if _POSITIONAL in field.metadata:
        return name.upper()
    if field.annotation is bool and "." not in name:
        return f"--{name}"
    return f"--{name} {_kind(field)}"


def _kind(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    schema = TypeAdapter(annotation).json_schema()
    schema = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    choices = "|".join(map(str, schema.get("enum", [])))
    return choices or KINDS.get(schema.get("type", ""), "PATH" if schema.get("format") == "path" else "TEXT")


def _entry(name: str, field: FieldInfo, *, shorten: bool = False) -> str:
    word, meaning = _word(name, field), _one_line(field.description)
    default = field.get_default(call_default_factory=True)
    unsaid = field.is_required() or default is None or default in (False, (), {}, [])
    end = _required(field) if unsaid else f" (default: {default})"
    if shorten:
        flag, _, kind = word.partition(" ")
        word = f"{flag} {'CHOICE' if '|' in kind and len(kind) > 12 else kind}"
        room = WIDTH - len(end) - max(INDENT + 2, len(word) + 4)
        meaning = textwrap.shorten(meaning, room, placeholder=" ...")
    return _column(word, meaning + end)


def _required(field: FieldInfo) -> str:
    return " (must be set)" if field.is_required() else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _column(left: str, right: str) -> str:
    """Two columns; a left one that is too wide stands on a line of its own."""
    filled = textwrap.fill(right, WIDTH, initial_indent=" " * (INDENT + 2), subsequent_indent=" " * (INDENT + 2))
    head = f"  {left}"
    if len(head) < INDENT + 1:
        return head.ljust(INDENT + 2) + filled.lstrip()
    if "\n" not in filled and len(head) + 2 + len(right) <= WIDTH:
        return f"{head}  {right}"
    return f"{head}\n{filled}"
