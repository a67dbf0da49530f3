"""Check a Redis dump (RDB) as it passes, and count what it holds. Pure: bytes in, a summary out.

The format: `REDIS` and four digits of version, or `VALKEY` and three; opcodes and values; the opcode 0xFF; and
from version 5 on a CRC64 (Jones' polynomial) of all that stands before it, little-endian; all zeros where the
server computes none (`rdbchecksum no`). Before the keys of each database stand their number and how many of
them expire (RESIZEDB): exact, because the dump is made by a forked process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TypeAlias

from backupd.errors import CaptureFailed

MAGICS = (b"REDIS", b"VALKEY")
_EOF = 0xFF
_FOOTER = 8
_DEFECT = "back up again; if it stays, look at the server's log, its disk and the link to it"

COUNT_AT_MOST = 1_000_000
"""Keys that are stepped over to find the next database: about four seconds of work."""


@dataclass(frozen=True, slots=True)
class Database:
    """One numbered database at the instant of the dump."""

    keys: int
    expiring: int
    """Those of them with a time to live: they may be gone after a restore."""


@dataclass(slots=True)
class RdbSummary:
    """What a dump says of itself."""

    version: int = 0
    size: int = 0
    checksum: bool = True
    """False where the server wrote none."""
    aux: dict[str, str] = field(default_factory=dict)
    databases: dict[int, Database] = field(default_factory=dict)
    functions: int = 0
    modules: set[str] = field(default_factory=set)
    """Types of values that modules wrote, as far as the keys were counted."""
    complete: bool = False
    """Every database was counted."""

    @property
    def created(self) -> datetime | None:
        """When the dump was begun: the server's clock, whole seconds, rounded down."""
        seconds = self.aux.get("ctime", "")
        return datetime.fromtimestamp(int(seconds), UTC) if seconds.isdigit() else None

    @property
    def valkey(self) -> bool:
        """Of Valkey 9 or newer, which went its own way with types from then on."""
        return self.version >= 80

    @property
    def empty(self) -> bool:
        """It holds neither keys nor functions."""
        return self.complete and not self.functions and not any(d.keys for d in self.databases.values())


@cache
def _crc64() -> Callable[[bytes | memoryview, int], int]:
    import crcmod  # 400 MB/s in C; loaded only where a dump is read

    made: Callable[[bytes | memoryview, int], int] = crcmod.mkCrcFun(
        0x1AD93D23594C935A9, initCrc=0, rev=True, xorOut=0
    )
    return made


def crc64(data: bytes | memoryview, value: int = 0) -> int:
    """CRC-64/Jones as Redis computes it; `crc64(b"123456789")` is 0xE9C6D914C4B8D9CA."""
    return _crc64()(data, value)


def is_dump(head: bytes) -> bool:
    """What begins so is an RDB, or wants to be one."""
    return head.startswith(MAGICS)


