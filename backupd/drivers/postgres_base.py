"""One tar of a base backup's several: the data directory, and each tablespace below `pg_tblspc/<oid>/`. Pure.

Content passes through as it comes; only headers are looked at. Of an incremental base (PostgreSQL 17 and later) a file
comes as `INCREMENTAL.<name>`: which pages changed, then these. It is handed on as a sparse file of its own name that is
laid onto the point before; so is its backup label, without the words by which a server would refuse to start on it.
Source: `basebackup_incremental.c`, and `reconstruct.c` of pg_combinebackup.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from tarfile import PAX_FORMAT, TarInfo

from backupd.drivers._tarstream import END, entry, padding
from backupd.drivers.postgres_replication import BASE, MANIFEST
from backupd.errors import CaptureFailed
from backupd.model import Bytes

TABLESPACES = "pg_tblspc"
PAGED = ("/base/*/*", "/global/*", f"/{TABLESPACES}/**")
"""Relation files: written over in place, in pages."""
PAGE_SIZE = 8192

_BLOCK = 512
_PREFIX = slice(345, 500)
_CHECKSUM = slice(148, 156)
_INCREMENTAL = "INCREMENTAL."
_HEAD = struct.Struct("<III")  # magic, pages that follow, pages of the file that were not cut off
_MAGIC = 0xD3AE1F0D
_LABEL = "backup_label"
_REFUSED = b"INCREMENTAL FROM "


def one_tar(
    messages: Iterable[tuple[str, Bytes]], more: Mapping[str, str], *, onto: bool = False
) -> Iterator[Bytes]:
    """(part, bytes) as the server sends them, `more` files by name, and the manifest as a last file; `onto`: of an
    incremental base.

    The tar gets its end only when `messages` has ended well. Raises CaptureFailed for a tar that is cut short.
    """
    parts: dict[str, _Part] = {}
    manifest = bytearray()
    for name, data in messages:
        if name == MANIFEST:
            manifest += data
            continue
        if name not in parts:
            parts[name] = _Part("" if name == BASE else f"{TABLESPACES}/{name}", onto=onto)
        yield from parts[name].take(memoryview(data))
    for name, part in parts.items():
        part.finish(name or "the data directory")
    if BASE not in parts:
        raise CaptureFailed("the server sent no data directory")
    owner = parts[BASE].owner
    files = {name: text.encode() for name, text in more.items()} | {MANIFEST: bytes(manifest)}
    for name, content in files.items():
        if content:
            yield entry(name, size=len(content), mode=0o600, uid=owner[0], gid=owner[1])
            yield content + padding(len(content))
    yield END


class _Part:
    """One of the server's tars."""

    def __init__(self, prefix: str, *, onto: bool) -> None:
        self._prefix = prefix.encode()
        self._onto = onto
        self._special: _Changed | _Label | None = None  # what the content at hand becomes
        self._head = bytearray()
        self._left = 0  # of the content at hand, with its padding
        self._ended = False
        self.owner = (0, 0)

    def take(self, data: memoryview) -> Iterator[Bytes]:
        """What of it belongs into the one tar."""
        while data and not self._ended:
            if self._left:
                content = data[: self._left]
                self._left -= len(content)
                data = data[len(content) :]
                if self._special is None:
                    yield content
                else:
                    yield from self._special.take(content)
                    if not self._left:
                        self._special.finish()
                continue
            missing = _BLOCK - len(self._head)
            self._head += data[:missing]
            data = data[missing:]
            if len(self._head) == _BLOCK:
                yield from self._header(bytes(self._head))
                self._head.clear()

    def _header(self, block: bytes) -> Iterator[bytes]:
        if not any(block):
            self._ended = True
            return
        self.owner = (_number(block[108:116]), _number(block[116:124]))
        if block[156:157] in (b"0", b"\0"):
            size = _number(block[124:136])
            self._left = size + (-size % _BLOCK)
        block = below(block, self._prefix) if self._prefix else block
        self._special = _special(block) if self._onto else None
        if self._special is None:
            yield block
        elif not self._left:
            self._special.finish()

    def finish(self, name: str) -> None:
        if self._left or self._head:
            raise CaptureFailed(f"the base backup of {name} is cut short", hint="run the backup again")


