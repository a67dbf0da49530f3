"""Content that the live points of a source hold already, found by its digest.

The digests in a row, and an open-addressing table of positions beside them: 24 bytes a blob, where a dict of Python
objects takes 200; 0.2 us to take one in. Collisions are settled by the whole digest.
Bounded: beyond `limit` blobs nothing more is taken in, which costs room in the repository and never correctness.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right

from backupd.codec import DIGEST_SIZE

_ROW = 24  # offset u32, length u32, digest: a row of a pack's directory
_AT_ONCE = 1 << 14  # rows: what is made on the way must not be as large as the table itself

LIMIT = 1_500_000
"""Blobs: some 50 to 75 MB of memory."""


class KnownContent:
    """Digest -> (pack, blob). One writer; readers may look up meanwhile and at worst miss what is just coming."""

    def __init__(self, limit: int = LIMIT, *, expected: int = 0) -> None:
        """`expected` blobs fit before the table has to be made again."""
        self._limit = limit
        self._digests = bytearray()
        # Runs of rows that are neighbours in their pack: the first row of each; its pack, and what to add to a
        # row's number for the number of its blob.
        self._starts: list[int] = []
        self._runs: list[tuple[str, int]] = []
        self._count = 0
        self._slots = _empty(max(min(expected, limit), 1 << 14))

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= self._limit

    def add_pack(self, pack: str, blobs: bytes | bytearray, first: int = 0) -> None:
        """Take in a pack's blobs: rows of a directory, from blob number `first` on."""
        start = self._count
        end = min(start + len(blobs) // _ROW, self._limit)
        if start >= end:
            return
        run = (pack, first - start)
        if not self._runs or self._runs[-1] != run:
            self._runs.append(run)
            self._starts.append(start)
        for at in range(0, end - start, _AT_ONCE):
            self._digests += _digests(memoryview(blobs)[at * _ROW : min(at + _AT_ONCE, end - start) * _ROW])
        if end * 2 > len(self._slots):
            slots = _empty(end * 2)
            self._enter(slots, 0, end)
            self._slots = slots  # swapped in whole: a reader sees the old table or the new one
        else:
            self._enter(self._slots, start, end)
        self._count = end

    def find(self, digest: bytes) -> tuple[str, int] | None:
        """Name of the pack and number of the blob, or None."""
        slots = self._slots
        mask = len(slots) - 1
        slot = int.from_bytes(digest[:4], sys.byteorder) & mask
        digests = self._digests
        while position := slots[slot]:
            row = position - 1
            start = row * DIGEST_SIZE
            if digests[start : start + DIGEST_SIZE] == digest:
                pack, shift = self._runs[bisect_right(self._starts, row) - 1]
                return pack, row + shift
            slot = (slot + 1) & mask
        return None

    def _enter(self, slots: array[int], start: int, end: int) -> None:
        """Point to rows that are there already. A slot holds a row's number plus one; 0 is empty."""
        mask = len(slots) - 1
        for at in range(start, end, _AT_ONCE):
            last = min(at + _AT_ONCE, end)
            # Four words a digest, the first is its beginning: picked out without a loop in Python.
            heads = array("I", bytes(memoryview(self._digests)[at * DIGEST_SIZE : last * DIGEST_SIZE]))[::4]
            for position, head in enumerate(heads, at + 1):
                slot = head & mask
                while slots[slot]:
                    slot = (slot + 1) & mask
                slots[slot] = position


def _digests(rows: memoryview) -> array[int]:
    """The digests alone, without a loop in Python: a row is three words, the last two of them the digest."""
    words = array("Q", bytes(rows))
    found = array("Q", bytes(len(words) // 3 * DIGEST_SIZE))
    found[::2] = words[1::3]
    found[1::2] = words[2::3]
    return found


def _empty(count: int) -> array[int]:
    """Slots for `count` rows, at most half of them to be filled."""
    return array("I", [0]) * (1 << (count * 2 - 1).bit_length())
