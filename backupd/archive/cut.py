"""Where content is cut into blobs.

Fixed cuts where the data is changed in place in pages (relation files, SQLite), content-defined ones elsewhere
(FastCDC: Xia et al., USENIX ATC 2016), so that a byte inserted at the front moves one cut and not all.
"""

from __future__ import annotations

from typing import Protocol

BLOCK_SIZE = 16384
"""Bytes of a blob of a large file, on average: fine enough that scattered updates store a quarter of what 1 MiB
chunks would."""
WHOLE = 64 << 10
"""Bytes: a file of up to so many is one blob. A third of a tree's bytes lie in files between this and 1 MiB: cut, an
edited one is not stored whole, and a tree of which 1 % changed grows by 0.82 of what it did. Half of this gave 0.77
and more blobs."""
_LARGEST = 256 << 10  # four times this, the longest content-defined blob, must fit into a frame
_DOUBLE_AT = 2 << 30


class Cutter(Protocol):
    def cut(self, view: memoryview, position: int, *, last: bool) -> list[int]:
        """Lengths of the blobs at the front of `view`, which begins at `position` of the content.

        Unless `last`, bytes at the end may be left over: they come again at the front of the next call.
        """


def block_size(position: int, smallest: int = BLOCK_SIZE) -> int:
    """Blobs grow with the position: 16 KiB up to 2 GiB, 32 up to 4, and so on up to 256 KiB, so that the table of
    what is known grows far slower than the data."""
    return min(_LARGEST, smallest << (position // _DOUBLE_AT).bit_length())


class FixedCutter:
    """Blobs of one size."""

    def __init__(self, size: int = BLOCK_SIZE) -> None:
        self._size = size

    def cut(self, view: memoryview, position: int, *, last: bool) -> list[int]:
        size = block_size(position, self._size)
        whole, rest = divmod(len(view), size)
        lengths = [size] * whole
        if rest and last:
            lengths.append(rest)
        return lengths


class FileCutter:
    """Cuts files that are at hand from end to end. Not for several threads."""

    def __init__(self) -> None:
        self._fixed = FixedCutter()
        self._content: ContentCutter | None = None

    def cut(self, view: memoryview) -> list[int]:
        """Lengths of the blobs of a file."""
        if is_paged(bytes(view[:24])):
            return self._fixed.cut(view, 0, last=True)
        if self._content is None:
            self._content = ContentCutter(part=1)
        return self._content.cut(view, 0, last=True)


class ContentCutter:
    """Blobs whose ends the content chooses. The shortest is a `part` of the average: before that nothing is looked at,
    so that 1 is twice as quick as 4 (3.7 GB/s), and edits of the content store a little more."""

    def __init__(self, part: int = 4) -> None:
        from pyfastcdc import FastCDC  # 18 ms, and only where large files are

        self._make = FastCDC
        self._part = part
        self._size = 0

    def cut(self, view: memoryview, position: int, *, last: bool) -> list[int]:
        size = block_size(position)
        if size != self._size:
            self._size = size
            self._cdc = self._make(avg_size=size, min_size=size // self._part, max_size=size * 4)
        lengths = [int(chunk.length) for chunk in self._cdc.cut_buf(view)]
        if not last and lengths and len(view) > self._size * 4:
            lengths.pop()  # its end is the buffer's, not the content's
        return lengths


def is_paged(head: bytes) -> bool:
    """Whether a file is written over in place, page by page, as its first 24 bytes tell.

    SQLite: its file header. PostgreSQL: the first page's header, size and layout version at offset 18: 8192 with
    version 4, since PostgreSQL 8.3.
    """
    return head.startswith(b"SQLite format 3\0") or head[18:20] == b"\x04\x20"
