"""Read regular files into an archive: calm ones in one go, restless ones as well as can be, large ones in blobs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from backupd.archive import tar
from backupd.archive.cut import WHOLE, ContentCutter, Cutter, FixedCutter, is_paged
from backupd.archive.feed import LARGE, feed_large
from backupd.archive.page import CTIME, SIZE, Pieces, Row, encode_xattrs
from backupd.archive.patterns import compile_patterns
from backupd.archive.pipeline import FRAME_SIZE
from backupd.archive.scan import StatTuple, stat_tuple
from backupd.archive.writer import ArchiveWriter
from backupd.errors import CaptureFailed

_NO_ATIME = os.O_NOATIME if os.geteuid() == 0 else 0  # only the owner may; root may always
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO swapped in must not hold us
_TRIES = 3
_ZEROS = bytes(tar.BLOCK)


class FileReader:
    """Reads regular files. `paged`: patterns of those that change in place in pages of `page_size` bytes."""

    def __init__(self, writer: ArchiveWriter, paged: tuple[str, ...], page_size: int) -> None:
        self._writer = writer
        self._paged = compile_patterns(paged, ()) if paged else None
        self._page_size = page_size

    def read(self, directory: int, full: str, name: str, entry: StatTuple) -> Row | None:
        try:
            fd = os.open(name, _OPEN | _NO_ATIME, dir_fd=directory)
        except PermissionError:
            if not _NO_ATIME:
                raise
            fd = os.open(name, _OPEN, dir_fd=directory)
        try:
            if entry[1] > LARGE:
                return self._read_large(fd, full, name, entry)
            return self._read_calm(fd, full, name, entry) or self._read_restless(fd, full, name, entry)
        finally:
            os.close(fd)

    def _read_calm(self, fd: int, full: str, name: str, entry: StatTuple) -> Row | None:
        """A file that stays as it was listed: one read into the slab. None where it did not; nothing is claimed."""
        size = entry[1]
        xattrs = read_xattrs(fd)
        header = self._header(full, size, entry, xattrs) if self._writer.plain else b""
        pipeline = self._writer.pipeline
        slab = pipeline.room(len(header) + size + 1 + tar.BLOCK)
        view = slab.view
        start = slab.length + len(header)
        end = start + size
        # One byte more than promised shows a file that grows.
        if os.readv(fd, [view[start : end + 1]]) != size or stat_tuple(os.fstat(fd)) != entry:
            return None
        pieces: Pieces = []
        if size > WHOLE:
            slab.add_file(start, size, pieces)
        elif size:
            # Digested here, while it is in the core's cache; and thousands of calls fewer that wait in turn for
            # the interpreter's lock: a third of a full run's time.
            digest = pipeline.digest(view[start:end])
            place = pipeline.find(digest)
            if place is None:
                slab.blobs.append((start, size, pieces, digest))
            else:
                pieces.append([*place, 1])
                end = start  # what is known needs no room
        if header:
            view[slab.length : start] = header
            if rest := -size & 511:
                view[end : end + rest] = _ZEROS[:rest]
                end += rest
        slab.length = end
        if end >= FRAME_SIZE:
            pipeline.submit()
        if xattrs:
            return [name, *entry, pieces, {"xattrs": encode_xattrs(xattrs)}]
        return [name, *entry, pieces]

    def _read_restless(self, fd: int, full: str, name: str, entry: StatTuple) -> Row:
        """A file that changes under our eyes: tried a few times, then taken as it is, and told."""
        for attempt in range(_TRIES):
            os.lseek(fd, 0, os.SEEK_SET)
            size, after, xattrs, start = self._read_small(fd, full, entry)
            if after == entry and size == entry[1]:
                break
            if not stat.S_ISREG(after[0]):
                raise CaptureFailed("was replaced while it was read")
            if after[1] > LARGE:
                return self._read_large(fd, full, name, after)
            entry = after
            if attempt == _TRIES - 1:
                self._writer.warn(f"{full}: changed while it was read")
        pieces = self._take_small(full, size, entry, xattrs, start)
        row: Row = [name, *entry, pieces]
        row[SIZE] = size
        if xattrs:
            row.append({"xattrs": encode_xattrs(xattrs)})
        return row

    def _read_small(
        self, fd: int, full: str, entry: StatTuple
    ) -> tuple[int, StatTuple, dict[bytes, bytes], int]:
        """Read into the slab without claiming the room yet: (bytes, tuple afterwards, xattrs, where it begins)."""
        xattrs = read_xattrs(fd)
        want = entry[1]
        head = len(self._header(full, want, entry, xattrs)) if self._writer.plain else 0
        slab = self._writer.pipeline.room(head + want + 1 + tar.BLOCK)
        start = slab.length + head
        view = slab.view
        size = 0
        while size <= want:  # one byte more than promised shows a file that grows
            got = os.readv(fd, [view[start + size : start + want + 1]])
            if got == 0:
                break
            size += got
        return min(size, want), stat_tuple(os.fstat(fd)), xattrs, start

    def _take_small(
        self, full: str, size: int, entry: StatTuple, xattrs: dict[bytes, bytes], start: int
    ) -> Pieces:
        pieces: Pieces = []
        pipeline = self._writer.pipeline
        slab = pipeline.room(0)
        if self._writer.plain:
            slab.view[slab.length : start] = self._header(full, size, entry, xattrs)
        slab.add_file(start, size, pieces)
        end = start + size
        if self._writer.plain and (rest := -size & 511):
            slab.view[end : end + rest] = bytes(rest)
            end += rest
        slab.length = end
        pipeline.filled()
        return pieces

    def _header(self, full: str, size: int, entry: StatTuple, xattrs: dict[bytes, bytes]) -> bytes:
        mode, _, mtime, _, _, uid, gid, _ = entry
        if xattrs:
            return tar.header(
                os.fsencode(full), tar.FILE, mode & 0o7777, uid, gid, size, mtime, xattrs=xattrs
            )
        return tar.file_header(os.fsencode(full), mode & 0o7777, uid, gid, size, mtime // 10**9)

    def _read_large(self, fd: int, full: str, name: str, entry: StatTuple) -> Row:
        xattrs = read_xattrs(fd)
        mode, size, mtime, _, _, uid, gid, _ = entry
        os.lseek(fd, 0, os.SEEK_SET)
        sparse = _data_extents(fd, size)
        stored = size if sparse is None else tar.sparse_size(sparse)
        header = b""
        if self._writer.plain:
            header = tar.header(
                os.fsencode(full),
                tar.FILE,
                mode & 0o7777,
                uid,
                gid,
                size,
                mtime,
                xattrs=xattrs,
                sparse=sparse,
            )
        fill: Callable[[memoryview], int] = (
            (lambda view: os.readv(fd, [view])) if sparse is None else _ExtentFill(fd, sparse)
        )
        # Two pages of PostgreSQL a blob: with one, 100,000 transactions stored 6 % less, and the table of what is known
        # is twice as large.
        paged = (self._paged is not None and self._paged(full, False)) or is_paged(os.pread(fd, 24, 0))
        cutter: Cutter = FixedCutter(self._page_size) if paged else ContentCutter()
        pieces, taken = feed_large(self._writer.pipeline, fill, cutter, header=header, size=stored)
        after = stat_tuple(os.fstat(fd))
        row: Row = [name, *entry, pieces]
        extra: dict[str, Any] = {}
        if xattrs:
            extra["xattrs"] = encode_xattrs(xattrs)
        if sparse is not None:
            extra["sparse"] = [list(piece) for piece in sparse]
        if after != entry or taken != stored:
            self._writer.warn(f"{full}: changed while it was read")
            extra["changed"] = True
            row[CTIME] = -1
            if taken != stored:
                row[SIZE] = taken if sparse is None else size
        if extra:
            row.append(extra)
        return row


class _ExtentFill:
    """Reads the pieces of a sparse file that hold data, one after another."""

    def __init__(self, fd: int, extents: list[tuple[int, int]]) -> None:
        self._fd = fd
        self._extents = iter(extents)
        self._at = self._left = 0

    def __call__(self, view: memoryview) -> int:
        while not self._left:
            extent = next(self._extents, None)
            if extent is None:
                return 0
            self._at, self._left = extent
        got = os.preadv(self._fd, [view[: self._left]], self._at)
        if got == 0:  # it shrank: what was promised comes as zeros
            got = min(len(view), self._left)
            view[:got] = bytes(got)
        self._at += got
        self._left -= got
        return got


def _data_extents(fd: int, size: int) -> list[tuple[int, int]] | None:
    """(offset, length) of what is not a hole; None where there is no hole to speak of."""
    if os.fstat(fd).st_blocks * 512 >= size:
        return None
    extents: list[tuple[int, int]] = []
    at = 0
    try:
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                break
            at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            if start < size:
                extents.append((start, at - start))
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    return None if extents == [(0, size)] else extents


def read_xattrs(target: int | str) -> dict[bytes, bytes]:
    """Also ACLs and capabilities, which are xattrs. Of an open file, or of a path whose last part is not followed."""
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # NFS 3, and many a file system in user space, have none
            raise
        return {}
    found = {}
    for name in names:
        try:
            found[os.fsencode(name)] = os.getxattr(target, name, follow_symlinks=follow)
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return found
