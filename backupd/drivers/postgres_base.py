"""One tar of a base backup's several: the data directory, and each tablespace below `pg_tblspc/<oid>/`. Pure.

Content passes through as it comes; only headers are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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


def one_tar(messages: Iterable[tuple[str, Bytes]], more: Mapping[str, str]) -> Iterator[Bytes]:
    """(part, bytes) as the server sends them, `more` files by name, and the manifest as a last file.

    The tar gets its end only when `messages` has ended well. Raises CaptureFailed for a tar that is cut short.
    """
    parts: dict[str, _Part] = {}
    manifest = bytearray()
    for name, data in messages:
        if name == MANIFEST:
            manifest += data
            continue
        if name not in parts:
            parts[name] = _Part("" if name == BASE else f"{TABLESPACES}/{name}")
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

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
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
                yield content
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
        yield below(block, self._prefix) if self._prefix else block

    def finish(self, name: str) -> None:
        if self._left or self._head:
            raise CaptureFailed(f"the base backup of {name} is cut short", hint="run the backup again")


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
