"""A second process lists half of a large tree; what was moved is found by its inode. Neither changes what is kept."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import describe, differences, make_every_kind

from backupd.archive import scan_ahead
from backupd.archive.scan import Block, Scan, sort_key
from backupd.archive.scan_ahead import ScanAhead, halfway
from backupd.errors import CaptureFailed
from backupd.model import Tree
from backupd.repository import PageRef


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """400 files in 80 directories, three deep: some ten pages."""
    root = tmp_path / "tree"
    for number in range(400):
        path = root / f"{number % 4}" / f"d{number % 20}" / f"e{number % 80}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d " % number * (number + 1))
    time.sleep(0.1)  # until nothing is young enough to be read again for the sake of the clock's ticks
    return root


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[ScanAhead]:
    """Small trees are shared out too; the processes that were started."""
    monkeypatch.setattr(scan_ahead, "LEAST", 1)
    monkeypatch.setattr(scan_ahead, "_HEAD_START", 0)
    started: list[ScanAhead] = []
    plain = ScanAhead.__init__

    def told(self: ScanAhead, *args: object) -> None:
        started.append(self)
        plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ScanAhead, "__init__", told)
    return started


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    plain = os.open

    def watched(path: object, *args: object, **kwargs: object) -> int:
        names.append(str(path))
        return plain(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", watched)
    return names


# --- sharing a walk out ---------------------------------------------------------------------------------------------


def blocks(root: Path, start: str = "", end: str | None = None) -> Iterator[Block]:
    handle = os.open(root, os.O_RDONLY)
    try:
        scan = Scan(handle, wanted=None, one_file_system=True, warn=pytest.fail, start=start, end=end)
        for page in scan.pages():
            yield from page
    finally:
        os.close(handle)


names = st.text(
    st.characters(blacklist_characters="/\0", max_codepoint=0x2FF), min_size=1, max_size=4
).filter(lambda name: name not in (".", ".."))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(names, min_size=1, max_size=4), max_size=12), st.randoms())
def test_two_halves_of_a_walk_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]], chance: object
) -> None:
    """Whatever the names, and wherever the second half begins."""
    root = tmp_path_factory.mktemp("walk")
    for parts in paths:
        (root / "/".join(parts)).mkdir(parents=True, exist_ok=True)
    whole = list(blocks(root))
    for path, *_ in whole:
        middle = sort_key(path)
        if middle:
            first, second = list(blocks(root, end=middle)), list(blocks(root, start=middle))
            assert sorted(first + second) == sorted(whole)
            assert all(sort_key(block[0]) < middle for block in first)


def test_the_second_half_begins_at_a_whole_directory() -> None:
    def page(first: str, members: int) -> PageRef:
        return PageRef("", "p", 0, 0, 0, "", first, (), members, 0)

    pages = [page("", 10_000), page("a", 9_000), page("a\0x", 9_000), page("b", 5_000)]
    assert halfway(pages) == "b"
    assert halfway(pages[:3]) == ""
    assert halfway([page("", 10), page("a", 10)]) == ""  # too small to be worth a process


# --- with the process ------------------------------------------------------------------------------------------------


def test_an_unchanged_tree_is_taken_over_and_no_file_opened(
    tree: Path, ahead: list[ScanAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    engine.write(tree)
    assert not ahead  # nothing is known of where its middle is
    names = opened(monkeypatch)
    point = engine.write(tree)
    assert len(ahead) == 1
    assert point.members == 400 + 4 + 20 + 80 + 1
    assert engine.written is not None
    assert engine.written.stored == 0
    assert not [name for name in names if name.startswith("file")]


def test_what_changed_in_either_half_is_kept(tree: Path, tmp_path: Path, ahead: list[ScanAhead]) -> None:
    engine = Engine()
    engine.write(tree)
    for top in "0123":
        folder = tree / top / f"d{top}" / f"e{top}"
        (folder / "new").write_text(f"new in {top}")
        next(folder.glob("file*")).unlink()
        (tree / top / "link").symlink_to("somewhere")
    time.sleep(0.1)
    point = engine.write(tree)
    assert len(ahead) == 1
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))


def test_every_kind_of_entry_in_two_halves(tree: Path, tmp_path: Path, ahead: list[ScanAhead]) -> None:
    """Names of a file in both halves, sockets, warnings, patterns: as one walk would have it."""
    make_every_kind(tree / "0" / "kinds")
    make_every_kind(tree / "3" / "kinds")
    os.link(tree / "0" / "d0" / "e0" / "file0", tree / "3" / "another name")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tree / "3")
        listener.bind("listening")
        os.chdir(tmp_path)
        engine = Engine()
        engine.write(Tree(tree, exclude=("e7*",)))
        first = engine.written
        time.sleep(0.1)
        point = engine.write(Tree(tree, exclude=("e7*",)))
        assert len(ahead) == 1
        assert engine.written is not None
        assert first is not None
        assert engine.written.sockets == first.sockets
        assert engine.written.members == first.members
        restored = engine.restore(point, tmp_path / "restored")
    assert not list(restored.rglob("e7?"))
    assert os.stat(restored / "3" / "another name").st_ino == os.stat(restored / "0/d0/e0/file0").st_ino


def test_where_the_process_cannot_run_the_reader_lists_alone(
    tree: Path, tmp_path: Path, ahead: list[ScanAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    engine.write(tree)
    (tree / "3" / "new").write_text("new")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    point = engine.write(tree)
    assert len(ahead) == 1
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))


def test_a_process_that_dies_half_way_fails_the_capture(
    tree: Path, ahead: list[ScanAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had not said is not known: a short list must never become a point."""
    engine = Engine()
    engine.write(tree)
    plain = ScanAhead._read
    reads = 0

    def cut(self: ScanAhead, size: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 2:
            raise scan_ahead.Ended
        return plain(self, size)

    monkeypatch.setattr(ScanAhead, "_read", cut)
    with pytest.raises(CaptureFailed, match="was killed"):
        engine.write(tree)
    assert ahead[0]._process.returncode is not None


# --- moved ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_moved_costs_its_metadata_and_no_file_is_opened(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is listed in many pages."""
    big = tree / "big"
    big.mkdir()
    for number in range(1000):
        (big / f"n{number}").write_bytes(os.urandom(300))
    time.sleep(0.1)
    engine = Engine()
    engine.write(tree)
    big.rename(tree / "2" / "grown")
    (tree / "0").rename(tree / "zero")
    names = opened(monkeypatch)
    point = engine.write(tree)
    assert not [name for name in names if name.startswith(("file", "n"))]
    assert engine.written is not None
    assert engine.written.stored < 40_000
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))


def test_a_file_changed_after_its_directory_moved_is_read(tree: Path, tmp_path: Path) -> None:
    engine = Engine()
    engine.write(tree)
    (tree / "1").rename(tree / "one")
    for path in (tree / "one").rglob("file*"):
        if int(path.name[4:]) % 3 == 0:
            path.write_bytes(b"changed " + path.name.encode())
    point = engine.write(tree)
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))


def test_another_directory_in_the_place_and_with_the_inode_of_one_that_went_is_read(
    tree: Path, tmp_path: Path
) -> None:
    engine = Engine()
    engine.write(tree)
    moved = tree / "1"
    moved.rename(tree / "elsewhere")
    moved.mkdir()
    for number in range(40):
        (moved / f"file{number}").write_bytes(b"other %d" % number)
    point = engine.write(tree)
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))
