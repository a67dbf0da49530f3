"""A file of which only some pages are given: the others are as they were in an earlier point.

Where the earlier point has the file page by page, its pages are named again and nothing of it is read. Small files are
read, laid together and stored as any of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from backupd.archive.cut import FixedCutter, block_size
from backupd.archive.feed import LARGE, ChunkFill, Fill, feed_large
from backupd.archive.page import Content, Pieces
from backupd.archive.pipeline import Pipeline
from backupd.errors import Damaged

Extents = Sequence[tuple[int, int]]
"""(offset, length) of what is given, in order."""


def page_by_page(pieces: Pieces, old: int, size: int, given: Extents, page: int) -> bool:
    """Whether a file of `size` bytes can be made by naming pages of the one that had `old`. Pure."""
    aligned = size % page == 0 and all(at % page == 0 and length % page == 0 for at, length in given)
    single = min(old, size) > LARGE and block_size(max(old, size) - 1, page) == page
    return aligned and single and old % page == 0 and sum(count for _, _, count in pieces) == old // page


def unchanged(old: int, size: int, given: Extents) -> bool:
    """Whether it is the file that was. Pure."""
    return not given and old == size


def feed_pages(
    pipeline: Pipeline, fill: Fill, pieces: Pieces, old: int, size: int, given: Extents, page: int
) -> Content:
    """What is given is fed, what lies between is named; behind the old end it is zeros, as a server reads them."""
    content: Content = []
    earlier = _Cursor(pieces)
    blank = ChunkFill(iter(lambda: bytes(page), None))
    position = 0
    for offset, length in [*given, (size, 0)]:
        known = min(offset, max(old, position))
        content += earlier.take((known - position) // page)
        fresh: Pieces = []
        _feed_each(pipeline, blank, fresh, (offset - known) // page, page)
        _feed_each(pipeline, fill, fresh, length // page, page)
        if offset > known or length:
            content.append(fresh)
        position = offset + length
        earlier.take(length // page)
    return content


def laid_together(
    earlier: Iterable[bytes], fill: Fill, old: int, size: int, given: Extents
) -> Iterator[bytes]:
    """The bytes of the file: of `earlier`, which had `old` bytes, with what is given laid over."""
    before = ChunkFill(iter(earlier))
    position = 0
    for offset, length in [*given, (size, 0)]:
        known = min(offset, max(old, position))
        yield from _taken(before, known - position)
        yield from _chunks(offset - known)
        yield from _taken(fill, length)
        position = offset + length
        for _ in _taken(before, max(0, min(old, position) - offset)):
            pass


def feed_whole(pipeline: Pipeline, chunks: Iterator[bytes], size: int, page: int) -> Pieces:
    """As any file of this size that is written over in pages."""
    if size > LARGE:
        pieces, _ = feed_large(pipeline, ChunkFill(chunks), FixedCutter(page), header=b"", size=size)
        return pieces
    made: Pieces = []
    slab = pipeline.room(size)
    start = slab.length
    _fill_whole(ChunkFill(chunks), slab.view[start : start + size])
    slab.add_file(start, size, made)
    slab.length += size
    pipeline.filled()
    return made


class _Cursor:
    """Takes blobs off the front."""

    def __init__(self, pieces: Pieces) -> None:
        self._left = iter(pieces)
        self._pack, self._first, self._count = "", 0, 0

    def take(self, count: int) -> Pieces:
        """As many as there are, of those asked for."""
        taken: Pieces = []
        while count > 0:
            if not self._count:
                piece = next(self._left, None)
                if piece is None:
                    break
                self._pack, self._first, self._count = piece
            step = min(count, self._count)
            taken.append([self._pack, self._first, step])
            self._first += step
            self._count -= step
            count -= step
        return taken


def _feed_each(pipeline: Pipeline, fill: Fill, pieces: Pieces, count: int, size: int) -> None:
    """So many blobs of one size."""
    for _ in range(count):
        slab = pipeline.room(size)
        start = slab.length
        _fill_whole(fill, slab.view[start : start + size])
        slab.blobs.append((start, size, pieces, b""))
        slab.length += size
        pipeline.filled()


def _fill_whole(fill: Fill, view: memoryview) -> None:
    at = 0
    while at < len(view):
        got = fill(view[at:])
        if not got:
            raise Damaged("the pages of a file are not all there")
        at += got


def _taken(fill: Callable[[memoryview], int], count: int) -> Iterator[bytes]:
    while count > 0:
        chunk = bytearray(min(count, LARGE))
        _fill_whole(fill, memoryview(chunk))
        yield bytes(chunk)
        count -= len(chunk)


def _chunks(count: int) -> Iterator[bytes]:
    """Zeros."""
    while count > 0:
        yield bytes(min(count, LARGE))
        count -= LARGE
