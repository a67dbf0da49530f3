"""Read a directory tree into an archive: every kind of entry, with what each carries."""

from __future__ import annotations

import errno
import marshal
import os
import stat
import time
from collections.abc import Callable
from typing import Any

from backupd.archive import tar
from backupd.archive.cut import ContentCutter, Cutter, FixedCutter
from backupd.archive.earlier import Rows
from backupd.archive.feed import LARGE, feed_large
from backupd.archive.page import CONTENT, CTIME, SIZE, Pieces, Row, encode_xattrs, sort_key
from backupd.archive.patterns import compile_patterns
from backupd.archive.pipeline import FRAME_SIZE
from backupd.archive.scan import INODE, Block, Scan, StatTuple, open_below, stat_tuple
from backupd.archive.writer import ArchiveWriter, Written
from backupd.errors import CaptureFailed
from backupd.model import Tree

_NO_ATIME = os.O_NOATIME if os.geteuid() == 0 else 0  # only the owner may; root may always
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO swapped in must not hold us
_TRIES = 3
_ZEROS = bytes(tar.BLOCK)
_LINKS_COLUMN = 7
# A file written in the same tick of the clock after we read it would look unchanged (ticks are up to 10 ms).
_RACY_NS = 20_000_000
_TAR_TYPES = {
    stat.S_IFLNK: tar.SYMLINK,
    stat.S_IFIFO: tar.FIFO,
    stat.S_IFCHR: tar.CHARACTER_DEVICE,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
}


class _Unreadable(Exception):
    """A directory that cannot be read; why."""


