"""The working folder as a job takes it along: what the ignore files leave, within Ray's limit, no keys (layer 4)."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ray._private.ray_constants import RAY_RUNTIME_ENV_DEFAULT_EXCLUDES, RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env.packaging import (
    GCS_STORAGE_MAX_SIZE,
    _get_excludes,
    get_excludes_from_ignore_files,
)

from r3hf_ray.errors import ConfigError
from r3hf_ray.records.provenance import names_a_secret

KEYS = [".env", "*.env", "*.pem", ".netrc", ".ray_token*"]
"""Never sent, whatever `.rayignore` says: a package lies in the cluster's store, where every job can read it."""
LARGEST = 5
_SILENT = logging.Logger("packing", logging.ERROR)
_KEY = re.compile(r"\b(?:hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@")


def require_packable(folder: Path, needed: Path) -> int:
    """See that a folder can be sent and holds a file; its size in bytes.

    Raises:
        ConfigError: it is over Ray's limit (the largest files are named), or the file is outside it or left out.
    """
    sizes = {path: path.stat().st_size for path in packed(folder)}
    total = sum(sizes.values())
    if total > GCS_STORAGE_MAX_SIZE:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
        named = ", ".join(f"{path.relative_to(folder)} ({_mib(sizes[path])})" for path in largest)
        raise ConfigError(
            f"{folder}: {_mib(total)} to send, and Ray takes {_mib(GCS_STORAGE_MAX_SIZE)}; the largest: {named}; name "
            "what the job does not read in .rayignore"
        )
    if needed.resolve() not in sizes:
        raise ConfigError(
            f"{needed}: is not sent: it must lie in {folder}, and .rayignore and .gitignore must leave it in"
        )
    return total


def packed(folder: Path) -> Iterator[Path]:
    """The files that Ray would pack: not what `.rayignore` and `.gitignore` name, those of inner folders too."""
    never = [*KEYS, *RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(",")]
    return _packed(folder.resolve(), [_get_excludes(folder.resolve(), never)])


def refuse_secrets(named: dict[str, str]) -> None:
    """See that nothing that is stored and shown looks like a key: overrides by their name, or a text.

    Raises:
        ConfigError: something does.
    """
    for name, value in named.items():
        if names_a_secret(name) or _KEY.search(value):
            raise ConfigError(
                f"{name}: looks like a key, and what is submitted is stored and shown; put keys into the environment "
                "of the nodes, or into a file there that --env-file names"
            )


def _packed(path: Path, rules: list[Callable[[Path], bool]]) -> Iterator[Path]:
    if any(rule(path) for rule in rules):
        return
    if path.is_file():
        yield path
    elif path.is_dir():
        git = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
        inner = get_excludes_from_ignore_files(path, include_gitignore=git, logger=_SILENT)
        for each in sorted(path.iterdir()):
            yield from _packed(each, [*rules, *inner])


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
