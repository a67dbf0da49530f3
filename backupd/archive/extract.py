"""Write a point's tree to a disk: pages in batches, frames decoded and files written in parallel.

Directories are made first, with a mode that lets only us in, and get what they carry last, deepest first. Every
path is made of names that `page` has checked, below directories that we made: a symlink in the archive can lead
nothing out of the target.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from backupd.archive.frames import Blob, FrameReader
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
from backupd.archive.scan import open_below
from backupd.errors import Damaged, RestoreFailed
from backupd.model import Progress

_BATCH = 10_000
"""Members whose places are held in memory at once, twice: one batch is planned while another is written. Larger ones
would decode fewer frames twice where content lies scattered over the packs of many runs."""
_MOST_WARNINGS = 1000
_WORKERS_FAR = 8
"""Frames that are asked for at once where each answer takes its time."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT = os.geteuid() == 0

Whole: TypeAlias = "tuple[str, Row, int]"
"""A file that is one blob: path, row, number of the blob in its pack."""
Part: TypeAlias = "tuple[str, int, int, int]"
"""Blobs of a larger file that lie in one frame: path, where in the file's data they go, first blob, one behind."""


@dataclass(slots=True)
class _Job:
    """What is to be written from one frame."""

    wholes: list[Whole] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


@dataclass(slots=True)
class _Batch:
    """Members that are written together."""

    jobs: dict[tuple[str, int], _Job] = field(default_factory=dict)
    large: list[tuple[str, Row]] = field(default_factory=list)
    pending: list[tuple[str, Row]] = field(default_factory=list)
    """Symlinks, devices, hard links: made when the files are there."""
    extents: dict[str, list[list[int]]] = field(default_factory=dict)
    members: int = 0

    def job(self, pack: str, frame: int) -> _Job:
        job = self.jobs.get((pack, frame))
        if job is None:
            job = self.jobs[pack, frame] = _Job()
        return job


