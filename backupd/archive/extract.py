"""Write a point's tree to a disk: pages in batches, frames read ahead, and written by processes of their own.

Directories are made first, with a mode that lets only us in, and get what they carry last, deepest first. Every
path is made of names that `page` has checked, below directories that we made: a symlink in the archive can lead
nothing out of the target.

Nothing is flushed to the disk: who needs that calls `sync` when the restore has ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import stat
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from backupd.archive.extract_apart import ExtractApart
from backupd.archive.extract_frame import FrameExtractor, Job, Part, Whole
from backupd.archive.frames import FrameReader
from backupd.archive.pack import BLOB
from backupd.archive.page import (
    CONTENT,
    GID,
    MODE,
    MTIME,
    NAME,
    SIZE,
    UID,
    Page,
    Row,
    extra_of,
    is_file,
    pieces_of,
    xattrs_of,
)
from backupd.archive.parallel import in_order
from backupd.errors import Damaged, RestoreFailed
from backupd.model import Progress

_BATCH = (10_000, 2_000)
"""Members whose places are held in memory at once, and frames, of which large files have many; twice: one batch is
planned while another is written. Larger ones would decode fewer frames twice where content lies scattered over the
packs of many runs."""
_FIRST = (1_000, 64)
"""The same of the first batch: until it is planned, nothing can be written."""
_SPAN = 1 << 20
"""Stored bytes of neighbouring frames that are read in one request."""
_NEAR, _FAR = 1, 8
"""Requests under way at once; the second where each answer takes its time."""
_THREADS = 2
"""Where no process is started: one waits for the kernel while the other computes."""
_SENT = 2
"""Jobs that a process has before the first of them is asked about."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

_Given: TypeAlias = "tuple[Job, memoryview | None]"
"""A job, and its frame as stored, or None where a process reads it."""


@dataclass(slots=True)
class _Wanted:
    """What is to be written from one frame."""

    pack: str
    frame: int
    wholes: list[Whole] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


@dataclass(slots=True)
class _Batch:
    """Members that are written together."""

    wanted: dict[tuple[str, int], _Wanted] = field(default_factory=dict)
    large: list[tuple[str, Row]] = field(default_factory=list)
    pending: list[tuple[str, Row]] = field(default_factory=list)
    """Symlinks, devices, hard links: made when the files are there."""
    members: int = 0

    def of(self, pack: str, frame: int) -> _Wanted:
        wanted = self.wanted.get((pack, frame))
        if wanted is None:
            wanted = self.wanted[pack, frame] = _Wanted(pack, frame)
        return wanted


class _Shared:
    """Jobs that several threads take from, in order, until one of them fails."""

    def __init__(self, given: Generator[_Given], stop: threading.Event) -> None:
        self._given = given
        self._stop = stop
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Given]:
        while not self._stop.is_set():
            with self._lock:
                given = next(self._given, None)
            if given is None:
                return
            yield given

    def close(self) -> None:
        with self._lock:
            self._given.close()


class _Room:
    """Where the data of a file goes, handed out in order: over the extents of a sparse one."""

    def __init__(self, extents: Sequence[Sequence[int]] | None) -> None:
        self._extents = iter([(0, 1 << 62)] if extents is None else extents)
        self._at = self._left = 0

    def take(self, length: int) -> list[tuple[int, int]]:
        """(offset, length) of each place. Raises Damaged."""
        places = []
        while length:
            if not self._left:
                extent = next(self._extents, None)
                if extent is None:
                    raise Damaged("the index has more content for a sparse file than places in it")
                self._at, self._left = extent
            step = min(self._left, length)
            if step:
                places.append((self._at, step))
            self._at, self._left, length = self._at + step, self._left - step, length - step
        return places


