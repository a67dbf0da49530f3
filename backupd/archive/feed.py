"""From open files and streams into slabs: what the reader does with one member's content."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from backupd.archive import tar
from backupd.archive.cut import Cutter
from backupd.archive.page import Pieces
from backupd.archive.pipeline import FRAME_SIZE, SLAB_SIZE, Pipeline, Slab

LARGE = 1 << 20
"""Bytes: larger files are read piece by piece; smaller ones come whole into a slab."""

Fill = Callable[[memoryview], int]
"""Put bytes into the view; how many, 0 at the end."""


class ChunkFill:
    """An iterator of chunks, read as into buffers."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def __call__(self, view: memoryview) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def feed_large(
    pipeline: Pipeline, fill: Fill, cutter: Cutter, *, header: bytes, size: int | None
) -> tuple[Pieces, int]:
    """Content of known length behind one tar header (or none): at most `size` bytes are taken.

    Returns its pieces and the bytes read. Where `header` is given, what was promised and did not come is made up
    for by zeros behind it, so that the tar stays whole.
    """
    pieces: Pieces = []
    total = 0
    for slab, start, count, lengths in _slabs(pipeline, fill, cutter, header, size):
        at = start
        for length in lengths:
            slab.blobs.append((at, length, pieces, b""))
            at += length
        total += count
        slab.length = at
        pipeline.submit()
    if header and size is not None:
        _pad(pipeline, size - total + (-size & 511))
    return pieces, total


def feed_stream(
    pipeline: Pipeline, fill: Fill, cutter: Cutter, part_header: Callable[[int, int], bytes] | None
) -> tuple[Pieces, int]:
    """Content of unknown length. `part_header(number, size)` makes the tar header of each part (always 512 bytes):
    a tar cannot promise a length that nobody knows, so a stream is a row of members `NAME.000001`, ...
    """
    pieces: Pieces = []
    total = 0
    blank = bytes(tar.BLOCK) if part_header else b""
    for number, (slab, start, count, lengths) in enumerate(
        _slabs(pipeline, fill, cutter, blank, None, every=True), 1
    ):
        at = start
        for length in lengths:
            slab.blobs.append((at, length, pieces, b""))
            at += length
        total += count
        if part_header:
            slab.view[: tar.BLOCK] = part_header(number, count)
            end = at + (-count & 511)
            slab.view[at:end] = bytes(end - at)
            at = end
        slab.length = at
        pipeline.submit()
    return pieces, total


def _slabs(
    pipeline: Pipeline, fill: Fill, cutter: Cutter, header: bytes, size: int | None, *, every: bool = False
) -> Iterator[tuple[Slab, int, int, list[int]]]:
    """Slabs filled with content: (slab, where its blobs begin, their bytes, their lengths)."""
    carry = b""
    position = 0  # of the next byte to be cut
    left = size
    ended = False
    while not ended or carry:
        pipeline.submit()
        slab = pipeline.room(SLAB_SIZE)
        view = slab.view
        start = len(header)
        view[:start] = header
        if not every:
            header = b""
        end = start + len(carry)
        view[start:end] = carry
        full = min(start + FRAME_SIZE, end + left) if left is not None else start + FRAME_SIZE
        while end < full and not ended:
            got = fill(view[end:full])
            ended = got == 0
            end += got
            left = left - got if left is not None else None
        ended = ended or left == 0
        if end == start:
            if start and not every:  # an empty file behind a header
                yield slab, start, 0, []
            else:
                slab.length = 0
            return
        lengths = cutter.cut(view[start:end], position, last=ended)
        count = sum(lengths)
        carry = bytes(view[start + count : end])
        position += count
        yield slab, start, count, lengths


def _pad(pipeline: Pipeline, count: int) -> None:
    while count > 0:
        step = min(count, FRAME_SIZE)
        slab = pipeline.room(step)
        slab.view[slab.length : slab.length + step] = bytes(step)
        slab.length += step
        pipeline.filled()
        count -= step
