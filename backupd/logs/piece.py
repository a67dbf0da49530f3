"""A log object's bytes: a header in a skippable frame, then the log itself in frames, so that
`cat *.zst | zstd -d` is the log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from backupd.codec import Buffer, Codec
from backupd.errors import Damaged
from backupd.model import Anchor

FORMAT = 1
FRAME = 8 << 20
"""Bytes of log in a frame: what a reader holds at once."""
HEAD = 64 << 10
"""Read at once, this nearly always holds the header."""

_MAGIC = b"\x53\x2a\x4d\x18"
_LARGEST_HEADER = 1 << 26
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of the log: its length in the object, its bytes when decoded, their digest."""

    length: int
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Header:
    """What an object says of itself."""

    anchors: tuple[Anchor, ...]
    """Oldest first."""
    frames: tuple[Frame, ...]
    length: int = 0
    """Bytes before the first frame."""
    gap: str = ""
    """Why the window closes here, where it does."""

    @property
    def stored(self) -> int:
        """Bytes that the object must have."""
        return self.length + sum(frame.length for frame in self.frames)

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)


def encode(
    codec: Codec, chunks: Iterable[bytes], anchors: Sequence[Anchor], *, gap: str = ""
) -> tuple[bytes, int]:
    """The object, and the bytes of log in it."""
    frames: list[Frame] = []
    stored: list[bytes] = []
    for block in _blocks(chunks):
        frame = codec.encode(block)
        frames.append(Frame(len(frame), len(block), codec.digest(block).hex()))
        stored.append(frame)
    about: dict[str, Any] = {
        "format": FORMAT,
        "anchors": [[micros(anchor.at), anchor.position] for anchor in anchors],
        "frames": [[frame.length, frame.size, frame.digest] for frame in frames],
        **({"gap": gap} if gap else {}),
    }
    header = codec.encode(json.dumps(about, separators=(",", ":")).encode())
    head = _MAGIC + struct.pack("<I", len(header)) + header
    return b"".join((head, *stored)), sum(frame.size for frame in frames)


def _blocks(chunks: Iterable[bytes]) -> Iterator[Buffer]:
    """Of FRAME bytes, the last one shorter. What comes in one chunk is not copied."""
    parts: list[memoryview] = []
    size = 0
    for chunk in chunks:
        left = memoryview(chunk)
        while left:
            parts.append(left[: FRAME - size])
            left = left[FRAME - size :]
            size += len(parts[-1])
            if size == FRAME:
                yield _joined(parts)
                parts, size = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[memoryview]) -> Buffer:
    return parts[0] if len(parts) == 1 else b"".join(parts)


def header_length(stored: bytes) -> int:
    """Bytes before the first frame. Raises Damaged."""
    if len(stored) < 8 or stored[:4] != _MAGIC:
        raise Damaged("it does not begin with a header")
    return 8 + int(struct.unpack_from("<I", stored, 4)[0])


def decode_header(codec: Codec, stored: bytes) -> Header:
    """Of an object, or of a beginning of it that holds the header. Raises Damaged."""
    length = header_length(stored)
    if length > len(stored):
        raise Damaged("its header is cut off")
    plain = codec.decode_unsized(stored[8:length], limit=_LARGEST_HEADER)
    try:
        about = json.loads(plain)
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        anchors = tuple(Anchor(instant(at), int(position)) for at, position in about["anchors"])
        frames = tuple(Frame(int(n), int(size), str(digest)) for n, size, digest in about["frames"])
        return Header(anchors, frames, length, str(about.get("gap", "")))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Damaged(f"its header cannot be read: {error}") from None


def decode(codec: Codec, stored: bytes, header: Header | None = None) -> Iterator[bytes]:
    """The log in it, frame by frame, each compared with its digest. `header`: where it is known. Raises Damaged."""
    header = header or decode_header(codec, stored)
    if header.stored != len(stored):
        raise Damaged(f"it has {len(stored):,} bytes instead of {header.stored:,}")
    view, at = memoryview(stored), header.length
    for frame in header.frames:
        yield decode_frame(codec, view[at : at + frame.length], frame)
        at += frame.length


def decode_frame(codec: Codec, stored: bytes | memoryview, frame: Frame) -> bytes:
    """One of its frames, compared with its digest. Raises Damaged."""
    data = codec.decode(stored, frame.size)
    if codec.digest(data).hex() != frame.digest:
        raise Damaged("its content is not what was written")
    return data


def micros(at: datetime) -> int:
    """Microseconds since 1970."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def instant(micros: int) -> datetime:
    """Raises OverflowError, TypeError."""
    return _EPOCH + timedelta(microseconds=micros)
