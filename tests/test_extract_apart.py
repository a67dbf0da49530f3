"""Processes of their own write a large restore: what lands on the disk, and what is said when it cannot."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from hypothesis import given
from hypothesis import strategies as st
from trees import describe, differences, make_beyond_path_max, make_every_kind

from backupd.archive import extract_apart
from backupd.archive.extract import Extraction, _Room
from backupd.archive.extract_apart import ExtractApart, processes
from backupd.archive.extract_frame import Job
from backupd.errors import Damaged, RestoreFailed
from backupd.model import Silence, Stream, Streams
from backupd.stores import LocalStore, MemoryStore


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For small restores, too, and on one core."""
    monkeypatch.setattr(extract_apart, "processes", lambda members, size: 2)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """However a restore ends, its processes and threads have ended."""
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert not running()


def running() -> list[str]:
    """Processes of ours that still write."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # a thread, or a child, that just ended
            children = (task / "children").read_text().split()
            found += [Path("/proc", child, "cmdline").read_text() for child in children]
    return [command for command in found if "extract_frame" in command]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ExtractApart, Job]]:
    """What the processes were given."""
    sent: list[tuple[ExtractApart, Job]] = []
    plain = ExtractApart.send

    def told(self: ExtractApart, job: Job, stored: memoryview | None) -> None:
        sent.append((self, job))
        plain(self, job, stored)

    monkeypatch.setattr(ExtractApart, "send", told)
    return sent


def on_each_job(monkeypatch: pytest.MonkeyPatch, act: Callable[[ExtractApart], object]) -> None:
    plain = ExtractApart.send

    def acting(self: ExtractApart, job: Job, stored: memoryview | None) -> None:
        act(self)
        plain(self, job, stored)

    monkeypatch.setattr(ExtractApart, "send", acting)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """40 files of 300 kB that do not compress: several frames."""
    root = tmp_path / "tree"
    for number in range(40):
        path = root / f"d{number % 4}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(number).randbytes(300_000))
    return root


def local(tmp_path: Path) -> Engine:
    return Engine(LocalStore(tmp_path / "repository", create=True))


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory"])
def test_every_kind_of_entry_comes_back_as_it_was(
    where: str, tmp_path: Path, jobs: list[tuple[ExtractApart, Job]]
) -> None:
    """Whether the processes read the frames or are given them."""
    make_every_kind(tmp_path / "tree")
    make_beyond_path_max(tmp_path / "tree" / "deep")
    engine = local(tmp_path) if where == "local" else Engine()
    point = engine.write(tmp_path / "tree")
    restored = engine.restore(point, tmp_path / "restored")
    assert len(jobs) > 3
    assert not differences(describe(tmp_path / "tree"), describe(restored))


def test_large_files_are_written_by_both(tmp_path: Path, jobs: list[tuple[ExtractApart, Job]]) -> None:
    data = random.Random(1).randbytes(20 << 20)
    engine = local(tmp_path)
    point = engine.write(Streams([Stream("a.dump", iter([data])), Stream("b.dump", iter([data[::-1]]))]))
    restored = engine.restore(point, tmp_path / "restored")
    assert (restored / "a.dump").read_bytes() == data
    assert (restored / "b.dump").read_bytes() == data[::-1]
    assert len({apart for apart, _ in jobs}) == 2


def test_content_that_is_not_side_by_side_in_its_frame_is_put_together(tmp_path: Path) -> None:
    """A first run's frame has the headers of a tar between files: what two of them hold can be one file later."""
    root = tmp_path / "tree"
    root.mkdir()
    halves = [b"SQLite format 3\0" + random.Random(seed).randbytes(20 * 16384 - 16) for seed in (1, 2)]
    for name, half in zip("ab", halves, strict=True):
        (root / name).write_bytes(half)
    engine = local(tmp_path)
    engine.write(root)
    (root / "c").write_bytes(b"".join(halves))
    point = engine.write(root)
    assert point.stored < 16384, "nothing of it is new"
    restored = engine.restore(point, tmp_path / "restored")
    assert not differences(describe(root), describe(restored))


