"""Imports point down only: shown by reading every import, and by importing each layer in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "r3hf_ray"

LAYERS = {
    "errors": 0, "types": 0, "config": 0, "settings": 0, "sections": 0, "draws": 0, "methods": 0,
    "user_functions": 0, "flags": 0,
    "algorithms": 1,
    "models": 2, "data": 2, "scoring": 2, "training": 2, "weights": 2,
    "weights/object_ref": 3, "weights/nccl": 3, "weights/engine": 3, "weights/media": 3,
    "scoring/vllm_reader": 3, "actors": 3,
    "counts_and_warnings": 4, "driver": 4, "session": 4, "prepare": 4, "preflight": 4,
    "records": 4, "operations": 4, "planning": 4,
    "instruments": 5,
    "cli": 6, "run_commands": 6, "help_pages": 6, "__main__": 6,
}  # fmt: skip
"""Floor of each room, and of a file that stands on another floor than its room."""
ORDER = [
    "session", "records", "operations", "counts_and_warnings", "planning", "preflight", "prepare", "driver",
    "instruments/pages", "instruments/report", "instruments/verify", "instruments/toy", "instruments/scored_answers",
    "instruments/audit", "instruments/credit",
    "instruments/compare", "instruments/quickstart",
    "help_pages", "run_commands", "cli", "__main__",
]  # fmt: skip
"""Rooms of floors 4 to 6, each of which may import those before it and not those behind it."""
THIRD_PARTY = [
    {"pydantic", "pydantic_settings", "numpy", "jaxtyping"},
    {"torch"},
    {
        "transformers",
        "tokenizers",
        "safetensors",
        "datasets",
        "pyarrow",
        "huggingface_hub",
        "jinja2",
        "gguf",
        "trl",
        "peft",
        "rich",
        "xxhash",
    },
    {"ray", "vllm", "psutil"},
]
"""What a layer adds to those below it; from floor 4 up everything may be imported."""
TRL_FILES = {"training/sft.py", "training/reward_model.py"}


def layer(relative: Path) -> int:
    name = relative.parts[0].removesuffix(".py")
    assert name in LAYERS, f"r3hf_ray/{relative}: say in tests/test_layers.py which layer {name!r} belongs to"
    return LAYERS.get(str(relative.with_suffix("")), LAYERS[name])


def layer_of(target: list[str]) -> int:
    """Floor of an imported module of ours."""
    return LAYERS.get("/".join(target[1:3]), LAYERS.get("".join(target[1:2]), 0))


def sources() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(parts: Sequence[str]) -> str:
    """The room that a file, or an imported module of ours, is in: `records`, `instruments/report`."""
    names = [part.removesuffix(".py") for part in parts]
    return "/".join(names[:2]) if names[0] == "instruments" else names[0]


def backwards(relative: Path) -> Iterator[str]:
    """Imports of a room of the same floor that stands behind the file's own."""
    own, floor = room(relative.parts), layer(relative)
    for line, target in imports(relative):
        other = room(target[1:]) if target[0] == "r3hf_ray" and len(target) > 1 else own
        if other == own or layer_of(target) != floor:
            continue
        if ORDER.index(other) > ORDER.index(own):
            yield f"line {line}: {other} stands behind {own} in ORDER"


def imports(relative: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted module of every import of a file, inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(ast.parse((PACKAGE / relative).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["r3hf_ray", *relative.parent.parts]
            base = package[: len(package) + 1 - node.level] if node.level else []
            target = base + (node.module.split(".") if node.module else [])
            # `from r3hf_ray import models` names a module by its alias.
            yield from ((node.lineno, [*target, alias.name]) for alias in node.names)


@pytest.mark.parametrize("relative", sources(), ids=str)
def test_imports_point_down(relative: Path) -> None:
    own = layer(relative)
    allowed = set().union(*THIRD_PARTY[: own + 1]) | set(sys.stdlib_module_names)
    wrong = []
    for line, target in imports(relative):
        if target[0] == "r3hf_ray":
            above = layer_of(target) > own
            wrong += [f"line {line}: {'.'.join(target)} is in a layer above"] if above else []
        elif own < 4 and target[0] not in allowed:
            wrong.append(f"line {line}: layer {own} may not import {target[0]}")
        elif target[0] == "trl" and str(relative) not in TRL_FILES:
            wrong.append(f"line {line}: trl (9 s to import) belongs in {sorted(TRL_FILES)} only")
    assert not wrong, f"r3hf_ray/{relative}: " + "; ".join(wrong)


@pytest.mark.parametrize("relative", [path for path in sources() if layer(path) >= 4], ids=str)
def test_rooms_of_the_upper_floors_keep_their_order(relative: Path) -> None:
    if relative.name != "__init__.py":
        assert room(relative.parts) in ORDER, f"r3hf_ray/{relative}: say in ORDER where it stands"
    wrong = list(backwards(relative))
    assert not wrong, f"r3hf_ray/{relative}: " + "; ".join(wrong)


def test_an_import_against_the_order_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "records").mkdir()
    (tmp_path / "records/x.py").write_text(
        "from r3hf_ray.driver import a\nfrom r3hf_ray.session import b\nfrom r3hf_ray.records.jsonl import c\n"
    )
    (tmp_path / "instruments/pages").mkdir(parents=True)
    (tmp_path / "instruments/pages/x.py").write_text("def f():\n    from r3hf_ray.instruments.compare import page\n")
    assert list(backwards(Path("records/x.py"))) == ["line 1: driver stands behind records in ORDER"]
    assert len(list(backwards(Path("instruments/pages/x.py")))) == 1


def loaded_after_importing(modules: list[str], watched: list[str]) -> list[str]:
    """Which of `watched` a fresh interpreter has loaded after importing `modules`."""
    program = "\n".join([
        "import importlib, sys",
        f"for module in {modules!r}: importlib.import_module(module)",
        f"sys.stdout.write('LOADED ' + ' '.join(name for name in {watched!r} if name in sys.modules))",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("LOADED", 1)[1].split()


def modules(highest: int) -> list[str]:
    names = [".".join(["r3hf_ray", *path.with_suffix("").parts]) for path in sources() if layer(path) <= highest]
    return [name.removesuffix(".__init__") for name in names]


def test_data_layer_loads_no_torch() -> None:
    assert loaded_after_importing(modules(0), ["torch", "ray", "vllm", "transformers"]) == []


def test_torch_layers_load_neither_ray_nor_vllm_nor_trl() -> None:
    found = modules(2)
    assert {"r3hf_ray.algorithms.redistribution", "r3hf_ray.models.load", "r3hf_ray.training.ppo"} <= set(found)
    assert loaded_after_importing(found, ["ray", "vllm", "trl"]) == []


def test_coordinator_loads_no_torch() -> None:
    assert loaded_after_importing(["r3hf_ray.actors.coordinator"], ["torch", "vllm", "transformers"]) == []


def test_the_watch_itself_works() -> None:
    assert loaded_after_importing(["json"], ["json", "torch"]) == ["json"]
