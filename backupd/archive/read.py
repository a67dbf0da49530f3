"""Read one recovery point: its members, one of them, all as a tar, all onto a disk."""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backupd.archive import tar
from backupd.archive.frames import FrameReader
from backupd.archive.index import read_page, read_pages
from backupd.archive.page import (
    CONTENT,
    GID,
    MODE,
    MTIME,
    NAME,
    SIZE,
    UID,
    Page,
    Pieces,
    Row,
    extra_of,
    is_file,
    pieces_of,
    xattrs_of,
)
from backupd.archive.scan import sort_key
from backupd.errors import NoRecoveryPoint
from backupd.model import Bytes, Member, MemberType, Progress, RecoveryPoint, Silence
from backupd.repository import Manifest, PageRef, Repository

_TYPES = {
    stat.S_IFREG: MemberType.FILE,
    stat.S_IFDIR: MemberType.DIRECTORY,
    stat.S_IFLNK: MemberType.SYMLINK,
    stat.S_IFIFO: MemberType.FIFO,
    stat.S_IFCHR: MemberType.CHARACTER_DEVICE,
    stat.S_IFBLK: MemberType.BLOCK_DEVICE,
}
_TAR_TYPES = {
    MemberType.FILE: tar.FILE,
    MemberType.DIRECTORY: tar.DIRECTORY,
    MemberType.SYMLINK: tar.SYMLINK,
    MemberType.HARDLINK: tar.HARDLINK,
    MemberType.FIFO: tar.FIFO,
    MemberType.CHARACTER_DEVICE: tar.CHARACTER_DEVICE,
    MemberType.BLOCK_DEVICE: tar.BLOCK_DEVICE,
}
_SMALL = 1 << 15
_GATHERED = 1 << 17
"""Bytes of a tar that are handed out at once, where its members are small."""


class PointArchive:
    """A model.Archive on a repository."""

    def __init__(
        self, repository: Repository, manifest: Manifest, *, progress: Progress | None = None
    ) -> None:
        self._repository = repository
        self._manifest = manifest
        self._progress = progress or Silence()
        self.frames = FrameReader(repository, manifest)

    @property
    def point(self) -> RecoveryPoint:
        return self._manifest.point

    def pages(self) -> Iterator[Page]:
        """Decoded index pages, in order. Raises Damaged."""
        yield from read_pages(self._repository, self.point.source, self._manifest.pages)

    def members(self) -> Iterator[Member]:
        for path, row, _ in self._rows():
            yield member_of(path, row)

    def read(self, name: str) -> Iterator[bytes]:
        row, packs = self._find(name)
        if "hardlink" in extra_of(row):
            yield from self.read(extra_of(row)["hardlink"])
            return
        extents = extra_of(row).get("sparse")
        pieces = pieces_of(row, packs)
        blobs = (bytes(part) for _, part in self.frames.stream([(None, pieces)]) if part is not None)
        yield from blobs if extents is None else _with_holes(blobs, extents, row[SIZE])

    def tar(
        self, change: Callable[[Member], Member | None] | None = None, *, end: bool = True
    ) -> Iterator[Bytes]:
        return _gathered(self._tar(change, tar.END if end else b""))

    def _tar(self, change: Callable[[Member], Member | None] | None, end: bytes) -> Iterator[Bytes]:
        def requests() -> Iterator[tuple[tuple[Member, Row], Pieces | None]]:
            for path, row, packs in self._rows():
                member: Member | None = member_of(path, row)
                if change is not None and member is not None:
                    member = change(member)
                if member is not None:
                    yield (member, row), pieces_of(row, packs) if is_file(row) else None

        pad = 0
        for (member, row), part in self.frames.stream(requests()):
            if part is None:
                if pad:
                    yield bytes(pad)
                pad = -_stored_size(row) & 511 if is_file(row) else 0
                yield _tar_header(member, row)
            else:
                yield part
        yield bytes(pad) + end

    def extract(self, into: Path) -> list[str]:
        from backupd.archive.extract import Extraction
        from backupd.archive.extract_apart import processes

        pages = self._manifest.pages
        count = processes(sum(page.members for page in pages), sum(page.bytes for page in pages))
        extraction = Extraction(into, self.frames, self._progress, processes=count)
        extraction.run(self.pages())
        return extraction.warnings

    # --- inside ------------------------------------------------------------------------------------------

    def _page(self, ref: PageRef) -> Page:
        return read_page(self._repository, self.point.source, ref)

    def _rows(self) -> Iterator[tuple[str, Row, list[str]]]:
        """(directory, row, packs of its page); the directory's own row has an empty name."""
        for page in self.pages():
            for path, own, rows in page.dirs:
                if own is not None:
                    yield path, own, page.packs
                for row in rows:
                    yield path, row, page.packs

    def _find(self, name: str) -> tuple[Row, list[str]]:
        """A file by name: by bisection where the pages are sorted, else (or where that misses) by reading them all."""
        path, _, last = name.rpartition("/")
        refs = self._manifest.pages
        if self._manifest.ordered:
            index = bisect.bisect_right([ref.first for ref in refs], sort_key(path, last)) - 1
            likely = refs[max(0, index) : index + 1]
        else:
            likely = ()
        for ref in (*likely, *refs):
            page = self._page(ref)
            for directory, _, rows in page.dirs:
                if directory == path:
                    for row in rows:
                        if row[NAME] == last and stat.S_ISREG(row[MODE]):
                            return row, page.packs
        raise NoRecoveryPoint(
            f"there is no file '{name}' in the point {self.point.id} of {self.point.source}",
            hint=f"see `backupd ls {self.point.id}`",
        )


