"""PostgreSQL's write-ahead log as bytes: pieces into segment files, and which transactions ended when. Pure.

Source: `xlog_internal.h`, `xlogrecord.h`, `xact.h`; the layout is the same from 9.5 to 18. Pages have headers of
24 bytes (40 at the front of a segment), records flow over them and begin at multiples of 8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backupd.errors import Damaged

PAGE = 8192
_SHORT = struct.Struct("<HHIQI4x")  # magic, info, timeline, address, bytes left of a record begun before
_LONG = struct.Struct("<HHIQI4xQII")  # and system identifier, segment size, page size
_CONTINUES, _LONG_HEADER, _OVERWRITTEN = 1, 2, 8
_MAGIC = {13: 0xD106, 14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
_RECORD = struct.Struct("<IIQBB")  # length, transaction, previous record, info, resource manager
_RECORD_HEADER = 24
_TRANSACTIONS = 1  # resource manager
_COMMITS, _ABORTS = (0x00, 0x30), (0x20, 0x40)  # plain, and of a prepared transaction
_ORIGIN, _TOP_LEVEL, _LONG_DATA, _SHORT_DATA = 253, 252, 254, 255
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def epoch_parts(epoch: str) -> tuple[str, int]:
    """System identifier and timeline. Raises Damaged."""
    system, _, timeline = epoch.rpartition("-")
    if not system.isdigit() or not timeline.isdigit():
        raise Damaged(f"{epoch!r} is no epoch of a PostgreSQL log")
    return system, int(timeline)


def segment_name(timeline: int, position: int, size: int) -> str:
    """The file that holds this position."""
    high, low = divmod(position // size, (1 << 32) // size)
    return f"{timeline:08X}{high:08X}{low:08X}"


def segment_position(name: str, size: int) -> int:
    """Where the segment of this name begins. Raises ValueError."""
    if len(name) != 24:
        raise ValueError(name)
    return ((int(name[8:16], 16) << 32) // size + int(name[16:], 16)) * size


# --- segments --------------------------------------------------------------------------------------------


class Segments:
    """Pieces of WAL, which may begin and end anywhere, as the segment files a server reads.

    Where the first piece begins inside a segment, the headers that the server checks before it reads the base's
    first record are made up; nothing else before that record is read. A segment that is given out is the caller's
    until the next is asked for: all are made in one buffer.
    """

    def __init__(self, size: int, major: int) -> None:
        self._size = size
        self._major = major
        self._system = ""
        self._timeline = 0
        self._segment = bytearray()
        self._front = 0  # of the first segment, what no piece brings
        self.position: int | None = None
        """Where the next piece must begin."""
        self.switches: list[tuple[int, int]] = []
        """(timeline that ended, where)."""

    @property
    def timeline(self) -> int:
        """Of the last piece."""
        return self._timeline

    def add(self, epoch: str, start: int, data: bytes) -> Iterator[tuple[str, bytearray]]:
        """The segments that are full now, by name. Raises Damaged where the piece does not continue the log."""
        if (ended := self._enter(epoch, start)) is not None:
            yield ended
        view = memoryview(data)
        while view:
            at = start % self._size
            count = min(len(view), self._size - at)
            self._room[at : at + count] = view[:count]
            start += count
            view = view[count:]
            self.position = start
            if start % self._size == 0:
                yield self._made(start - self._size, self._size)

    def finish(self) -> Iterator[tuple[str, bytearray]]:
        """The last segment, filled up with zeros: there the server finds the end."""
        if self.position is not None and self.position % self._size:
            filled = self.position % self._size
            yield self._made(self.position - filled, filled)

    def _enter(self, epoch: str, start: int) -> tuple[str, bytearray] | None:
        """Where another timeline begins inside a segment, the one that ended there as it stands: the new one's
        begins with the same bytes."""
        system, timeline = epoch_parts(epoch)
        if self.position is None:
            self._system, self._timeline = system, timeline
            self._front = start % self._size
            self._segment = bytearray(self._size)
            self._room = memoryview(self._segment)  # a slice of the bytearray itself would be copied twice
            self.position = start
        if system != self._system or timeline < self._timeline:
            raise Damaged(f"the log goes on with another cluster's: {epoch}")
        if start != self.position:
            raise Damaged(
                f"the log has a hole: it ends at {self.position:X} and goes on at {start:X}",
                hint="run backupd verify",
            )
        if timeline == self._timeline:
            return None
        self.switches.append((self._timeline, start))
        filled = start % self._size
        ended = self._made(start - filled, filled) if filled else None
        self._timeline = timeline
        return ended

    def _made(self, start: int, filled: int) -> tuple[str, bytearray]:
        self._room[filled:] = bytes(self._size - filled)
        if self._front:
            self._make_front(self._segment, start)
            self._front = 0
        return segment_name(self._timeline, start, self._size), self._segment

    def _make_front(self, segment: bytearray, start: int) -> None:
        first_page = -(-self._front // PAGE) * PAGE
        magic = (
            int.from_bytes(segment[first_page : first_page + 2], "little") if first_page < self._size else 0
        )
        magic = magic or _MAGIC.get(self._major, 0)
        _LONG.pack_into(
            segment, 0, magic, _LONG_HEADER, self._timeline, start, 0, int(self._system), self._size, PAGE
        )
        page = self._front - self._front % PAGE
        if page and self._front % PAGE:
            _SHORT.pack_into(segment, page, magic, 0, self._timeline, start + page, 0)


def history(before: str, switches: list[tuple[int, int]]) -> str:
    """The history file of the timeline that the last switch leads to."""
    lines = [f"{timeline}\t{at >> 32:X}/{at & 0xFFFFFFFF:X}\tas recorded\n" for timeline, at in switches]
    return (before.rstrip("\n") + "\n" if before.strip() else "") + "".join(lines)


# --- transactions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """A transaction's end, in the order of the log: its time is taken a moment before it is written."""

    transaction: int
    at: datetime
    committed: bool


