"""What a run takes over from the one before, and what it must look at again."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from trees import describe, differences

from backupd.archive import scan
from backupd.archive.earlier import load_directory
from backupd.model import Bytes

Open = Callable[..., int]


def settle() -> None:
    """Until nothing is young enough to be read again for the sake of the clock's ticks."""
    time.sleep(0.1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for directory in range(6):
        (root / str(directory)).mkdir(parents=True)
        for number in range(4):
            (root / str(directory) / f"file{number}").write_bytes(b"%d %d" % (directory, number) * 50)
    settle()
    return root


def watch_open(monkeypatch: pytest.MonkeyPatch, before: Callable[[object], None]) -> None:
    plain: Open = os.open

    def watched(path: Any, *args: Any, **kwargs: Any) -> int:
        before(path)
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)


def test_one_changed_file_is_the_only_one_that_is_opened(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.write(tree)
    (tree / "3" / "file2").write_bytes(b"new")
    settle()
    opened: list[object] = []
    with monkeypatch.context() as patch:
        watch_open(patch, opened.append)
        engine.write(tree)
    assert [name for name in opened if str(name).startswith("file")] == ["file2"]
    # Each directory once to list it, and again only the one with something to read.
    assert sorted(str(name) for name in opened if str(name) in "012345") == list("0123345")


def test_a_file_that_could_not_be_read_is_missed_and_told_again_by_the_next_run(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()

    def refuse(path: object) -> None:
        if path == "file1":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        watch_open(patch, refuse)
        for _ in range(2):
            settle()
            point = engine.write(tree)
            assert len(point.warnings) == 6
            assert "0/file1: Input/output error: left out" in point.warnings
    settle()
    point = engine.write(tree)
    assert point.warnings == ()
    restored = engine.restore(point, tmp_path / "restored")
    assert (restored / "5" / "file1").read_bytes() == (tree / "5" / "file1").read_bytes()


def test_a_directory_swapped_for_a_link_after_it_was_listed_is_not_followed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "below" / "file0").write_text("not ours to take")
    (tree / "2" / "below").mkdir()
    (tree / "2" / "below" / "file0").write_text("ours")
    settle()
    looked = 0

    def swap(path: object) -> None:
        nonlocal looked
        looked += path == "2/below"
        if path == "2/below" and looked == 2:  # first it is listed, then read
            (tree / "2").rename(tmp_path / "away")
            (tree / "2").symlink_to(outside)

    engine = Engine()
    with monkeypatch.context() as patch:
        watch_open(patch, swap)
        point = engine.write(tree)
    assert any(warning.startswith("2/below: was replaced") for warning in point.warnings)
    restored = engine.restore(point, tmp_path / "restored")
    assert not (restored / "2" / "below" / "file0").exists()
    assert (restored / "4" / "file3").read_bytes() == (tree / "4" / "file3").read_bytes()


def test_an_attribute_set_on_a_directory_is_kept_by_the_next_run(tree: Path, tmp_path: Path) -> None:
    engine = Engine()
    engine.write(tree)
    os.setxattr(tree / "1", "user.colour", b"blue")
    settle()
    point = engine.write(tree)
    restored = engine.restore(point, tmp_path / "restored")
    assert os.getxattr(restored / "1", "user.colour") == b"blue"


def test_large_files_of_an_interrupted_run_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends its page, so that what was stored of the others is known by its stat tuples alone."""
    monkeypatch.setattr(scan, "_LARGE", 2 << 20)
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(12):
        (root / f"image{number:02}").write_bytes(os.urandom(3 << 20))
    settle()
    engine = Engine()
    store: Any = engine.repository.store
    with monkeypatch.context() as patch:
        plain, puts = store.put, 0

        def die(key: str, data: Bytes, *, overwrite: bool = False) -> None:
            nonlocal puts
            puts += 1
            if puts > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain(key, data, overwrite=overwrite)

        patch.setattr(store, "put", die)
        with pytest.raises(OSError, match="No space left"):
            engine.write(root)
    opened: list[object] = []
    with monkeypatch.context() as patch:
        watch_open(patch, opened.append)
        point = engine.write(root)
    stored_before = 5  # of 3 MiB each in the one pack of 16 MiB that was stored
    assert len([name for name in opened if str(name).startswith("image")]) == 12 - stored_before
    assert not differences(describe(root), describe(engine.restore(point, tmp_path / "restored")))


def test_a_file_changed_in_a_later_page_of_a_long_directory_is_read(tree: Path, tmp_path: Path) -> None:
    """Its first page, which holds what is known of the directory itself, is taken over."""
    long = tree / "long"
    long.mkdir()
    for number in range(1000):
        (long / f"n{number:04}").write_bytes(b"%d" % number)
    settle()
    engine = Engine()
    engine.write(tree)
    (long / "n0990").write_bytes(b"new")
    settle()
    point = engine.write(tree)
    assert point.warnings == ()
    assert not differences(describe(tree), describe(engine.restore(point, tmp_path / "restored")))


def test_content_is_found_in_the_packs_of_a_run_that_is_no_point_any_more(tree: Path) -> None:
    """Pruned, its packs stay as long as a later point needs them."""
    engine = Engine()
    first = engine.write(tree)
    (tree / "0" / "new").write_text("new")
    settle()
    engine.write(tree)
    with engine.repository.lease(engine.source) as lease:
        engine.repository.remove_point(first, lease)
    (tree / "1" / "file1").rename(tree / "2" / "moved")
    settle()
    engine.write(tree)
    assert engine.written is not None
    assert not [pack for pack in engine.written.packs if pack.name.startswith(engine.repository.points()[-1].id)
                and any(frame.size for frame in load_directory(engine.repository, engine.source, pack.name,
                                                               pack.size)[0].frames)]  # fmt: skip
