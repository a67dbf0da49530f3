"""Read a directory tree into an archive: every kind of entry, with what each carries."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from backupd.archive import tar
from backupd.archive.earlier import Rows
from backupd.archive.feed import LARGE
from backupd.archive.files import FileReader, read_xattrs
from backupd.archive.page import CONTENT, CTIME, Row, encode_xattrs
from backupd.archive.patterns import compile_patterns
from backupd.archive.scan import (
    INODE,
    LINKS,
    Block,
    Scan,
    StatTuple,
    decode_listing,
    encode_listing,
    open_below,
    sort_key,
)
from backupd.archive.scan_ahead import Ended, ScanAhead, halfway
from backupd.archive.writer import ArchiveWriter, Written
from backupd.errors import CaptureFailed
from backupd.model import Tree

_MANY = 16  # entries
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
        self._files = FileReader(writer, content.paged, content.page_size)
        self._sockets = 0
        self._links: dict[int, str] = {}  # inode of a file with several names -> the first of them
        self._root = -1
        self._sought = False  # anything, among the directories of the latest point
        self._incomplete = False  # something of the page at hand could not be read

    def read(self) -> Written:
        root = os.open(self._content.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = root
        writer, earlier = self._writer, self._writer.earlier
        try:
            for name, page, listing in self._listed_pages():
                writer.check_stop()
                taken = earlier.page(name)
                if taken is None:
                    self._read_page(page or decode_listing(listing), name)
                    continue
                if page or listing:
                    self._note_links(page or decode_listing(listing))
                writer.take_over(taken)
            return writer.finish(ordered=True, sockets=self._sockets)
        finally:
            os.close(root)

    def _listed_pages(self) -> Iterator[tuple[str, list[Block] | None, bytes]]:
        """Digest, and what is on the page or how that is written; neither of a page known by its digest alone."""
        start = halfway(self._writer.earlier.ordered)
        if not start:
            yield from self._scan()
            return
        ahead = ScanAhead(self._root, self._content, start, self._writer.earlier.stats)
        try:
            yield from self._scan(end=start)
            answered = False
            try:
                for digest, listing in ahead.pages():
                    answered = True
                    yield (digest or self._writer.digest(listing)).hex(), None, listing
            except Ended:
                if answered:
                    raise CaptureFailed(
                        "the process that lists the second half of the tree was killed",
                        hint="is there memory enough? back up again",
                    ) from None
                yield from self._scan(start=start)
            self._sockets += ahead.sockets
            for text in ahead.warnings:
                self._writer.warn(text)
        finally:
            ahead.close()

    def _scan(
        self, *, start: str = "", end: str | None = None
    ) -> Iterator[tuple[str, list[Block] | None, bytes]]:
        scan = Scan(
            self._root, wanted=self._wanted, one_file_system=self._content.one_file_system,
            warn=self._writer.warn, start=start, end=end,
        )  # fmt: skip
        for page in scan.pages():
            yield self._writer.digest(encode_listing(page)).hex(), page, b""
        self._sockets += scan.sockets

    def _note_links(self, page: list[Block]) -> None:
        for path, _, _, listing in page:
            for name, entry in listing:
                if entry[LINKS] > 1:
                    self._links.setdefault(entry[INODE], f"{path}/{name}" if path else name)

    def _read_page(self, page: list[Block], digest: str) -> None:
        path, _, own, listing = page[0]
        first = sort_key(path) if own is not None else sort_key(path, listing[0][0] if listing else "")
        last_path, _, _, last_listing = page[-1]
        last = sort_key(last_path, last_listing[-1][0] if last_listing else "\U0010ffff")
        old = self._writer.earlier.rows(first, last)
        started = time.time_ns()
        newest = 0
        self._incomplete = False
        dirs: list[tuple[str, Row | None, list[Row]]] = []
        moved = self._looks_moved(page, old)
        for block in page:
            known = old.get(block[0])
            if known is None and moved:
                known = self._rows_elsewhere(block)
            rows = self._read_block(block, known or {})
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

    def _looks_moved(self, page: list[Block], old: Rows) -> bool:
        """Whether so much of it lies in directories of unknown path that looking for these elsewhere is cheaper
        than reading it; once it was looked for, it costs nothing."""
        if self._sought or not self._writer.earlier.ordered:
            return self._sought
        entries = [entry for path, _, _, listing in page if path not in old for _, entry in listing]
        return len(entries) >= _MANY or sum(entry[1] for entry in entries) >= LARGE

    def _rows_elsewhere(self, block: Block) -> dict[str, Row]:
        """Rows of a directory where it was in the latest point, by its inode: files in it keep theirs, and their
        times, when it is moved; so none is opened."""
        _, inode, own, listing = block
        self._sought = True
        there = self._writer.earlier.places.get(inode)
        if there is None or (own is None and not listing):
            return {}
        first = sort_key(there) if own is not None else sort_key(there, listing[0][0])
        last = sort_key(there, listing[-1][0] if listing else "")
        return self._writer.earlier.rows(first, last).get(there, {})

    def _read_block(self, block: Block, known: dict[str, Row]) -> tuple[str, Row | None, list[Row]]:
        path, inode, own, listing = block
        rows: list[Row] = []
        directory = -1
        try:
            for name, entry in listing:
                row = known.get(name)
                if row is None or not self._unchanged(path, name, entry, row):
                    if directory < 0:  # where nothing changed, the directory is not opened either
                        directory = self._open_directory(path, inode)
                    row = self._read_entry(directory, path, name, entry)
                if row is not None:
                    rows.append(row)
            own_row = known.get("")
            if own is None:
                own_row = None
            elif own_row is None or tuple(own_row[1:CONTENT]) != own:
                if directory < 0:
                    directory = self._open_directory(path, inode)
                own_row = self._own_row(directory, path, own)
            return path, own_row, rows
        except _Unreadable as error:
            self._incomplete = True
            self._writer.warn(f"{path}: {error}: what is in it was left out")
            return path, ["", *own, None] if own is not None else None, rows
        finally:
            if directory >= 0:
                os.close(directory)

    def _open_directory(self, path: str, inode: int) -> int:
        """The directory that was listed, and no other. Raises _Unreadable."""
        try:
            directory = open_below(self._root, path)
        except OSError as error:
            raise _Unreadable(error.strerror) from None
        if os.fstat(directory).st_ino != inode:
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
        if entry[LINKS] > 1 and not stat.S_ISDIR(entry[0]):
            full = f"{path}/{name}" if path else name
            return self._links.setdefault(entry[INODE], full) == full
        return True

    def _read_entry(self, directory: int, path: str, name: str, entry: StatTuple) -> Row | None:
        kind = entry[0] & 0o170000
        full = f"{path}/{name}" if path else name
        if entry[LINKS] > 1:
            first = self._links.setdefault(entry[INODE], full)
            if first != full:
                return self._other_name(full, name, entry, first)
        try:
            if kind == stat.S_IFREG:
                return self._files.read(directory, full, name, entry)
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

    def _put_header(self, header: bytes) -> None:
        slab = self._writer.pipeline.room(len(header))
        slab.view[slab.length : slab.length + len(header)] = header
        slab.length += len(header)
        self._writer.pipeline.filled()
