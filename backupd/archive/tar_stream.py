"""Read a tar made elsewhere (a volume behind a helper container) into an archive."""

from __future__ import annotations

import os
import stat
from typing import Any

from backupd.archive import tar
from backupd.archive.cut import ContentCutter, Cutter, FixedCutter
from backupd.archive.feed import LARGE, feed_large
from backupd.archive.onto import feed_pages, feed_whole, laid_together, page_by_page, unchanged
from backupd.archive.page import CONTENT, SIZE, Content, Pieces, Row, encode_xattrs
from backupd.archive.patterns import compile_patterns
from backupd.archive.scan import sort_key
from backupd.archive.tar.read import TarEntry, TarReader
from backupd.archive.writer import ArchiveWriter, Written
from backupd.errors import Damaged
from backupd.model import TarStream

_PAGE_MEMBERS = 160
_KINDS = {
    tar.FILE: stat.S_IFREG,
    tar.HARDLINK: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
    tar.CHARACTER_DEVICE: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
}


class TarStreamReader:
    """Members in the order in which they come. A tar tells no inode and no ctime, so every file is read anew;
    what is known by its digest is not stored again."""

    def __init__(self, writer: ArchiveWriter, content: TarStream) -> None:
        self._writer = writer
        self._reader = TarReader(content.file)
        self._wanted = compile_patterns(content.include, content.exclude)
        self._paged = compile_patterns(content.paged, ()) if content.paged else None
        self._page_size = content.page_size
        self._onto = content.onto
        self._dirs: list[tuple[str, Row | None, list[Row]]] = []
        self._members = 0

    def read(self) -> Written:
        for entry in self._reader:
            self._writer.check_stop()
            path = os.fsdecode(entry.name)
            path = "" if path == "." else path
            directory = entry.typeflag == tar.DIRECTORY
            if path and not self._wanted(path, directory):
                continue
            if entry.typeflag == tar.HARDLINK and not self._wanted(os.fsdecode(entry.link), False):
                link = os.fsdecode(entry.link)
                self._writer.warn(f"{path}: left out: its content came as {link}, which is excluded")
                continue
            self._add(path, entry)
            if self._members >= _PAGE_MEMBERS:
                self._flush()
        self._flush()
        for note in self._reader.notes:
            self._writer.warn(note)
        return self._writer.finish(ordered=False)

    def _add(self, path: str, entry: TarEntry) -> None:
        mode = _KINDS[entry.typeflag] | (entry.mode & 0o7777)
        row: Row = ["", mode, entry.size, entry.mtime_ns, 0, 0, entry.uid, entry.gid, 1, None]
        extra: dict[str, Any] = {}
        if entry.xattrs:
            extra["xattrs"] = encode_xattrs(entry.xattrs)
        self._members += 1
        if entry.typeflag == tar.DIRECTORY:
            if extra:
                row.append(extra)
            self._dirs.append((path, row, []))
            self._keep_header(entry)
            return
        parent, _, row[0] = path.rpartition("/")
        if entry.typeflag == tar.FILE:
            row[9] = self._read_onto(path, entry) if entry.onto else self._read_file(path, entry)
            if entry.sparse is not None and not entry.onto:
                extra["sparse"] = [list(piece) for piece in entry.sparse]
        else:
            self._keep_header(entry)
            if entry.typeflag == tar.SYMLINK:
                row[9] = os.fsdecode(entry.link)
            elif entry.typeflag == tar.HARDLINK:
                extra["hardlink"] = os.fsdecode(entry.link).removeprefix("./")
            elif entry.typeflag in (tar.CHARACTER_DEVICE, tar.BLOCK_DEVICE):
                extra["device"] = list(entry.device)
        if extra:
            row.append(extra)
        if not self._dirs or self._dirs[-1][0] != parent:
            self._dirs.append((parent, None, []))
        self._dirs[-1][2].append(row)

    def _read_file(self, path: str, entry: TarEntry) -> Pieces:
        pipeline = self._writer.pipeline
        header = _header(entry) if self._writer.plain else b""
        if entry.stored > LARGE:
            paged = self._paged is not None and self._paged(path, False)
            cutter: Cutter = FixedCutter(self._page_size) if paged else ContentCutter()
            pieces, _ = feed_large(pipeline, self._reader.readinto, cutter, header=header, size=entry.stored)
            return pieces
        pieces = []
        slab = pipeline.room(len(header) + entry.stored + tar.BLOCK)
        start = slab.length + len(header)
        slab.view[slab.length : start] = header
        end = start
        while got := self._reader.readinto(slab.view[end : start + entry.stored]):
            end += got
        if end - start != entry.stored:
            raise Damaged(f"the tar from the helper ends inside {path}")
        slab.add_file(start, entry.stored, pieces)
        if header and (rest := -entry.stored & 511):
            slab.view[end : end + rest] = bytes(rest)
            end += rest
        slab.length = end
        pipeline.filled()
        return pieces

    def _read_onto(self, path: str, entry: TarEntry) -> Content:
        """A file of which some pages came; the latest point has the others."""
        earlier = self._writer.earlier
        row = earlier.files.get(path) if self._onto else None
        if row is None:
            raise Damaged(f"{path} is given in part, and the point before does not have it")
        pieces, old, given = row[CONTENT], row[SIZE], entry.sparse or ()
        if unchanged(old, entry.size, given):
            return list(pieces)
        fill, page = self._reader.readinto, self._page_size
        paged = self._paged is not None and self._paged(path, False)
        if paged and page_by_page(pieces, old, entry.size, given, page):
            return feed_pages(self._writer.pipeline, fill, pieces, old, entry.size, given, page)
        chunks = laid_together(earlier.content(pieces), fill, old, entry.size, given)
        return feed_whole(self._writer.pipeline, chunks, entry.size, page)

    def _keep_header(self, entry: TarEntry) -> None:
        if self._writer.plain:
            header = _header(entry)
            slab = self._writer.pipeline.room(len(header))
            slab.view[slab.length : slab.length + len(header)] = header
            slab.length += len(header)
            self._writer.pipeline.filled()

    def _flush(self) -> None:
        if self._dirs:
            path, _, rows = self._dirs[0]
            self._writer.add_page(self._dirs, "", sort_key(path, rows[0][0] if rows else None))
        self._dirs, self._members = [], 0


def _header(entry: TarEntry) -> bytes:
    return tar.header(
        entry.name, entry.typeflag, entry.mode & 0o7777, entry.uid, entry.gid, entry.size, entry.mtime_ns,
        link=entry.link, device=entry.device, xattrs=entry.xattrs, sparse=entry.sparse,
    )  # fmt: skip