# --- of an incremental base --------------------------------------------------------------------------------


def _special(header: bytes) -> _Changed | _Label | None:
    info = TarInfo.frombuf(header, "utf-8", "surrogateescape")
    folder, _, name = info.name.rpartition("/")
    if info.isfile() and name.startswith(_INCREMENTAL):
        info.name = f"{folder}/{name.removeprefix(_INCREMENTAL)}"
        return _Changed(info)
    return _Label(info) if info.name == _LABEL and info.size else None


class _Changed:
    """`INCREMENTAL.<name>` on its way into a sparse file."""

    def __init__(self, info: TarInfo) -> None:
        self._info = info
        self._sent = info.size
        self._head = bytearray()
        self._left = -1  # bytes of pages; unknown before the head is whole

    def take(self, content: Bytes) -> Iterator[Bytes]:
        if self._left < 0:
            self._head += content
            if len(self._head) < (size := self._head_size()):
                return
            content = memoryview(bytes(self._head))[size:]
            count, kept = self._counts()
            numbers = struct.unpack_from(f"<{count}I", self._head, _HEAD.size)
            self._left = count * PAGE_SIZE
            if size + self._left != self._sent:
                raise self._wrong()
            yield self._header(numbers, kept)
        yield content[: self._left]  # behind it the tar's padding
        self._left -= min(self._left, len(content))

    def finish(self) -> None:
        """Its content has ended. Raises CaptureFailed where that was too early."""
        if self._left:
            raise self._wrong()

    def _counts(self) -> tuple[int, int]:
        magic, count, kept = _HEAD.unpack_from(self._head)
        if magic != _MAGIC:
            raise self._wrong()
        return count, kept

    def _head_size(self) -> int:
        """With pages behind it, it is filled up to a page."""
        if len(self._head) < _HEAD.size:
            return _HEAD.size
        size = _HEAD.size + 4 * (count := self._counts()[0])
        return size + (-size % PAGE_SIZE if count else 0)

    def _header(self, numbers: Sequence[int], kept: int) -> bytes:
        if any(before >= after for before, after in pairwise(numbers)):
            raise self._wrong()
        size = max(kept, numbers[-1] + 1 if numbers else 0) * PAGE_SIZE
        where = ",".join(f"{number * PAGE_SIZE},{PAGE_SIZE}" for number in numbers)
        self._info.size = len(numbers) * PAGE_SIZE
        self._info.pax_headers = {
            "BACKUPD.onto": "1",
            "GNU.sparse.size": str(size),
            "GNU.sparse.map": f"{where},{size},0".removeprefix(","),
        }
        return self._info.tobuf(PAX_FORMAT, errors="surrogateescape")

    def _wrong(self) -> CaptureFailed:
        return CaptureFailed(
            f"the server sent {self._info.name} in a form that is not known", hint="please report it"
        )


class _Label:
    """The backup label, as of a full base."""

    def __init__(self, info: TarInfo) -> None:
        self._info = info
        self._left = info.size
        self._text = bytearray()

    def take(self, content: Bytes) -> Iterator[Bytes]:
        if not self._left:
            return  # the tar's padding
        self._text += content[: self._left]
        self._left -= min(self._left, len(content))
        if not self._left:
            lines = bytes(self._text).splitlines(keepends=True)
            text = b"".join(line for line in lines if not line.startswith(_REFUSED))
            self._info.size = len(text)
            yield self._info.tobuf(PAX_FORMAT) + text + padding(len(text))

    def finish(self) -> None:
        """It is whole: the tar says how long it is."""


def below(block: bytes, prefix: bytes) -> bytes:
    """A ustar header whose name is `prefix/` and what it was. Raises CaptureFailed where that has no room."""
    before = block[_PREFIX].rstrip(b"\0")
    whole = prefix + b"/" + before if before else prefix
    if len(whole) > 155:
        raise CaptureFailed("the server sent a name that is too long for a tar")
    changed = bytearray(block)
    changed[_PREFIX] = whole.ljust(155, b"\0")
    changed[_CHECKSUM] = b" " * 8
    changed[_CHECKSUM] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def _number(field: bytes) -> int:
    """Octal digits; the server writes what is too large for them in base 256."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0
