"""docs/operations.md: its commands name what is there, in ten at most; its errors are sentences of the program."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
GAP = "…"


def section(title: str) -> str:
    [text] = re.findall(rf"^## {re.escape(title)}$\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


WAYS = re.findall(r"^### (.+?)$.*?^```bash\n(.*?)^```", section("Ways from nothing to a running job"), re.M | re.S)
ERRORS = [line.split("|")[1:-1] for line in section("The ten likeliest errors").splitlines() if line.startswith("| ")][
    1:
]
PATHS = sorted({found.rstrip("./") for found in re.findall(r"\b(?:cluster|jobs|tests|requirements)/[\w./-]+", PAGE)})


@pytest.mark.parametrize(("name", "commands"), WAYS, ids=[name for name, _ in WAYS])
def test_a_way_takes_ten_commands_at_most(name: str, commands: str) -> None:
    lines = [part for line in commands.splitlines() for part in line.split(" && ")]
    assert 0 < len(lines) <= 10, name
    assert "r3hf" in commands


def test_every_way_is_described() -> None:
    told = " ".join(commands for _, commands in WAYS)
    rooms = {path.name for path in (ROOT / "cluster").iterdir() if path.is_dir()}
    assert rooms == {"image", "kuberay", "launcher", "local", "slurm"}
    assert all(f"cluster/{room}/" in told for room in rooms)


@pytest.mark.parametrize("path", PATHS)
def test_what_it_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_there_are_ten_errors() -> None:
    assert len(ERRORS) == 10 and all(len(cells) == 3 for cells in ERRORS)


@cache
def sentences() -> list[str]:
    """Every text of the package, with a gap where a value goes."""
    found = []
    for path in (ROOT / "r3hf_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(told: str) -> bool:
    pieces = [re.escape(piece.strip()) for piece in told.split(GAP) if piece.strip()]
    return any(re.search(".*".join(pieces), sentence, re.S) for sentence in sentences())


TOLD = [told for cells in ERRORS for told in re.findall(r"`([^`]+)`", cells[0])]


@pytest.mark.parametrize("told", TOLD)
def test_an_error_is_a_sentence_of_the_program(told: str) -> None:
    assert is_said(told)


def test_a_sentence_that_nothing_says_is_found_out() -> None:
    assert not is_said("the run asks for … and the moon has …")


def test_metrics_that_it_names_are_written() -> None:
    named = set(re.findall(r"`((?:reward|rollout|policy|time)/[a-z_/]+)`", section("Reading the dashboards")))
    assert len(named) > 5 and all(any(name in sentence for sentence in sentences()) for name in named)
