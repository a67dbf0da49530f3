"""Directories: captured and restored as they were, also while they change."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trees import describe, differences, make_beyond_path_max, make_every_kind
from volumes import backed_up, names_in, now, of_path, point_of

from backupd.drivers.volume_facts import facts_of, found_below, found_in_archive
from backupd.errors import CaptureFailed
from backupd.model import RunStatus
from backupd.repository import Repository
from backupd.stores.memory import MemoryStore


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), clock=now)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("every") / "kind"
    make_every_kind(root)
    yield root
    shutil.rmtree(root)


# --- a directory -----------------------------------------------------------------------------------------


def test_every_kind_of_entry_comes_back(every_kind: Path, repository: Repository, tmp_path: Path) -> None:
    """Links, attributes, ACLs, holes, odd names, owners, times, devices: nothing differs."""
    run = backed_up(of_path(every_kind), repository)
    assert (run.status, run.warnings) == (RunStatus.OK, ())
    point_of(run, repository).extract(tmp_path / "back")
    assert differences(describe(every_kind), describe(tmp_path / "back")) == []


def test_every_kind_of_entry_comes_back_as_tar(
    every_kind: Path, repository: Repository, tmp_path: Path
) -> None:
    """The same by `export` and GNU tar."""
    run = backed_up(of_path(every_kind), repository)
    argv = ["tar", "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "-C", str(tmp_path)]
    tar = b"".join(point_of(run, repository).tar())
    subprocess.run(argv, input=tar, check=True, stderr=subprocess.DEVNULL)
    assert differences(describe(every_kind), describe(tmp_path)) == []


def test_an_unchanged_tree_stores_next_to_nothing(every_kind: Path, repository: Repository) -> None:
    """The second run takes over what the first one wrote, hard links and holes too."""
    first = backed_up(of_path(every_kind), repository)
    second = backed_up(of_path(every_kind), repository)
    assert second.size == first.size
    assert second.stored < first.stored // 20
    assert facts_of(found_in_archive(point_of(second, repository))) == facts_of(found_below(every_kind))


def test_a_file_with_three_names_is_stored_once(tmp_path: Path, repository: Repository) -> None:
    """Hard links are not doubled, neither in the repository nor after the restore."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "one").write_bytes(os.urandom(2_000_000))
    os.link(root / "one", root / "two")
    os.link(root / "one", root / "three")
    run = backed_up(of_path(root), repository)
    assert run.size == 2_000_000
    assert run.stored < 2_100_000
    point_of(run, repository).extract(tmp_path / "back")
    assert (tmp_path / "back" / "one").stat().st_nlink == 3


def test_paths_longer_than_the_kernel_takes_come_back(tmp_path: Path, repository: Repository) -> None:
    """4,096 bytes is the limit of one call, not of a tree."""
    try:
        make_beyond_path_max(tmp_path / "deep")
        run = backed_up(of_path(tmp_path / "deep"), repository)
        assert run.warnings == ()
        point_of(run, repository).extract(tmp_path / "back")
        assert differences(describe(tmp_path / "deep"), describe(tmp_path / "back")) == []
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep", tmp_path / "back"], check=True)