class RdbCheck:
    """Feed it a dump in pieces of any size; `finish` raises CaptureFailed where the dump is not whole."""

    def __init__(self, *, count: bool = True, expected: Iterable[int] = ()) -> None:
        """`expected` databases are looked for however many keys stand before them; others only as long as
        COUNT_AT_MOST keys allow. Without `count`, only what stands before the first key is read."""
        self.summary = RdbSummary()
        self._crc = 0
        self._tail = b""  # the last 9 bytes: end marker and footer, if the dump ended here
        self._counter: _Counter | None = _Counter(
            self.summary, set(expected) if count else set(), COUNT_AT_MOST if count else 0
        )

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the dump. Raises CaptureFailed where it does not begin as one."""
        if not chunk:
            return
        before = self.summary.size
        self.summary.size += len(chunk)
        if before < 9:
            self._check_head(self._tail + chunk)
        kept = self._tail[-_FOOTER:] if before else b""
        if len(chunk) >= _FOOTER:
            self._crc = crc64(memoryview(chunk)[:-_FOOTER], crc64(kept, self._crc))
        else:
            self._crc = crc64((kept + chunk)[:-_FOOTER], self._crc)
        self._tail = (self._tail + chunk[-9:])[-9:]
        if self._counter is not None and not self._counter.feed(chunk):
            self._counter = None

    def _check_head(self, head: bytes) -> None:
        magic = next((m for m in MAGICS if m.startswith(head[: len(m)])), None)
        if magic is None:
            raise CaptureFailed(f"what the server sent is no RDB: it begins with {head[:9]!r}", hint=_DEFECT)
        digits = head[len(magic) : 9]
        if len(head) >= 9:
            if not digits.isdigit():
                raise CaptureFailed(f"the RDB has no version: {head[:9]!r}", hint=_DEFECT)
            self.summary.version = int(digits)

    def finish(self) -> RdbSummary:
        """Call at the end of the dump. Raises CaptureFailed unless it ends as a whole one does."""
        summary = self.summary
        if summary.size < 10 or summary.version < 5:
            # before version 5 (Redis 2.6) nothing in the file tells a whole one from half of one
            raise CaptureFailed(f"the RDB ends after {summary.size} bytes", hint=_DEFECT)
        footer = int.from_bytes(self._tail[-_FOOTER:], "little")
        if self._tail[0] != _EOF:
            raise CaptureFailed(
                f"the RDB was cut off after {summary.size} bytes: it has no end", hint=_DEFECT
            )
        if footer == 0:
            summary.checksum = False
        elif footer != self._crc:
            raise CaptureFailed(
                f"the RDB is damaged: its checksum says {footer:016x}, its bytes say {self._crc:016x}",
                hint=_DEFECT,
            )
        return summary


def checked(
    chunks: Iterable[bytes], check: RdbCheck, done: Callable[[RdbSummary], None]
) -> Generator[bytes, None, None]:
    """Pass `chunks` on; at their end compare the checksum, then tell `done`. Raises CaptureFailed."""
    for chunk in chunks:
        check.feed(chunk)
        yield chunk
    done(check.finish())


# --- counting ------------------------------------------------------------------------------------------
#
# What follows an opcode or a value type is written as a little program of steps:
#   "len"           a length;  "str" a string;  "double" a number as text
#   "type"          a module's type;  "module" what it wrote
#   an int          that many bytes
#   a tuple         a length n, then the tuple's steps n times

Step: TypeAlias = "int | str | tuple[Step, ...]"


@dataclass(slots=True)
class _Loop:
    """Turns that are left of a tuple."""

    turns: int
    body: list[Step]


_STREAM_END: tuple[Step, ...] = ("len", "len", "len")
_STREAM_END_2: tuple[Step, ...] = (*_STREAM_END, "len", "len", "len", "len", "len")
_PENDING: tuple[Step, ...] = (24, "len")  # entry id, delivery time, delivery count


def _stream(end: tuple[Step, ...], group: tuple[Step, ...], consumer: int) -> tuple[Step, ...]:
    return (("str", "str"), *end, ("str", *group, _PENDING, ("str", consumer, (16,))))


_VALUES: dict[int, tuple[Step, ...]] = {
    0: ("str",),
    1: (("str",),),
    2: (("str",),),
    3: (("str", "double"),),
    4: (("str", "str"),),
    5: (("str", 8),),
    7: ("type", "module"),
    **dict.fromkeys((9, 10, 11, 12, 13, 16, 17, 20), ("str",)),
    14: (("str",),),
    18: (("len", "str"),),
    15: _stream(_STREAM_END, ("len", "len"), 8),
    19: _stream(_STREAM_END_2, ("len", "len", "len"), 8),
    21: _stream(_STREAM_END_2, ("len", "len", "len"), 16),
}
_VALKEY: dict[int, tuple[Step, ...]] = {22: (("str", "str", 8),)}  # a hash whose fields expire
_MODULE: dict[int, tuple[Step, ...]] = {1: ("len",), 2: ("len",), 3: (4,), 4: (8,), 5: ("str",)}
_PREFIXES: dict[int, tuple[Step, ...]] = {
    0xFD: (4,),  # expires, seconds
    0xFC: (8,),  # expires, milliseconds
    0xF9: (1,),  # how often it was used
    0xF8: ("len",),  # how long it was not
    0xF7: ("type", "module"),
    0xF4: ("len", "len", "len"),  # sizes of a cluster's slot
}
_AUX, _RESIZE, _SELECT, _FUNCTION = 0xFA, 0xFB, 0xFE, 0xF5
_SPECIAL = {0: 1, 1: 2, 2: 4}  # numbers of 8, 16, 32 bits, stored in place of a string


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _type_name(number: int) -> str:
    """Nine letters of six bits each, above ten bits of version."""
    return "".join(_LETTERS[number >> shift & 63] for shift in range(58, 9, -6))


class _Short(Exception):
    """The next chunk is needed."""


class _Unknown(Exception):
    """Counting ends here."""


class _Counter:
    """Steps over keys and values and notes the sizes of the databases. Never raises: what it does not know
    (a module's old format, a type newer than this) ends the counting, not the backup."""

    def __init__(self, summary: RdbSummary, expected: set[int], most: int) -> None:
        self._summary = summary
        self._most = most
        self._expected = expected
        self._data = b""
        self._at = 0
        self._skip = 9  # magic and version
        self._steps: list[Step | _Loop] = []  # what is still to be read, the next one last
        self._database = 0
        self._keys = 0

    def feed(self, chunk: bytes) -> bool:
        """False when there is nothing more to be learnt."""
        if self._skip >= len(chunk) and self._at == len(self._data):
            self._skip -= len(chunk)
            return True
        self._data = self._data[self._at :] + chunk if self._at < len(self._data) else chunk
        self._at = 0
        try:
            while True:
                if self._skip:
                    taken = min(self._skip, len(self._data) - self._at)
                    self._at += taken
                    self._skip -= taken
                    if self._skip:
                        return True
                mark = self._at
                if self._steps:
                    self._step(mark)
                elif not self._opcode(mark):
                    return False
        except _Short:
            return True
        except _Unknown:
            return False

    # Each of the two either takes its bytes whole, or raises _Short with `_at` where it was.

    def _step(self, mark: int) -> None:
        step = self._steps[-1]
        try:
            if isinstance(step, int):
                self._skip = step
            elif isinstance(step, _Loop):
                if step.turns:
                    step.turns -= 1
                    self._steps.extend(step.body)
                    return
            elif isinstance(step, tuple):
                self._steps[-1] = _Loop(self._length()[0], list(reversed(step)))
                return
            elif step == "str":
                self._skip = self._string()
            elif step == "len":
                self._length()
            elif step == "type":
                self._summary.modules.add(_type_name(self._length()[0]))
            elif step == "double":
                size = self._byte()
                self._skip = 0 if size >= 253 else size
            else:  # "module"
                kind, _ = self._length()
                if kind:
                    if kind not in _MODULE:
                        raise _Unknown
                    self._steps.extend(reversed(_MODULE[kind]))
                    return
        except _Short:
            self._at = mark
            raise
        self._steps.pop()

    def _opcode(self, mark: int) -> bool:
        summary = self._summary
        try:
            code = self._byte()
            value = _VALUES.get(code) or (_VALKEY.get(code) if summary.valkey else None)
            if value is not None:
                self._keys += 1
                if self._keys > self._most and self._expected <= summary.databases.keys():
                    return False
                self._steps = list(reversed(("str", *value)))
            elif code in _PREFIXES:
                self._steps = list(reversed(_PREFIXES[code]))
            elif code == _SELECT:
                self._database, _ = self._length()
            elif code == _RESIZE:
                summary.databases[self._database] = Database(self._length()[0], self._length()[0])
            elif code == _AUX:
                name = self._text()
                summary.aux[name] = self._text()
            elif code == _FUNCTION:
                self._steps = ["str"]
                summary.functions += 1
            else:
                summary.complete = code == _EOF
                return False
        except _Short:
            self._at = mark
            raise
        return True

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise _Short
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise _Short
        self._at += size
        return self._data[self._at - size : self._at]

    def _length(self) -> tuple[int, bool]:
        """A length; or, with True, the code of a number or of a compressed string."""
        first = self._byte()
        kind = first >> 6
        if kind == 0:
            return first, False
        if kind == 1:
            return (first & 0x3F) << 8 | self._byte(), False
        if kind == 3:
            return first & 0x3F, True
        return int.from_bytes(self._take(8 if first == 0x81 else 4), "big"), False

    def _string(self) -> int:
        """How many bytes the string's content takes."""
        size, special = self._length()
        if not special:
            return size
        if size in _SPECIAL:
            return _SPECIAL[size]
        if size != 3:
            raise _Unknown
        packed, _ = self._length()
        self._length()
        return packed

    def _text(self) -> str:
        """A short string, read whole."""
        size, special = self._length()
        if not special:
            return self._take(size).decode(errors="replace")
        if size not in _SPECIAL:
            raise _Unknown
        return str(int.from_bytes(self._take(_SPECIAL[size]), "little", signed=True))