class Extraction:
    """One restore into one directory."""

    def __init__(self, into: Path, frames: FrameReader, progress: Progress) -> None:
        self._into = os.fspath(into)
        self._frames = frames
        self._progress = progress
        self._made: set[str] = set()
        self._directories: list[tuple[str, Row]] = []
        self._batch = _Batch()
        self._writing: tuple[_Batch, list[Future[None]]] | None = None
        self._frame = ("", 0, 0, _Job())  # of the last small file: pack, first blob, one behind, its job
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._me = (os.geteuid(), os.getegid())
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        self.warnings: list[str] = []

    def run(self, pages: Iterable[Page]) -> None:
        """Raises RestoreFailed when the target is not empty, or the disk refuses; Damaged."""
        try:
            os.makedirs(self._into, exist_ok=True)
            if os.listdir(self._into):
                raise RestoreFailed(
                    f"{self._into} is not empty",
                    hint="a restore never overwrites: give an empty or a new directory",
                )
            self._made.add("")
            self._write(pages)
            for path, row in reversed(self._directories):
                self._finish_directory(path, row)
        except OSError as error:
            where = f" ({str(error.filename)[-200:]})" if error.filename else ""
            raise RestoreFailed(
                f"the restore into {self._into} failed: {error.strerror}{where}",
                hint="what is there now is incomplete: remove it, mend the cause, and restore again",
            ) from None
        finally:
            self._close_handles()

    def _write(self, pages: Iterable[Page]) -> None:
        workers = _WORKERS_FAR if self._frames.distant else max(2, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers, thread_name_prefix="restore") as pool:
            try:
                for page in pages:
                    self._plan(page)
                    if self._batch.members >= _BATCH:
                        self._next_batch(pool, workers)
                self._next_batch(pool, workers)
                self._end_batch()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

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
        if len(row) == CONTENT + 1 and type(content) is list and len(content) == 3 and content[2] == 1:
            self._plan_small(name, row, packs[content[0]], content[1])
        elif not is_file(row):
            self._batch.pending.append((name, row))
        else:
            self._plan_large(name, row, packs)

    def _plan_small(self, name: str, row: Row, pack: str, blob: int) -> None:
        """Most files are one blob, and most lie in the frame of the one before."""
        last, first, end, job = self._frame
        if last != pack or not first <= blob < end:
            number, first, end = self._frames.frame_of(pack, blob)
            job = self._batch.job(pack, number)
            self._frame = (pack, first, end, job)
        job.wholes.append((name, row, blob))

    def _plan_large(self, name: str, row: Row, packs: list[str]) -> None:
        batch = self._batch
        batch.large.append((name, row))
        sparse = extra_of(row).get("sparse")
        if sparse is not None:
            batch.extents[name] = sparse
        at = 0
        for pack, first, count in pieces_of(row, packs):
            for number, blobs in self._frames.locate(pack, first, count):
                batch.job(pack, number).parts.append((name, at, first, first + len(blobs)))
                at += sum(blob[1] for blob in blobs)
                first += len(blobs)  # noqa: PLW2901 - the next frame begins there

    # --- carrying a batch out -------------------------------------------------------------------------------

    def _next_batch(self, pool: ThreadPoolExecutor, workers: int) -> None:
        """Have what was planned written, while the next is planned."""
        self._end_batch()
        batch, self._batch = self._batch, _Batch()
        self._frame = ("", 0, 0, _Job())
        for name, row in batch.large:
            fd = os.open(self._path(name), _NEW, 0o600)
            try:
                os.ftruncate(fd, row[SIZE])
            finally:
                os.close(fd)
        keys = list(batch.jobs)
        step = max(1, len(keys) // (workers * 8))
        self._writing = (
            batch,
            [pool.submit(self._write_frames, batch, keys[i : i + step]) for i in range(0, len(keys), step)],
        )

    def _end_batch(self) -> None:
        if self._writing is None:
            return
        (batch, futures), self._writing = self._writing, None
        for future in futures:
            future.result()
        for name, row in batch.large:
            fd = os.open(self._path(name), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._finish_file(fd, name, row, created=0o600)
            finally:
                os.close(fd)
            self._progress.advance(row[SIZE], 1)
        for name, row in batch.pending:
            self._make_special(name, row)
        self._close_handles()

    def _write_frames(self, batch: _Batch, keys: list[tuple[str, int]]) -> None:
        for pack, number in keys:
            job = batch.jobs.pop((pack, number))
            data = memoryview(self._frames.frame(pack, number))
            table = self._frames.directory(pack).blobs
            size = 0
            for name, row, blob in job.wholes:
                part = self._frames.check(data, BLOB.unpack_from(table, blob * BLOB.size), pack)
                self._write_whole(name, row, part)
                size += len(part)
            for name, at, first, end in job.parts:
                blobs = list(BLOB.iter_unpack(table[first * BLOB.size : end * BLOB.size]))
                self._write_part(data, pack, name, at, blobs, batch.extents.get(name))
            self._progress.advance(size, len(job.wholes))

    def _write_whole(self, name: str, row: Row, part: memoryview) -> None:
        mode = row[MODE] & 0o7777
        fd = os.open(self._path(name), _NEW, mode & 0o777)
        try:
            _write_all(fd, part)
            created = mode & 0o777 & ~self._umask
            if created == mode and (row[UID], row[GID]) == self._me and len(row) == CONTENT + 1:
                os.utime(fd, ns=(row[MTIME], row[MTIME]))  # the common case: one call
            else:
                self._finish_file(fd, name, row, created=created)
        finally:
            os.close(fd)

    def _write_part(
        self,
        data: memoryview,
        pack: str,
        name: str,
        at: int,
        blobs: list[Blob],
        extents: list[list[int]] | None,
    ) -> None:
        """Neighbours in the frame that are neighbours in the file are written at once."""
        fd = os.open(self._path(name), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for start, end in _runs(blobs):
                for blob in blobs[start:end]:
                    self._frames.check(data, blob, pack)
                first, last = blobs[start], blobs[end - 1]
                part = data[first[0] : last[0] + last[1]]
                for offset, piece in _place(part, at, extents):
                    _pwrite_all(fd, piece, offset)
                at += len(part)
        finally:
            os.close(fd)

    # --- what entries carry ---------------------------------------------------------------------------------

    def _finish_file(self, fd: int, name: str, row: Row, *, created: int) -> None:
        """Owner, mode, xattrs, times, in this order: chown drops setuid bits and capabilities, all drop times."""
        mode = stat.S_IMODE(row[MODE])
        owned = self._own(fd, name, row)
        if mode != created or owned:
            os.fchmod(fd, mode)
        if len(row) > CONTENT + 1 and "xattrs" in extra_of(row):
            self._set_xattrs(fd, name, row)
        os.utime(fd, ns=(row[MTIME], row[MTIME]))

    def _own(self, fd: int, name: str, row: Row) -> bool:
        if (row[UID], row[GID]) == self._me:
            return False
        if not _ROOT:
            self._warn(f"{name}: only root can give it to {row[UID]}:{row[GID]}")
            return False
        os.fchown(fd, row[UID], row[GID])
        return True

    def _set_xattrs(self, target: int | str, name: str, row: Row) -> None:
        for key, value in xattrs_of(row).items():
            try:
                os.setxattr(target, key, value, follow_symlinks=isinstance(target, int))
            except OSError as error:
                self._warn(f"{name}: its attribute {os.fsdecode(key)} could not be set: {error.strerror}")

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
                self._warn(f"{name}: only root can make a device")
                return
            os.chmod(path, stat.S_IMODE(row[MODE]))
        else:
            raise Damaged(f"the index has an entry of an unknown kind: {name!r}")
        if _ROOT and (row[UID], row[GID]) != self._me:
            os.lchown(path, row[UID], row[GID])
            if kind != stat.S_IFLNK:
                os.chmod(path, stat.S_IMODE(row[MODE]))
        if "xattrs" in extra:
            self._set_xattrs(path, name, row)
        os.utime(path, ns=(row[MTIME], row[MTIME]), follow_symlinks=False)
        self._progress.advance(0, 1)

    def _finish_directory(self, path: str, row: Row) -> None:
        fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._finish_file(fd, path, row, created=0o700)
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
        with self._lock:
            handle = self._handles.get(parent)
            if handle is None:
                root = os.open(self._into, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    handle = self._handles[parent] = open_below(root, parent)
                finally:
                    os.close(root)
        return f"/proc/self/fd/{handle}/{last}"

    def _close_handles(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _warn(self, text: str) -> None:
        if len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(text)


def _write_all(fd: int, part: memoryview) -> None:
    while part:
        part = part[os.write(fd, part) :]


def _pwrite_all(fd: int, part: memoryview, at: int) -> None:
    while part:
        done = os.pwrite(fd, part, at)
        part, at = part[done:], at + done


def _runs(blobs: list[Blob]) -> Iterator[tuple[int, int]]:
    """Ranges of blobs that lie side by side in their frame."""
    start = 0
    for index in range(1, len(blobs) + 1):
        if index == len(blobs) or blobs[index][0] != blobs[index - 1][0] + blobs[index - 1][1]:
            yield start, index
            start = index


def _place(part: memoryview, at: int, extents: list[list[int]] | None) -> Iterator[tuple[int, memoryview]]:
    """Where data goes in the file: as it is, or, in a sparse file, over its extents."""
    if extents is None:
        yield at, part
        return
    before = 0
    for offset, length in extents:
        if at < before + length and part:
            inside = at - before
            step = min(length - inside, len(part))
            yield offset + inside, part[:step]
            part, at = part[step:], at + step
        before += length