def test_includes_and_excludes_choose(tmp_path: Path, repository: Repository) -> None:
    """What is excluded is in no point; what is included brings the directories on its way."""
    root = tmp_path / "data"
    for name in ("keep/a.txt", "keep/b.tmp", "cache/big", "docs/deep/c.txt", "d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    run = backed_up(of_path(root, exclude=("*.tmp", "/cache/")), repository)
    assert names_in(point_of(run, repository)) == {
        "keep",
        "keep/a.txt",
        "docs",
        "docs/deep",
        "docs/deep/c.txt",
        "d.txt",
    }
    run = backed_up(of_path(root, include=("docs/**/*.txt",)), repository)
    assert names_in(point_of(run, repository)) == {"docs", "docs/deep", "docs/deep/c.txt"}


def test_a_file_system_without_attributes_is_read(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS 3, and the directories that Docker Desktop shares, answer "not supported"; every file is there still."""

    def none(*_: object, **__: object) -> list[str]:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "listxattr", none)
    run = backed_up(of_path(tmp_path), repository)
    assert run.warnings == ()
    assert names_in(point_of(run, repository)) == {"file", "link"}


def test_what_is_mounted_inside_is_left_out_and_told(tmp_path: Path, repository: Repository) -> None:
    """A volume below the directory is another source; excluding it says that one knows."""
    inside = tmp_path / "uploads"
    inside.mkdir()
    (tmp_path / "file").write_text("content")
    subprocess.run(["mount", "-t", "tmpfs", "none", inside], check=True)
    try:
        (inside / "photo").write_text("photo")
        run = backed_up(of_path(tmp_path), repository)
        assert run.warnings == ("uploads: another file system is mounted here: what is in it was left out",)
        assert names_in(point_of(run, repository)) == {"file", "uploads"}
        assert backed_up(of_path(tmp_path, exclude=("/uploads/",)), repository).warnings == ()
    finally:
        subprocess.run(["umount", inside], check=True)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_place_that_is_none_fails_with_a_hint(kind: str, tmp_path: Path, repository: Repository) -> None:
    """Before anything is written."""
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("a file")
    with pytest.raises(CaptureFailed) as caught:
        backed_up(of_path(place), repository)
    assert str(place) in caught.value.message
    assert caught.value.hint
    assert repository.points() == []
    assert [problem.fatal for problem in of_path(place).check()] == [True]


def test_check_tells_of_patterns_that_match_nothing_and_of_an_empty_place(tmp_path: Path) -> None:
    """Whole paths of the host are the usual mistake."""
    problems = of_path(tmp_path, exclude=(f"{tmp_path}/cache",)).check()
    assert problems[0].hint == "write /cache"
    assert "is empty" in problems[1].message
    assert not problems[1].fatal


# --- while it changes ------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    """Files enough for the first to be read long before the last."""
    root = tmp_path / "data"
    for number in range(400):
        path = root / f"d{number // 40:02d}" / f"f{number:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number % 256]) * 10_000)
    return root


def when_opened(monkeypatch: pytest.MonkeyPatch, trigger: str, meddle: Callable[[], None]) -> None:
    """Run `meddle` once, just before the file named `trigger` is opened, as a busy application would."""
    real = os.open
    done: list[bool] = []

    def opened(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == trigger and not done:
            done.append(True)
            meddle()
        return real(path, flags, mode, dir_fd=dir_fd)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)


def test_files_that_vanish_and_grow_and_shrink_are_named_and_the_rest_is_whole(
    changing: Path, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes must not abort everything."""
    large = changing / "z-large"
    large.write_bytes(os.urandom(5_000_000))
    before = describe(changing)

    def meddle() -> None:
        (changing / "d00" / "f020").unlink()
        os.truncate(changing / "d00" / "f021", 10)
        with open(changing / "d00" / "f022", "ab") as file:
            file.write(b"more")
        shutil.rmtree(changing / "d09")

    when_opened(monkeypatch, "f010", meddle)
    run = backed_up(of_path(changing), repository)
    monkeypatch.undo()
    assert run.status is RunStatus.WARNED
    told = " ".join(run.warnings)
    assert "d00/f020" in told
    assert "d09" in told
    point_of(run, repository).extract(tmp_path / "back")
    after = describe(tmp_path / "back")
    touched = ("d00/f020", "d00/f021", "d00/f022", "d09")
    for path, entry in before.items():
        if not path.startswith(touched) and entry["type"] != "d":
            assert after[path] == entry
    assert (tmp_path / "back" / "d00" / "f021").stat().st_size == 10
    assert (tmp_path / "back" / "d00" / "f022").stat().st_size == 10_004


def test_a_file_that_never_stands_still_is_kept_and_named(tmp_path: Path, repository: Repository) -> None:
    """A log that is written to all the time: what was there is kept, and the run says so."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "still").write_bytes(b"still")
    log = root / "busy.log"
    log.write_bytes(b"x" * 30_000_000)
    stop = threading.Event()

    def write() -> None:
        with open(log, "ab", buffering=0) as file:
            while not stop.wait(0.001):
                file.write(b"line\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        run = backed_up(of_path(root), repository)
    finally:
        stop.set()
        writer.join()
    assert run.status is RunStatus.WARNED
    assert any("busy.log" in warning for warning in run.warnings)
    point_of(run, repository).extract(tmp_path / "back")
    assert (tmp_path / "back" / "still").read_bytes() == b"still"
    assert (tmp_path / "back" / "busy.log").read_bytes().startswith(b"x" * 30_000_000)