class Transactions:
    """Reads the ends of transactions out of WAL fed in pieces; takes hold at the next page after a hole."""

    def __init__(self) -> None:
        self._rest = b""  # of a page, up to its header's end
        self._position = -1  # of the first byte of the rest
        self._records = bytearray()  # without page headers, from the beginning of a record
        self._skip = 0
        self._held = False

    def feed(self, position: int, data: bytes) -> list[Ended]:
        """The ends that are whole now."""
        if position != self._position + len(self._rest):
            self._rest, self._held = b"", False
            self._position = position
        view = self._rest + data
        found: list[Ended] = []
        at = 0
        while at < len(view):
            inside = (self._position + at) % PAGE
            if inside == 0:
                header = self._enter_page(view, at)
                if header is None:
                    break
                at += header
                continue
            end = min(len(view), at + PAGE - inside)
            if self._held:
                self._take(view[at:end])
                found += self._whole()
            at = end
        self._rest = view[at:]
        self._position += at
        return found

    def _enter_page(self, view: bytes, at: int) -> int | None:
        """The length of the page header there; None where more must come first."""
        if len(view) - at < _LONG.size:
            return None
        magic, info, _, address, left = _SHORT.unpack_from(view, at)
        if magic == 0 or address != self._position + at:  # behind a switch of segments, or the end of the log
            self._held = False
            return _SHORT.size
        continued = bool(info & _CONTINUES)
        if not self._held or info & _OVERWRITTEN or continued != bool(self._records or self._skip):
            self._records.clear()
            self._held, self._skip = True, _aligned(left) if continued else 0
        return _LONG.size if info & _LONG_HEADER else _SHORT.size

    def _take(self, content: bytes) -> None:
        skipped = min(self._skip, len(content))
        self._skip -= skipped
        self._records += memoryview(content)[skipped:]

    def _whole(self) -> list[Ended]:
        found: list[Ended] = []
        at = 0
        while len(self._records) - at >= _RECORD_HEADER:
            length = int.from_bytes(self._records[at : at + 4], "little")
            if length < _RECORD_HEADER:  # zeros: nothing more in this segment
                self._held = False
                self._records.clear()
                return found
            if len(self._records) - at < _aligned(length):
                break
            if self._records[at + 17] == _TRANSACTIONS and (
                ended := _ended(bytes(self._records[at : at + length]))
            ):
                found.append(ended)
            at += _aligned(length)
        del self._records[:at]
        return found


def _aligned(length: int) -> int:
    return (length + 7) & ~7


def _ended(record: bytes) -> Ended | None:
    """What a transaction record says; None where it ends none."""
    _, transaction, _, info, _ = _RECORD.unpack_from(record)
    kind = info & 0x70
    if kind not in (*_COMMITS, *_ABORTS):
        return None
    at = _RECORD_HEADER
    while at < len(record):
        mark = record[at]
        if mark == _ORIGIN:
            at += 3
        elif mark == _TOP_LEVEL:
            at += 5
        elif mark in (_SHORT_DATA, _LONG_DATA):
            at += 2 if mark == _SHORT_DATA else 5
            if len(record) < at + 8:
                return None
            (microseconds,) = struct.unpack_from("<q", record, at)
            return Ended(transaction, _EPOCH + timedelta(microseconds=microseconds), kind in _COMMITS)
        else:
            return None
    return None
