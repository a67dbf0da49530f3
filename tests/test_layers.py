"""The house rules, held by tools: floors, types, style, one third-party library to a room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "backupd"

ROOMS = {
    "apscheduler": ["scheduler"],
    "boto3": ["stores/s3"],
    "botocore": ["stores/s3"],
    "click": ["cli"],
    "cronsim": ["scheduler"],
    "docker": ["sandbox"],
    "prometheus_client": ["metrics"],
    "psycopg": ["drivers/postgres"],
    "redis": ["drivers/redis"],
    "rich": ["cli"],
}
"""Third-party library -> where it may be imported: a room, or the beginning of a module's name."""

MAX_FILE, MAX_FUNCTION = 500, 70


def _run(*argv: str) -> None:
    """Run a tool of this environment in the project's folder; its words are the failure's message."""
    ended = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        pytest.fail(f"{' '.join(argv)}\n{ended.stdout}{ended.stderr}", pytrace=False)


def test_imports_go_downward_only() -> None:
    """The layers and contracts of pyproject.toml; a module without a floor fails too."""
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        pytest.fail(ended.stdout + ended.stderr, pytrace=False)


def test_ruff_finds_nothing() -> None:
    """Lint, with the rules and the reasoned exceptions of pyproject.toml."""
    _run("ruff", "check", "--quiet")


def test_everything_is_formatted() -> None:
    """One format, no discussion."""
    _run("ruff", "format", "--check", "--quiet")


def test_types_are_strict() -> None:
    """mypy --strict over the package and, a little more lenient, over the tests: one that calls something wrongly
    proves nothing."""
    _run("mypy")


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_one_third_party_library_one_room() -> None:
    """What a library does is known in one place, so that it can be replaced there."""
    strays = []
    for path in _sources():
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for line, name in _imports(ast.parse(path.read_text())):
            library = name.partition(".")[0]
            if library in ROOMS and not any(module.startswith(room) for room in ROOMS[library]):
                strays.append(f"{path.relative_to(ROOT)}:{line}: {library} belongs to {ROOMS[library]}")
    assert strays == []


def test_no_file_and_no_function_is_too_long_to_read() -> None:
    """A file is read in one sitting, a function on one screen."""
    long = []
    for path in _sources():
        text = path.read_text()
        where = path.relative_to(ROOT)
        if text.count("\n") > MAX_FILE:
            long.append(f"{where}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long.append(f"{where}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []
