"""Content that the live points of a source hold already, found by its digest.

A flat table of (digest, pack, blob) and an open-addressing table of positions beside it: 32 bytes a blob, where a
dict of Python objects takes 200. Collisions are settled by the whole digest. Bounded: beyond `limit` blobs nothing
more is taken in, which costs room in the repository and never correctness.
"""

from __future__ import annotations

import struct
from array import array

from backupd.codec import DIGEST_SIZE

_ROW = struct.Struct(f"<{DIGEST_SIZE}sII")
_BLOB_SIZE = 24  # offset u32, length u32, digest: a row of a pack's directory
_DIGEST_AT = 8

LIMIT = 1_500_000
"""Blobs: some 50 to 75 MB of memory."""


class KnownContent:
    """Digest -> (pack, blob). One writer; readers may look up meanwhile and at worst miss what is just coming."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rows = bytearray()
        self._packs: list[str] = []
        self._numbers: dict[str, int] = {}
        self._count = 0
        self._slots = array("I", bytes(4 << 12))

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= self._limit

    def add_pack(self, pack: str, blobs: bytes | bytearray, first: int = 0) -> None:
        """Take in a pack's blobs: rows of a directory, from blob number `first` on."""
        number = self._numbers.get(pack)
        if number is None:
            number = self._numbers[pack] = len(self._packs)
            self._packs.append(pack)
        count = len(blobs) // _BLOB_SIZE
        if (self._count + count) * 2 > len(self._slots):
            self._grow(self._count + count)
        slots, mask, rows = self._slots, len(self._slots) - 1, self._rows
        for blob in range(count):
            if self._count >= self._limit:
                return
            start = blob * _BLOB_SIZE + _DIGEST_AT
            digest = bytes(blobs[start : start + DIGEST_SIZE])
            rows += _ROW.pack(digest, number, first + blob)
            self._count += 1
            slot = int.from_bytes(digest[:4], "little") & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = self._count  # the row is there before its slot points to it

    def find(self, digest: bytes) -> tuple[str, int] | None:
        """Name of the pack and number of the blob, or None."""
        slots = self._slots
        mask = len(slots) - 1
        slot = int.from_bytes(digest[:4], "little") & mask
        rows = self._rows
        while position := slots[slot]:
            start = (position - 1) * _ROW.size
            if rows[start : start + DIGEST_SIZE] == digest:
                _, number, blob = _ROW.unpack_from(rows, start)
                return self._packs[number], blob
            slot = (slot + 1) & mask
        return None

    def _grow(self, count: int) -> None:
        size = len(self._slots)
        while size < count * 2:
            size *= 2
        slots = array("I", bytes(4 * size))
        mask = size - 1
        rows = self._rows
        for position in range(1, self._count + 1):
            start = (position - 1) * _ROW.size
            slot = int.from_bytes(rows[start : start + 4], "little") & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = position
        self._slots = slots  # swapped in whole: a reader sees the old table or the new one
