"""The README stays short and its commands can be typed: configs load, flags and make targets exist."""

import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

from r3hf_ray.config import PPOConfig, RewardConfig, SFTConfig
from r3hf_ray.settings import Command, load

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCHEMAS: dict[str, type[Command]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def readme() -> str:
    return README.read_text() if README.exists() else ""


def shell_lines(text: str) -> list[list[str]]:
    """Words of each command in the shell blocks; continuation lines joined, comments and a leading `$` dropped."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def commands(program: str) -> list[list[str]]:
    """Arguments of each call of a program, also inside `ray job submit ... -- r3hf ...` and behind variables."""
    found = []
    for words in shell_lines(readme()):
        starts = [i for i, word in enumerate(words) if word.removeprefix(".venv/bin/") == program]
        if starts:
            rest = words[starts[0] + 1 :]
            end = next((i for i, word in enumerate(rest) if word in {"&&", "||", "|", ";", ">", "&"}), len(rest))
            found.append(rest[:end])
    return found


@cache
def help_text(command: str) -> str:
    program = "import sys; from r3hf_ray.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"r3hf {command} --help exits {done.returncode}: {done.stderr}"
    return done.stdout


def split_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """Dotted overrides with their values (`--ppo.steps 3`), and the command's own flags (`--resume`)."""
    overrides, flags, i = [], [], 0
    while i < len(words):
        takes_value = "=" not in words[i] and i + 1 < len(words) and not words[i + 1].startswith("--")
        if words[i].startswith("--") and "." in words[i].split("=")[0]:
            overrides += words[i : i + 1 + takes_value]
            i += takes_value
        elif words[i].startswith("--"):
            flags.append(words[i].split("=")[0])
        i += 1
    return overrides, flags


def test_readme_is_short_and_says_how_to_start() -> None:
    assert README.exists()
    assert len(readme().splitlines()) <= 200
    assert ["quickstart"] in commands("make")
    assert ["test"] in commands("make")


@pytest.mark.parametrize("words", commands("r3hf"), ids=" ".join)
def test_r3hf_command_parses(words: list[str]) -> None:
    command, arguments = words[0], words[1:]
    overrides, flags = split_flags(arguments)
    assert not [flag for flag in flags if flag not in help_text(command)], f"r3hf {command} --help names no such flag"
    if command in SCHEMAS and not any("<" in word for word in arguments):
        load(SCHEMAS[command], ROOT / arguments[0], overrides)


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_command_exists(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_and_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", readme()) if "://" not in link]
    assert not [link for link in links if not (ROOT / link).exists()]


def test_shell_lines_of_a_block() -> None:
    text = "```bash\n$ r3hf ppo jobs/a.toml \\\n    --ppo.steps 3  # short\n```\n```toml\nr3hf = 1\n```\n"
    assert shell_lines(text) == [["r3hf", "ppo", "jobs/a.toml", "--ppo.steps", "3"]]


def test_split_flags() -> None:
    words = ["jobs/a.toml", "--ppo.steps", "3", "--resume", "--run.name=x", "--dry-run"]
    assert split_flags(words) == (["--ppo.steps", "3", "--run.name=x"], ["--resume", "--dry-run"])


def test_readme_shows_the_loop_as_it_is_in_the_source() -> None:
    from r3hf_ray.actors.learner import _Rank

    body = textwrap.dedent(inspect.getsource(_Rank.run)).splitlines()[2:]
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)
    assert textwrap.dedent("\n".join(body)).strip() in [block.strip() for block in blocks]
