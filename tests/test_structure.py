"""House rules that ruff has no rule for: what the package's source may not contain, and how long it may be."""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "r3hf_ray"
FILE_LINES = 350
FUNCTION_LINES = 60
CODE_LINES, CODE_LINES_OF_THE_SYSTEM = 15_430, 11_510
"""Of the whole package, and of it without `instruments/`: no blanks, comments or docstrings."""
FORBIDDEN_CALLS = {
    "getattr": "name the attribute, or use a dict of name -> function (pkgutil.resolve_name for a user's own)",
    "setattr": "name the attribute",
    "hasattr": "check the type or the version",
    "print": "show results through a rich console, events through a logger",
}
TOO_WIDE = {"Exception", "BaseException"}
FORBIDDEN_FILES = {"utils.py", "util.py", "base.py", "common.py", "helpers.py", "misc.py"}

sources = pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)


def wrong_call(node: ast.Call) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Attribute(attr="name")]):
            pass  # a walk over dataclasses.fields: every name is declared
        case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
            yield f"{name}(): {FORBIDDEN_CALLS[name]}"
    for argument in node.keywords:
        match argument:
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield "trust_remote_code=True runs a stranger's code"
            case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                yield "weights_only=False unpickles a stranger's file"


def wrong_except(node: ast.ExceptHandler) -> Iterator[str]:
    if isinstance(node.body[-1], ast.Raise):
        return  # it may note what passes by; it swallows nothing
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    if any(one is None or (isinstance(one, ast.Name) and one.id in TOO_WIDE) for one in caught):
        yield "a bare except, or except Exception: say which exceptions"


def too_long(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if length > FUNCTION_LINES:
        yield f"{node.name} has {length} lines, more than {FUNCTION_LINES}: split it"


def findings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {text}" for text in wrong_call(node))
        elif isinstance(node, ast.ExceptHandler):
            yield from (f"line {node.lineno}: {text}" for text in wrong_except(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (f"line {node.lineno}: {text}" for text in too_long(node))


@sources
def test_source_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text()
    relative = str(path.relative_to(PACKAGE))
    found = list(findings(ast.parse(text)))
    lines = text.count("\n")
    if lines > FILE_LINES:
        found.append(f"{lines} lines, more than {FILE_LINES}: split it by what it holds")
    if path.name in FORBIDDEN_FILES:
        found.append("a name that does not say what is in it")
    if "TODO" in text or "FIXME" in text:
        found.append("an unfinished mark (TODO, FIXME): do it, or say in docs/decisions.md why not")
    assert not found, f"r3hf_ray/{relative}: " + "; ".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "getattr(a, 'b')",
        "getattr(a, field.name, None)",
        "hasattr(a, 'b')",
        "print('x')",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception) as e:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
        "load(x, trust_remote_code=True)",
        "torch.load(x, weights_only=False)",
        "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
    ],
)
def test_each_rule_can_fail(source: str) -> None:
    assert len(list(findings(ast.parse(source)))) == 1


def test_allowed_code_passes() -> None:
    source = """
console.print({field.name: getattr(a, field.name) for field in fields(a)})
try:
    f(trust_remote_code=False)
except (OSError, ValueError):
    pass
try:
    f(weights_only=True)
except Exception as error:
    note(error)
    raise
"""
    assert list(findings(ast.parse(source))) == []


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, no comment, no docstring (nor any other text that stands alone)."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


def test_the_package_stays_as_small_as_it_was_made() -> None:
    of_room: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        of_room["/".join(parts[:2]) if parts[0] == "instruments" else parts[0]] += code_lines(path.read_text())
    instruments = sum(lines for room, lines in of_room.items() if room.startswith("instruments"))
    system = of_room.total() - instruments
    table = "\n".join(f"{lines:6}  {room}" for room, lines in of_room.most_common())
    assert of_room.total() <= CODE_LINES and system <= CODE_LINES_OF_THE_SYSTEM, (
        f"{of_room.total()} code lines, of which the system without instruments {system}; allowed {CODE_LINES} and "
        f"{CODE_LINES_OF_THE_SYSTEM}: drop what is there twice\n{table}"
    )


def test_only_code_counts_as_code() -> None:
    source = '''"""Docstring,
of two lines."""

import ast  # a comment


def f(x):
    """Docstring."""
    # a comment
    text = """of
    two lines"""
    return (
        ast,
        text,
    )
'''
    assert code_lines(source) == 8