class TreeReader:
    """Reads a directory tree."""

    def __init__(self, writer: ArchiveWriter, content: Tree) -> None:
        self._writer = writer
        self._content = content
        self._plain = writer.plain
        self._wanted = (
            compile_patterns(content.include, content.exclude) if content.include or content.exclude else None
        )
        self._paged = compile_patterns(content.paged, ()) if content.paged else None
        self._links: dict[int, str] = {}  # inode of a file with several names -> the first of them
        self._root = -1
        self._listed = ("", 0)  # the directory at hand: its path, its inode when it was listed
        self._incomplete = False  # something of the page at hand could not be read

    def read(self) -> Written:
        root = os.open(self._content.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = root
        writer = self._writer
        try:
            scan = Scan(
                root, wanted=self._wanted, one_file_system=self._content.one_file_system, warn=writer.warn
            )
            digest = self._writer.digest
            for page in scan.pages():
                writer.check_stop()
                name = digest(marshal.dumps(page, 2)).hex()
                taken = writer.earlier.page(name)
                if taken is None:
                    self._read_page(page, name)
                else:
                    self._note_links(page)
                    writer.take_over(taken)
            return writer.finish(ordered=True, sockets=scan.sockets)
        finally:
            os.close(root)

    def _note_links(self, page: list[Block]) -> None:
        for path, _, listing in page:
            for name, entry in listing:
                if entry[_LINKS_COLUMN] > 1:
                    self._links.setdefault(entry[INODE], f"{path}/{name}" if path else name)

    def _read_page(self, page: list[Block], digest: str) -> None:
        path, own, listing = page[0]
        first = sort_key(path) if own is not None else sort_key(path, listing[0][0] if listing else "")
        last_path, _, last_listing = page[-1]
        last = sort_key(last_path, last_listing[-1][0] if last_listing else "\U0010ffff")
        old = self._writer.earlier.rows(first, last)
        started = time.time_ns()
        newest = 0
        self._incomplete = False
        dirs: list[tuple[str, Row | None, list[Row]]] = []
        for block in page:
            rows = self._read_block(block, old)
            dirs.append(rows)
            newest = max(
                newest, max((row[CTIME] for row in rows[2]), default=0), rows[1][CTIME] if rows[1] else 0
            )
        if self._incomplete:
            digest = ""  # what was left out now is missed, and told, again next time
        if newest > started - _RACY_NS:
            digest = ""  # read again next time, whatever its tuples say
            for _, own_row, rows_ in dirs:
                for row in rows_ if own_row is None else [own_row, *rows_]:
                    if row[CTIME] > started - _RACY_NS:
                        row[CTIME] = -1
        self._writer.add_page(dirs, digest, first)

    def _read_block(self, block: Block, old: Rows) -> tuple[str, Row | None, list[Row]]:
        path, own, listing = block
        if own is not None:
            self._listed = (path, own[INODE])
        known = old.get(path, {})
        rows: list[Row] = []
        directory = -1
        try:
            for name, entry in listing:
                row = known.get(name)
                if row is None or not self._unchanged(path, name, entry, row):
                    if directory < 0:  # where nothing changed, the directory is not opened either
                        directory = self._open_directory(path)
                    row = self._read_entry(directory, path, name, entry)
                if row is not None:
                    rows.append(row)
            own_row = known.get("")
            if own is None:
                own_row = None
            elif own_row is None or tuple(own_row[1:CONTENT]) != own:
                if directory < 0:
                    directory = self._open_directory(path)
                own_row = self._own_row(directory, path, own)
            return path, own_row, rows
        except _Unreadable as error:
            self._incomplete = True
            self._writer.warn(f"{path}: {error}: what is in it was left out")
            return path, ["", *own, None] if own is not None else None, rows
        finally:
            if directory >= 0:
                os.close(directory)

    def _open_directory(self, path: str) -> int:
        """The directory that was listed, and no other. Raises _Unreadable."""
        try:
            directory = open_below(self._root, path)
        except OSError as error:
            raise _Unreadable(error.strerror) from None
        if self._listed != (path, os.fstat(directory).st_ino):
            os.close(directory)
            raise _Unreadable("was replaced while the tree was read")
        return directory

    def _own_row(self, directory: int, path: str, own: StatTuple) -> Row:
        row: Row = ["", *own, None]
        xattrs = read_xattrs(directory)
        if xattrs:
            row.append({"xattrs": encode_xattrs(xattrs)})
        if self._plain:
            mode, _, mtime, _, _, uid, gid, _ = own
            self._put_header(
                tar.header(
                    os.fsencode(path or "."), tar.DIRECTORY, mode & 0o7777, uid, gid, 0, mtime, xattrs=xattrs
                )
            )
        return row

    def _unchanged(self, path: str, name: str, entry: StatTuple, row: Row) -> bool:
        """Whether the row of the latest point can be taken over: then the entry is not opened."""
        if tuple(row[1:CONTENT]) != entry:
            return False
        if entry[_LINKS_COLUMN] > 1 and not stat.S_ISDIR(entry[0]):
            full = f"{path}/{name}" if path else name
            return self._links.setdefault(entry[INODE], full) == full
        return True

    def _read_entry(self, directory: int, path: str, name: str, entry: StatTuple) -> Row | None:
        kind = entry[0] & 0o170000
        full = f"{path}/{name}" if path else name
        if entry[_LINKS_COLUMN] > 1:
            first = self._links.setdefault(entry[INODE], full)
            if first != full:
                return self._other_name(full, name, entry, first)
        try:
            if kind == stat.S_IFREG:
                return self._read_file(directory, full, name, entry)
            return self._read_special(directory, full, name, entry, kind)
        except FileNotFoundError:
            self._writer.warn(f"{full}: vanished while the tree was read")
        except (OSError, CaptureFailed) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._incomplete = True
            self._writer.warn(f"{full}: {reason}: left out")
        return None

    def _other_name(self, full: str, name: str, entry: StatTuple, first: str) -> Row:
        if self._plain:
            mode, _, mtime, _, _, uid, gid, _ = entry
            link = os.fsencode(first)
            self._put_header(
                tar.header(os.fsencode(full), tar.HARDLINK, mode & 0o7777, uid, gid, 0, mtime, link=link)
            )
        return [name, *entry, None, {"hardlink": first}]

    def _read_special(self, directory: int, full: str, name: str, entry: StatTuple, kind: int) -> Row:
        mode, _, mtime, _, _, uid, gid, _ = entry
        content: str | None = None
        row: Row = [name, *entry, None]
        device = (0, 0)
        extra: dict[str, Any] = {}
        if kind == stat.S_IFLNK:
            content = row[CONTENT] = os.readlink(name, dir_fd=directory)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            number = os.stat(name, dir_fd=directory, follow_symlinks=False).st_rdev
            device = (os.major(number), os.minor(number))
            extra["device"] = list(device)
        # What cannot be opened has no descriptor to ask; its path through /proc is short however deep it lies.
        xattrs = read_xattrs(f"/proc/self/fd/{directory}/{name}")
        if xattrs:
            extra["xattrs"] = encode_xattrs(xattrs)
        if extra:
            row.append(extra)
        if self._plain:
            self._put_header(
                tar.header(
                    os.fsencode(full),
                    _TAR_TYPES[kind],
                    mode & 0o7777,
                    uid,
                    gid,
                    0,
                    mtime,
                    link=os.fsencode(content or ""),
                    device=device,
                    xattrs=xattrs,
                )
            )
        return row

    # --- regular files ------------------------------------------------------------------------------------

    def _read_file(self, directory: int, full: str, name: str, entry: StatTuple) -> Row | None:
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
        header = self._header(full, size, entry, xattrs) if self._plain else b""
        pipeline = self._writer.pipeline
        slab = pipeline.room(len(header) + size + 1 + tar.BLOCK)
        view = slab.view
        start = slab.length + len(header)
        end = start + size
        # One byte more than promised shows a file that grows.
        if os.readv(fd, [view[start : end + 1]]) != size or stat_tuple(os.fstat(fd)) != entry:
            return None
        pieces: Pieces = []
        if size:
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
        head = len(self._header(full, want, entry, xattrs)) if self._plain else 0
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
        if self._plain:
            slab.view[slab.length : start] = self._header(full, size, entry, xattrs)
        if size:
            slab.blobs.append((start, size, pieces, b""))
        end = start + size
        if self._plain and (rest := -size & 511):
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
        if self._plain:
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
        paged = self._paged is not None and self._paged(full, False)
        cutter: Cutter = FixedCutter(self._content.page_size) if paged or _is_sqlite(fd) else ContentCutter()
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

    def _put_header(self, header: bytes) -> None:
        slab = self._writer.pipeline.room(len(header))
        slab.view[slab.length : slab.length + len(header)] = header
        slab.length += len(header)
        self._writer.pipeline.filled()


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


def _is_sqlite(fd: int) -> bool:
    return os.pread(fd, 16, 0) == b"SQLite format 3\0"


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