class Extraction:
    """One restore into one directory, by that many processes; by this one where there are none."""

    def __init__(self, into: Path, frames: FrameReader, progress: Progress, *, processes: int = 0) -> None:
        self._into = os.fspath(into)
        self._frames = frames
        self._progress = progress
        self._processes = processes
        self._made: set[str] = set()
        self._directories: list[tuple[str, Row]] = []
        self._batch = _Batch()
        self._writing: tuple[_Batch, list[Future[None]]] | None = None
        self._last = ("", 0, 0, _Wanted("", 0))  # of the last small file: pack, first blob, one behind
        self._handles: dict[str, int] = {}
        self._apart: list[ExtractApart] = []
        self._idle: queue.SimpleQueue[ExtractApart] = queue.SimpleQueue()
        self._stop = threading.Event()
        self.warnings: list[str] = []

    def run(self, pages: Iterable[Page]) -> None:
        """Raises RestoreFailed when the target is not empty, the disk refuses or a process is killed; Damaged."""
        with contextlib.ExitStack() as ending:
            try:
                os.makedirs(self._into, exist_ok=True)
                if os.listdir(self._into):
                    raise RestoreFailed(
                        f"{self._into} is not empty",
                        hint="a restore never overwrites: give an empty or a new directory",
                    )
                root = os.open(self._into, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                ending.callback(os.close, root)
                ending.callback(self._close_handles)
                self._here = FrameExtractor(root, self._frames.codec, BLOB.format)
                self._made.add("")
                self._write(root, pages)
                for path, row in reversed(self._directories):
                    self._finish_directory(path, row)
            except OSError as error:
                where = f" ({str(error.filename)[-200:]})" if error.filename else ""
                raise RestoreFailed(
                    f"the restore into {self._into} failed: {error.strerror}{where}",
                    hint="what is there now is incomplete: remove it, mend the cause, and restore again",
                ) from None
        self.warnings += self._here.warnings

    def _write(self, root: int, pages: Iterable[Page]) -> None:
        with ThreadPoolExecutor(self._processes or _THREADS, thread_name_prefix="restore") as pool:
            try:
                with contextlib.suppress(OSError):  # no memory for a process: then without
                    for _ in range(self._processes):
                        self._apart.append(ExtractApart(root, self._frames.codec.name))
                for apart in self._apart:
                    self._idle.put(apart)
                for page in pages:
                    self._plan(page)
                    members, frames = _BATCH if self._writing else _FIRST
                    if self._batch.members >= members or len(self._batch.wanted) >= frames:
                        self._next_batch(pool)
                self._next_batch(pool)
                self._end_batch()
                self.warnings += [text for apart in self._apart for text in apart.end()]
            finally:
                self._stop.set()
                for apart in self._apart:
                    apart.kill()  # whoever waits for it hears that it is gone
                pool.shutdown(wait=True, cancel_futures=True)
                for apart in self._apart:
                    apart.close()

    # --- planning a batch ---------------------------------------------------------------------------------

    def _plan(self, page: Page) -> None:
        for path, own, rows in page.dirs:
            if own is not None:
                self._make_directory(path)
                self._directories.append((path, own))
            elif path not in self._made:
                self._make_directory(path)
            prefix = path + "/" if path else ""
            for row in rows:
                self._plan_row(prefix + row[NAME], row, page.packs)
            self._batch.members += len(rows) + 1

    def _make_directory(self, path: str) -> None:
        if path in self._made:
            return
        parent = path.rpartition("/")[0]
        if parent not in self._made:
            self._make_directory(parent)
        try:
            os.mkdir(self._path(path), 0o700)
        except FileExistsError:
            raise Damaged(f"the index has {path!r} twice, as a directory and as something else") from None
        self._made.add(path)

    def _plan_row(self, name: str, row: Row, packs: list[str]) -> None:
        content = row[CONTENT]
        one = type(content) is list and len(content) == 3
        if one and (len(row) == CONTENT + 1 or (is_file(row) and "sparse" not in extra_of(row))):
            number, first, count = content
            if self._plan_small(name, row, packs[number], first, count):
                return
        if not is_file(row):
            self._batch.pending.append((name, row))
        else:
            self._plan_large(name, row, packs)

    def _plan_small(self, name: str, row: Row, pack: str, blob: int, count: int) -> bool:
        """Most files lie in one frame, and most in that of the one before. False: it does not."""
        last, first, end, wanted = self._last
        if last != pack or not first <= blob < end:
            number, first, end = self._frames.frame_of(pack, blob)
            wanted = self._batch.of(pack, number)
            self._last = (pack, first, end, wanted)
        if not 0 < count <= end - blob:
            return False
        xattrs = None if len(row) == CONTENT + 1 else xattrs_of(row)
        wanted.wholes.append((name, blob, count, row[MODE], row[MTIME], row[UID], row[GID], xattrs))
        return True

    def _plan_large(self, name: str, row: Row, packs: list[str]) -> None:
        batch = self._batch
        batch.large.append((name, row))
        room = _Room(extra_of(row).get("sparse"))
        for pack, first, count in pieces_of(row, packs):
            for number, blobs in self._frames.locate(pack, first, count):
                places = room.take(sum(blob[1] for blob in blobs))
                batch.of(pack, number).parts.append((name, first, first + len(blobs), places))
                first += len(blobs)  # noqa: PLW2901 - the next frame begins there

    # --- carrying a batch out -------------------------------------------------------------------------------

    def _next_batch(self, pool: ThreadPoolExecutor) -> None:
        """Have what was planned written, while the next is planned."""
        batch, self._batch = self._batch, _Batch()
        self._last = ("", 0, 0, _Wanted("", 0))
        for name, row in batch.large:
            fd = self._here.open(name, _NEW, 0o600)
            try:
                os.ftruncate(fd, row[SIZE])
            finally:
                os.close(fd)
        jobs = _Shared(self._given(batch), self._stop)
        writing = [pool.submit(self._work, jobs) for _ in range(len(self._apart) or _THREADS)]
        self._end_batch()
        self._writing = (batch, writing)

    def _given(self, batch: _Batch) -> Generator[_Given]:
        """What is to be written of each frame, and the frame: read ahead, or the place where a process reads it."""
        if self._apart and self._frames.file(""):
            for span in self._spans(batch, most=0):
                yield self._placed(*span), None
            return
        at_once = _FAR if self._frames.distant else _NEAR
        for given in in_order(self._spans(batch, most=_SPAN), self._read, workers=at_once, ahead=at_once + 1):
            yield from given

    def _spans(self, batch: _Batch, *, most: int) -> Iterator[list[_Wanted]]:
        """Neighbouring frames, to be read together: several of at most so many bytes, or one."""
        waiting = list(reversed(batch.wanted.values()))
        batch.wanted.clear()
        span: list[_Wanted] = []
        size = 0
        while waiting:
            wanted = waiting.pop()
            length = self._frames.directory(wanted.pack).frames[wanted.frame].length
            if span and (
                (wanted.pack, wanted.frame) != (span[-1].pack, span[-1].frame + 1) or size + length > most
            ):
                yield span
                span, size = [], 0
            span.append(wanted)
            size += length
        if span:
            yield span

    def _read(self, span: list[_Wanted]) -> list[_Given]:
        """Raises Damaged."""
        pack, first = span[0].pack, span[0].frame
        base = self._frames.directory(pack).frames[first].offset
        stored = self._frames.stored(pack, first, first + len(span))
        given: list[_Given] = []
        for wanted in span:
            job = self._placed(wanted)
            _, _, offset, length, *_ = job
            given.append((job, stored[offset - base : offset - base + length]))
        return given

    def _placed(self, wanted: _Wanted) -> Job:
        directory = self._frames.directory(wanted.pack)
        frame, starts = directory.frames[wanted.frame], directory.starts()
        first, end = starts[wanted.frame], starts[wanted.frame + 1]
        rows = bytes(directory.blobs[first * BLOB.size : end * BLOB.size])
        return (
            wanted.pack, self._frames.file(wanted.pack), frame.offset, frame.length, frame.size, wanted.frame, first,
            rows, wanted.wholes, wanted.parts,
        )  # fmt: skip

    def _work(self, jobs: _Shared) -> None:
        """What each thread does: it has a process do what comes next, or does it itself where none is idle."""
        try:
            apart = self._idle_process()
            sent = 0
            for job, stored in jobs:
                if apart is None:
                    pack, number = job[0], job[5]
                    if stored is None:
                        stored = self._frames.stored(pack, number, number + 1)  # noqa: PLW2901
                    self._progress.advance(*self._here.write(job, stored))
                    continue
                apart.send(job, stored)
                sent += 1
                if sent == _SENT:
                    self._progress.advance(*apart.written())
                    sent -= 1
            if apart is not None:
                for _ in range(sent):
                    self._progress.advance(*apart.written())
                self._idle.put(apart)
        except BaseException:
            self._stop.set()
            raise
        finally:
            jobs.close()

    def _idle_process(self) -> ExtractApart | None:
        """None where there is none, or it could not be started."""
        with contextlib.suppress(queue.Empty):
            apart = self._idle.get_nowait()
            return apart if apart.ready() else None
        return None

    def _end_batch(self) -> None:
        if self._writing is None:
            return
        (batch, writing), self._writing = self._writing, None
        for future in writing:
            future.result()
        for name, row in batch.large:
            fd = self._here.open(name, _THERE)
            try:
                self._here.finish(fd, name, *_carried(row), created=0o600)
            finally:
                os.close(fd)
            self._progress.advance(row[SIZE], 1)
        for name, row in batch.pending:
            self._make_special(name, row)
        self._close_handles()

    # --- entries without content --------------------------------------------------------------------------

    def _make_special(self, name: str, row: Row) -> None:
        extra = extra_of(row)
        path = self._path(name)
        kind = stat.S_IFMT(row[MODE])
        if "hardlink" in extra:
            first = str(extra["hardlink"])
            if first.rpartition("/")[0] not in self._made:  # through a symlink it could lead anywhere
                raise Damaged(
                    f"the index names {first!r} as the first name of {name!r}, and it is not in the tree"
                )
            os.link(self._path(first), path, follow_symlinks=False)
            return
        if kind == stat.S_IFLNK:
            os.symlink(row[CONTENT], path)
        elif kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK):
            device = extra.get("device")
            try:
                os.mknod(path, row[MODE], os.makedev(*device) if device else 0)
            except PermissionError:
                self._here.warn(f"{name}: only root can make a device")
                return
            os.chmod(path, stat.S_IMODE(row[MODE]))
        else:
            raise Damaged(f"the index has an entry of an unknown kind: {name!r}")
        if os.geteuid() == 0 and (row[UID], row[GID]) != (0, os.getegid()):
            os.lchown(path, row[UID], row[GID])
            if kind != stat.S_IFLNK:
                os.chmod(path, stat.S_IMODE(row[MODE]))
        self._here.set_xattrs(path, name, xattrs_of(row))
        os.utime(path, ns=(row[MTIME], row[MTIME]), follow_symlinks=False)
        self._progress.advance(0, 1)

    def _finish_directory(self, path: str, row: Row) -> None:
        fd = self._here.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._here.finish(fd, path, *_carried(row), created=0o700)
        finally:
            os.close(fd)

    def _path(self, name: str) -> str:
        """A path the kernel takes, for something below the target."""
        path = f"{self._into}/{name}" if name else self._into
        # 4096 bytes are the kernel's limit; a character may be four of them.
        return path if len(path) < 1000 or len(os.fsencode(path)) < 4096 else self._long_path(name)

    def _long_path(self, name: str) -> str:
        """Through a handle on the directory it is in; handles are kept until the batch is written."""
        parent, _, last = name.rpartition("/")
        if parent not in self._handles:
            self._handles[parent] = self._here.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._handles[parent]}/{last}"

    def _close_handles(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


def _carried(row: Row) -> tuple[int, int, int, int, dict[bytes, bytes]]:
    """As FrameExtractor.finish takes it: mode, mtime, uid, gid, xattrs."""
    return row[MODE], row[MTIME], row[UID], row[GID], xattrs_of(row)