def test_modes_are_what_they_were_whatever_the_umask(tree: Path, tmp_path: Path) -> None:
    (tree / "d0" / "file0").chmod(0o666)
    (tree / "d1" / "file1").chmod(0o600)
    engine = local(tmp_path)
    point = engine.write(tree)
    before = os.umask(0o077)
    try:
        restored = engine.restore(point, tmp_path / "restored")
    finally:
        os.umask(before)
    assert not differences(describe(tree), describe(restored))


def test_what_a_process_warns_of_is_told(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system takes only attributes that begin with a known name."""
    engine = local(tmp_path)
    for number in (0, 39):
        os.setxattr(tree / f"d{number % 4}" / f"file{number}", "user.note", b"for later")
    point = engine.write(tree)
    archive = engine.archive(point)
    plain = archive.pages

    def renamed() -> Iterator[Any]:
        for page in plain():
            for _, _, rows in page.dirs:
                for row in rows:
                    if len(row) > 10:
                        row[10] = {"xattrs": {"nobody.note": row[10]["xattrs"]["user.note"]}}
            yield page

    monkeypatch.setattr(archive, "pages", renamed)
    warnings = archive.extract(tmp_path / "restored")
    assert sorted(text.partition(": ")[0] for text in warnings) == ["d0/file0", "d3/file39"]
    assert all("nobody.note could not be set" in text for text in warnings)


def test_where_no_process_can_run_the_files_are_written_all_the_same(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[tuple[ExtractApart, Job]]
) -> None:
    engine = local(tmp_path)
    point = engine.write(tree)
    for number, broken in enumerate(["/bin/false", "/there/is/none"]):
        monkeypatch.setattr(sys, "executable", broken)
        restored = engine.restore(point, tmp_path / f"restored-{number}")
        assert not differences(describe(tree), describe(restored))
    assert not jobs


def test_a_small_restore_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert processes(100, 1 << 20) == 0
    assert processes(60_000, 1 << 20) == 2
    assert processes(1, 1 << 30) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert processes(60_000, 1 << 30) == 0


# --- bad ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_damaged_frame_is_told_with_the_name_of_a_file_in_it(
    where: str, part: float, tree: Path, tmp_path: Path
) -> None:
    engine = local(tmp_path) if where == "local" else Engine()
    point = engine.write(tree)
    name = next(name for name, _ in engine.repository.packs("tree"))
    key = f"packs/tree/{name}.zst"
    data = bytearray(engine.store.get(key))
    data[int(len(data) * part)] ^= 1
    engine.store.put(key, bytes(data), overwrite=True)
    with pytest.raises(Damaged, match=rf"^d\d/file\d+: .*the pack {name}") as failure:
        engine.restore(point, tmp_path / "restored")
    assert failure.value.exit_code == 22


def test_content_that_is_whole_but_not_what_was_written_is_told(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of each blob is compared in the process, not only the checksum of the frame."""
    engine = local(tmp_path)
    point = engine.write(tree)
    plain = ExtractApart.send

    def forged(self: ExtractApart, job: Job, stored: memoryview | None) -> None:
        *before, rows, wholes, parts = job
        changed = bytearray(rows)
        changed[-1] ^= 1  # of the digest of the last blob
        plain(self, (*before, bytes(changed), wholes, parts), stored)  # type: ignore[arg-type]

    monkeypatch.setattr(ExtractApart, "send", forged)
    with pytest.raises(Damaged, match=r"^d\d/file\d+: content in the pack .* is not what was written"):
        engine.restore(point, tmp_path / "restored")


def test_a_pack_that_is_gone_is_told(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it goes after its directory was read."""
    engine = local(tmp_path)
    point = engine.write(tree)
    on_each_job(
        monkeypatch, lambda apart: shutil.rmtree(tmp_path / "repository" / "packs", ignore_errors=True)
    )
    with pytest.raises(Damaged, match="cannot be read: No such file"):
        engine.restore(point, tmp_path / "restored")
    with pytest.raises(Damaged, match="is missing"):
        engine.restore(point, tmp_path / "again")


def test_a_process_that_is_killed_ends_the_restore(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = local(tmp_path)
    point = engine.write(tree)
    on_each_job(monkeypatch, lambda apart: os.kill(apart.pid, signal.SIGKILL))
    with pytest.raises(RestoreFailed, match="a process that writes files was killed") as failure:
        engine.restore(point, tmp_path / "restored")
    assert "memory" in failure.value.hint


def test_a_disk_that_refuses_is_told_with_its_reason(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses a process more than 100 kB of a file: as with a disk that is full, with another reason."""
    engine = local(tmp_path)
    point = engine.write(tree)
    most = (100_000, 100_000)
    on_each_job(monkeypatch, lambda apart: resource.prlimit(apart.pid, resource.RLIMIT_FSIZE, most))
    with pytest.raises(RestoreFailed, match="File too large") as failure:
        engine.restore(point, tmp_path / "restored")
    assert "incomplete" in failure.value.hint


@pytest.mark.parametrize("error", [KeyboardInterrupt, Damaged("a page")])
def test_when_the_reader_of_the_index_fails_the_processes_end(
    tree: Path, tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    engine = local(tmp_path)
    archive = engine.archive(engine.write(tree))

    def pages() -> Iterator[Any]:
        yield from archive.pages()
        raise error

    extraction = Extraction(tmp_path / "restored", archive.frames, Silence(), processes=2)
    with pytest.raises((KeyboardInterrupt, Damaged)):
        extraction.run(pages())


# --- from afar -----------------------------------------------------------------------------------------------------


class Afar(MemoryStore):
    """Each answer takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.under_way = self.most = 0
        self._count = threading.Lock()

    @property
    def location(self) -> str:
        return "far://away"

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._count:
            self.reads += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            time.sleep(0.02)
            return super().get(key, offset=offset, length=length)
        finally:
            with self._count:
                self.under_way -= 1


@pytest.mark.parametrize("count", [0, 2])
def test_several_requests_are_under_way_at_a_distant_store(tmp_path: Path, count: int) -> None:
    """And neighbouring frames come in one."""
    text = b"".join(b"line %d of a text that compresses\n" % number for number in range(1_500_000))
    engine = Engine(Afar())
    noise = random.Random(3).randbytes(16 << 20)
    point = engine.write(Streams([Stream("a", iter([noise])), Stream("b", iter([text]))]))
    archive = engine.archive(point)
    directories = [archive.frames.directory(name) for name, _ in engine.repository.packs("tree")]
    assert isinstance(engine.store, Afar)
    engine.store.reads = engine.store.most = 0
    extraction = Extraction(tmp_path / "restored", archive.frames, Silence(), processes=count)
    extraction.run(archive.pages())
    assert (tmp_path / "restored" / "a").read_bytes() == noise
    assert (tmp_path / "restored" / "b").read_bytes() == text
    assert engine.store.most >= 4
    assert engine.store.reads < sum(len(directory.frames) for directory in directories)


# --- where the data of a sparse file goes ---------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=8),
    st.lists(st.integers(0, 40), max_size=12),
)
def test_the_places_handed_out_are_the_extents_in_order(
    gaps: list[tuple[int, int]], lengths: list[int]
) -> None:
    extents, end = [], 0
    for gap, length in gaps:
        extents.append([end + gap, length])
        end += gap + length
    expected = [offset + index for offset, length in extents for index in range(length)]
    room = _Room(extents)
    found: list[int] = []
    try:
        for length in lengths:
            places = room.take(length)
            assert all(size > 0 for _, size in places)
            taken = [offset + index for offset, size in places for index in range(size)]
            assert len(taken) == length
            found += taken
    except Damaged:
        assert sum(lengths) > len(expected)
    assert found == expected[: len(found)]


def test_a_file_without_holes_has_one_place_for_each_frame() -> None:
    room = _Room(None)
    assert [room.take(length) for length in (5, 0, 7)] == [[(0, 5)], [], [(5, 7)]]