def open_archive(
    repository: Repository, point: RecoveryPoint, *, progress: Progress | None = None
) -> PointArchive:
    """Raises ObjectMissing, Damaged."""
    return PointArchive(repository, repository.manifest(point), progress=progress)


def full_name(path: str, row: Row) -> str:
    name = str(row[NAME])
    return f"{path}/{name}" if path and name else path or name


def member_of(path: str, row: Row) -> Member:
    extra = extra_of(row)
    kind = MemberType.HARDLINK if "hardlink" in extra else _TYPES[stat.S_IFMT(row[MODE])]
    link = str(extra["hardlink"]) if kind is MemberType.HARDLINK else ""
    if kind is MemberType.SYMLINK:
        link = str(row[CONTENT])
    size = row[SIZE] if kind is MemberType.FILE else 0
    return Member(
        full_name(path, row), kind, size, stat.S_IMODE(row[MODE]), row[UID], row[GID], row[MTIME], link
    )


def _stored_size(row: Row) -> int:
    """Bytes of content in a tar: without the holes."""
    extents = extra_of(row).get("sparse")
    return int(row[SIZE] if extents is None else tar.sparse_size(extents))


def _tar_header(member: Member, row: Row) -> bytes:
    extra: dict[str, Any] = extra_of(row)
    device = extra.get("device", (0, 0))
    sparse = extra.get("sparse")
    return tar.header(
        os.fsencode(member.name or "."), _TAR_TYPES[member.type], member.mode, member.uid, member.gid, member.size,
        member.mtime_ns, link=os.fsencode(member.link), device=(device[0], device[1]), xattrs=xattrs_of(row),
        sparse=None if sparse is None else [(at, length) for at, length in sparse], exact_time=True,
    )  # fmt: skip


def _gathered(chunks: Iterator[Bytes]) -> Iterator[Bytes]:
    """The same bytes, small chunks put together: who sends them has a call to the system for each."""
    small = bytearray()
    for chunk in chunks:
        large = len(chunk) > _SMALL
        if small and (large or len(small) + len(chunk) > _GATHERED):
            yield bytes(small)
            small.clear()
        if large:
            yield chunk
        else:
            small += chunk
    if small:
        yield bytes(small)


def _with_holes(blobs: Iterator[bytes], extents: list[list[int]], size: int) -> Iterator[bytes]:
    """A sparse file's whole content: its pieces of data, and zeros between."""
    step = 1 << 20
    position = 0
    rest = memoryview(b"")
    for offset, length in [*extents, [size, 0]]:
        while position < offset:
            zeros = min(step, offset - position)
            yield bytes(zeros)
            position += zeros
        left = length
        while left:
            if not rest:
                rest = memoryview(next(blobs))
            part, rest = rest[:left], rest[left:]
            yield bytes(part)
            left -= len(part)
        position = offset + length
