"""A repository carries the means of its own recovery: recover.py, on a machine that never heard of backupd."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import StartService
from engine import Engine
from trees import describe, make_every_kind

from backupd.model import Silence, Stream, Streams
from backupd.prune import GRACE, prune
from backupd.repository import Repository
from backupd.retention import Policy
from backupd.stores import LocalStore


def recover(repository: Path, *argv: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """With the system's bare Python: no module of ours can be imported, the zstd program does the reading."""
    return subprocess.run(
        ["python3", "-I", repository / "recover.py", *argv],
        capture_output=True, text=True, check=False, env={"PATH": path, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(LocalStore(tmp_path / "repository", create=True))


def test_a_tree_comes_back_without_backupd(engine: Engine, tmp_path: Path) -> None:
    make_every_kind(tmp_path / "tree")
    first = engine.write(tmp_path / "tree")
    (tmp_path / "tree" / "new").write_bytes(b"only in the second point" * 100_000)
    shutil.rmtree(tmp_path / "tree" / "many")
    second = engine.write(tmp_path / "tree")
    done = recover(tmp_path / "repository", "extract", second.id[:6], str(tmp_path / "second"))
    assert done.returncode == 0, done.stderr
    assert describe(tmp_path / "second") == describe(tmp_path / "tree")
    assert recover(tmp_path / "repository", "extract", first.id, str(tmp_path / "first")).returncode == 0
    assert describe(tmp_path / "first") == describe(engine.restore(first, tmp_path / "ours"))


def test_a_tree_comes_back_without_backupd_after_it_was_repacked(engine: Engine, tmp_path: Path) -> None:
    """Frames of the first run's tar, copied, and frames of what was taken out of others, in one pack."""
    make_every_kind(tmp_path / "tree")
    noise = random.Random(1)
    for number in range(6):
        (tmp_path / "tree" / f"large-{number}").write_bytes(noise.randbytes(2_500_000))
    engine.write(tmp_path / "tree")
    for name in ("large-0", "large-2", "sizes/3333333.bin"):
        (tmp_path / "tree" / name).unlink()
    point = engine.write(tmp_path / "tree")
    for _ in range(2):
        report = prune(
            engine.repository, {"tree": Policy(last=1)}, clock=engine.clock, max_unused=0, progress=Silence()
        )
        engine.now += 2 * GRACE
    assert report.bytes_freed > 0
    done = recover(tmp_path / "repository", "extract", point.id, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert describe(tmp_path / "out") == describe(tmp_path / "tree")


def test_it_lists_points_and_what_is_in_them(engine: Engine, tmp_path: Path) -> None:
    point = engine.write(Streams([Stream("orders.dump", iter([b"data" * 1_000_000]))]))
    repository = tmp_path / "repository"
    assert point.id in recover(repository, "list").stdout
    assert "orders.dump" in recover(repository, "ls", point.id).stdout
    recover(repository, "extract", point.id, str(tmp_path / "out"))
    assert (tmp_path / "out" / "orders.dump").read_bytes() == b"data" * 1_000_000


def test_it_runs_in_a_container_that_holds_nothing_of_ours(
    engine: Engine, tmp_path: Path, start_container: StartService
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content\n" * 300_000)
    point = engine.write(tmp_path / "tree")
    bare = start_container(
        "python:3.11-slim", ["sleep", "600"], volumes={str(tmp_path / "repository"): "/repository"}
    )
    assert bare.exec("sh", "-c", "python3 -c 'import backupd' 2>&1 || true").strip().endswith("'backupd'")
    if not bare.exec(
        "sh", "-c", "command -v zstd || true"
    ).strip():  # the official image has none: it can be had
        bare.exec("sh", "-c", "pip install -q zstandard")
    said = bare.exec("python3", "/repository/recover.py", "extract", point.id, "/tmp/out")
    assert "2 entries" in said
    assert bare.exec("sh", "-c", "sha256sum < /tmp/out/file").split()[0] == _sha256(
        tmp_path / "tree" / "file"
    )


def test_damage_and_nonsense_are_told_in_one_line(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content\n" * 300_000)
    point = engine.write(tmp_path / "tree")
    repository = tmp_path / "repository"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    nonsense = [("extract", "ffff", "x"), ("extract", point.id, str(tmp_path / "full"))]
    pack = next((repository / "packs").rglob("*.zst"))
    for argv in nonsense:
        done = recover(repository, *argv)
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1
    whole = bytearray(pack.read_bytes())
    whole[100] ^= 1
    pack.write_bytes(whole)
    done = recover(repository, "extract", point.id, str(tmp_path / "out"))
    assert done.returncode != 0
    assert done.stderr.startswith("recover.py: compressed data cannot be read")


def test_without_any_way_to_read_zstd_it_says_what_to_install(engine: Engine, tmp_path: Path) -> None:
    engine.write(Streams([Stream("a", iter([b"x"]))]))
    done = subprocess.run(
        [sys.executable, "-I", "-S", tmp_path / "repository" / "recover.py", "list"],
        capture_output=True, text=True, check=False, env={"PATH": "/nowhere"},
    )  # fmt: skip
    assert "install" in done.stderr


def test_every_repository_gets_the_current_program(engine: Engine, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent / "backupd" / "recovery"
    for name in ("RECOVER.md", "recover.py"):
        assert (tmp_path / "repository" / name).read_bytes() == (root / name).read_bytes()
    assert Repository.open(LocalStore(tmp_path / "repository")).id == engine.repository.id


def _sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
