"""What earlier versions wrote is read for ever."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from backupd.archive import open_archive
from backupd.model import Silence
from backupd.repository import Repository
from backupd.stores import LocalStore
from backupd.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "format-1"
LARGE = hashlib.sha256(b"".join(b"%07d\n" % number for number in range(200_000))).hexdigest()
ORDERS = hashlib.sha256(b"".join(b"%09d\n" % number for number in range(250_000))).hexdigest()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A copy: opening must not change what is in the project."""
    shutil.copytree(GOLDEN, tmp_path / "repository")
    return Repository.open(LocalStore(tmp_path / "repository"))


def check_tree(root: Path, *, second: bool) -> None:
    assert (root / "docs" / "a.txt").read_text() == "first text\n" * 100
    assert (root / "docs" / os.fsdecode(b"caf\xe9")).read_bytes() == b"latin name"
    assert os.stat(root / "linked").st_ino == os.stat(root / "docs" / "a.txt").st_ino
    assert os.readlink(root / "soft") == "docs/a.txt"
    assert stat.S_ISFIFO(os.lstat(root / "fifo").st_mode)
    assert os.getxattr(root / "docs" / "a.txt", "user.note") == b"kept"
    assert hashlib.sha256((root / "large").read_bytes()).hexdigest() == LARGE
    assert (root / "sparse").read_bytes() == bytes(2 << 20) + b"data at the end"
    assert os.stat(root / "sparse").st_blocks < 100
    assert os.stat(root / "large").st_mtime_ns == 1_700_000_000_123_456_789
    assert (root / "empty").is_dir()
    assert (root / "docs" / "b.txt").exists() == second


def test_format_1_is_restored(repository: Repository, tmp_path: Path) -> None:
    first, second = repository.points("tree")
    for number, point in enumerate((first, second)):
        open_archive(repository, point).extract(tmp_path / str(number))
        check_tree(tmp_path / str(number), second=bool(number))
    (dump,) = repository.points("dump")
    content = b"".join(open_archive(repository, dump).read("orders.dump"))
    assert hashlib.sha256(content).hexdigest() == ORDERS


def test_format_1_is_whole(repository: Repository) -> None:
    report = verify(repository, sources=None, data_percent=100, progress=Silence())
    assert report.problems == []
    assert report.points == 3


def test_format_1_is_read_by_the_program_it_carries(repository: Repository, tmp_path: Path) -> None:
    point = repository.points("tree")[1]
    program = Path(repository.store.location) / "recover.py"
    subprocess.run(
        ["python3", "-I", program, "extract", point.id, tmp_path / "out"], check=True, capture_output=True
    )
    check_tree(tmp_path / "out", second=True)
