"""Start-up: a command line answers at once, and imports only what its command needs."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from backupd import __version__
from backupd.cli import COMMANDS, SUMMARIES

HEAVY = (
    "apscheduler", "asyncio", "blake3", "boto3", "botocore", "cronsim", "docker", "http", "psycopg", "pydantic",
    "redis", "requests", "rich", "sqlite3", "ssl", "urllib3", "zstandard",
)  # fmt: skip


def imported_by(*argv: str, cwd: Path | None = None) -> set[str]:
    """The top-level modules that a command line imports."""
    program = (
        "import sys; from backupd.cli import run; run(sys.argv[1:]);"
        "print('MODULES', *sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=cwd, capture_output=True, text=True, check=False
    )
    line = next(text for text in ended.stdout.splitlines() if text.startswith("MODULES"))
    return set(line.split()[1:])


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["bakup"], []], ids=" ".join)
def test_what_needs_no_command_imports_none(argv: list[str]) -> None:
    """No database client, no engine, no validation for a version number."""
    assert not imported_by(*argv) & set(HEAVY)


def test_help_of_a_command_imports_that_command_alone() -> None:
    """Reading about a backup needs no bucket and no database."""
    assert not imported_by("backup", "--help") & {
        "boto3",
        "docker",
        "psycopg",
        "redis",
        "apscheduler",
        "rich",
    }


def test_a_backup_of_a_directory_imports_neither_client_nor_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over in a tenth of a second where nothing changed: what it does not use must not double that."""
    monkeypatch.setenv("BACKUPD_STATE", str(tmp_path / "state"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("content")
    (tmp_path / "backupd.toml").write_text('[sources.data]\ndriver = "volume"\npath = "data"\n')
    imported_by("init", cwd=tmp_path)
    for _ in ("full", "unchanged"):
        imported = imported_by("-q", "backup", "data", cwd=tmp_path)
        assert imported >= {"sqlite3", "zstandard"}, "it did not get as far as a backup"
        assert not imported & {
            "apscheduler", "asyncio", "boto3", "botocore", "cronsim", "ctypes", "docker", "email", "hashlib", "http",
            "psycopg", "pydantic", "random", "redis", "requests", "rich", "secrets", "socket",
            "ssl", "tarfile", "tempfile", "urllib3", "zoneinfo",
        }  # fmt: skip
    assert len(list((tmp_path / "backups" / "points" / "data").iterdir())) == 2


def test_the_version_comes_within_150_ms_of_an_empty_python() -> None:
    """Of processor time, the least of several: what other programs do meanwhile does not decide."""

    def seconds(*argv: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *argv], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ours = min(seconds("-m", "backupd", "--version") for _ in range(5))
    empty = min(seconds("-c", "pass") for _ in range(5))
    assert ours - empty < 0.150


def test_the_version_is_the_package_s() -> None:
    """As `pip` knows it."""
    from importlib.metadata import version

    ended = subprocess.run(
        [sys.executable, "-m", "backupd", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"backupd {__version__}\n"
    assert version("backupd") == __version__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_is_listed_exists_and_explains_itself(name: str) -> None:
    """The list that --help shows is kept by hand, for the sake of start-up; here it is held to the commands."""
    from click.testing import CliRunner

    from backupd.cli import root
    from backupd.cli.options import Session

    ended = CliRunner().invoke(root, [name, "--help"], obj=Session())
    assert ended.exit_code == 0, ended.output
    assert "--json" in ended.output
    assert SUMMARIES[name]
    assert set(SUMMARIES) == set(COMMANDS)
