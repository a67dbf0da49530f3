"""Packs: rows of frames, with the directory that says what lies where at the end. FORMAT.md has the offsets.

    content frame        a zstd frame of some 2 MiB of tar bytes
    page frame           a zstd *skippable* frame (0x184D2A51) around one encoded index page
    directory frame      a zstd *skippable* frame (0x184D2A52) around the encoded directory and a 16-byte tail

`zstd -d` passes over skippable frames, so that the packs of a first run, one after another, are a plain .tar.zst.
Because each pack describes itself, what an interrupted run has stored can be found and used by the next.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from backupd.codec import DIGEST_SIZE, Codec
from backupd.errors import Damaged

PAGE_MAGIC = 0x184D2A51
DIRECTORY_MAGIC = 0x184D2A52
_SKIPPABLE = struct.Struct("<II")
_TAIL = struct.Struct("<II8s")
_MARK = b"BKPDDIR1"
BLOB = struct.Struct(f"<II{DIGEST_SIZE}s")
_HEAD = struct.Struct("<II")
TAIL_SIZE = _TAIL.size


class Frame(NamedTuple):
    """One stored frame: where it lies in the pack, and how many blobs it holds."""

    offset: int
    length: int
    size: int
    blobs: int


@dataclass(slots=True)
class Directory:
    """What a pack holds. `blobs` is a row of (offset in frame, length, digest), 24 bytes each, in frame order."""

    frames: list[Frame] = field(default_factory=list)
    pages: list[list[Any]] = field(default_factory=list)
    """[stat, offset, length, size, digest, first, packs, members, bytes], as a PageRef without its pack."""
    blobs: bytearray = field(default_factory=bytearray)
    _starts: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.blobs) // BLOB.size

    def starts(self) -> list[int]:
        """The number of the first blob of each frame, and at the end the number of blobs."""
        if not self._starts:
            self._starts = [0, *accumulate(frame.blobs for frame in self.frames)]
        return self._starts


def skippable(magic: int, payload: bytes) -> bytes:
    return _SKIPPABLE.pack(magic, len(payload)) + payload


SKIPPABLE_HEADER = _SKIPPABLE.size


def encode_directory(directory: Directory, codec: Codec) -> bytes:
    """The directory frame, tail included."""
    head = json.dumps(
        {
            "frames": [[f.offset, f.length, f.size, f.blobs] for f in directory.frames],
            "pages": directory.pages,
        },
        separators=(",", ":"),
    ).encode()
    plain = _HEAD.pack(len(head), directory.count) + head + directory.blobs
    stored = codec.encode(plain)
    return skippable(DIRECTORY_MAGIC, stored + _TAIL.pack(len(stored), len(plain), _MARK))


def decode_directory(frame: bytes, codec: Codec) -> Directory:
    """`frame` is the directory frame, which ends the pack. Raises Damaged."""
    with _readable():
        head_bytes, blobs = _parts(frame, codec)
        head = json.loads(head_bytes)
        frames = [Frame(*(int(number) for number in row)) for row in head["frames"]]
        if sum(f.blobs for f in frames) * BLOB.size != len(blobs):
            raise ValueError("its table of blobs has the wrong length")
        return Directory(frames, head["pages"], bytearray(blobs))


def decode_blobs(frame: bytes, codec: Codec) -> bytes:
    """The table of blobs alone, of a directory frame. Raises Damaged."""
    with _readable():
        return _parts(frame, codec)[1]


def _parts(frame: bytes, codec: Codec) -> tuple[bytes, bytes]:
    """Head and table of blobs."""
    magic, length = _SKIPPABLE.unpack_from(frame)
    stored_length, size, mark = _TAIL.unpack_from(frame, len(frame) - TAIL_SIZE)
    if magic != DIRECTORY_MAGIC or mark != _MARK or length != len(frame) - SKIPPABLE_HEADER:
        raise ValueError("it does not look like one")
    plain = codec.decode(frame[SKIPPABLE_HEADER : SKIPPABLE_HEADER + stored_length], size)
    head_length, count = _HEAD.unpack_from(plain)
    blobs = plain[_HEAD.size + head_length :]
    if len(blobs) != count * BLOB.size:
        raise ValueError("its table of blobs has the wrong length")
    return plain[_HEAD.size : _HEAD.size + head_length], blobs


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"the directory of a pack cannot be read: {error}") from None


def directory_length(tail: bytes) -> int:
    """Length of the whole directory frame, from the last TAIL_SIZE bytes of a pack. Raises Damaged."""
    stored_length, _, mark = _TAIL.unpack(tail)
    if mark != _MARK:
        raise Damaged("a pack has no directory: it was not written whole")
    return int(SKIPPABLE_HEADER + stored_length + TAIL_SIZE)


class PackBuilder:
    """Collects frames and pages until a pack is full, in a buffer that the next pack uses again: frames that waited
    as objects of their own would leave the heap in tatters, twice the pack's size in memory."""

    def __init__(self, name: str, buffer: bytearray | None = None) -> None:
        self.name = name
        self.directory = Directory()
        self.size = 0
        self.buffer = bytearray() if buffer is None else buffer

    def add_frame(self, stored: bytes, size: int, blobs: Sequence[bytes]) -> int:
        """Append a content frame holding `blobs` (packed BLOB rows); the number of its first blob."""
        first = self.directory.count
        self.directory.frames.append(Frame(self.size, len(stored), size, len(blobs)))
        self.directory.blobs += b"".join(blobs)
        self._append(stored)
        return first

    def add_page(self, stored: bytes) -> int:
        """Append a page; where its payload begins."""
        self._append(_SKIPPABLE.pack(PAGE_MAGIC, len(stored)))
        offset = self.size
        self._append(stored)
        return offset

    def finish(self, codec: Codec) -> tuple[memoryview, int]:
        """The whole pack, and the length of its directory frame. The buffer is the pack's until it is let go."""
        frame = encode_directory(self.directory, codec)
        self._append(frame)
        return memoryview(self.buffer)[: self.size], len(frame)

    def _append(self, data: bytes) -> None:
        end = self.size + len(data)
        self.buffer[self.size : end] = data  # in place, and beyond the end it grows
        self.size = end
