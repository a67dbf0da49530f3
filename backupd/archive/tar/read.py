"""Read a tar, from any tool, in one pass over a stream that cannot seek.

Sources: POSIX.1-2017, pax Interchange Format; the manual of GNU tar, chapter "Tar Internals".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import BinaryIO
from zlib import adler32

from backupd.archive.tar.acl import TEXT_KEYS, acl_from_text
from backupd.archive.tar.write import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    sparse_size,
)
from backupd.errors import Damaged


@dataclass(slots=True)
class TarEntry:
    """One entry. `name` has neither a leading `./` nor a closing slash; the root itself is `.`."""

    name: bytes
    typeflag: bytes
    """One of FILE ... FIFO: variants of a regular file are FILE."""
    mode: int
    uid: int
    gid: int
    size: int
    """The file's real size."""
    mtime_ns: int
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: list[tuple[int, int]] | None = None
    """(offset, length) of the pieces that hold data; the data read is these, one after another."""
    onto: bool = False
    """Between these pieces the file is as it was before."""
    stored: int = 0
    """Bytes of data that `readinto` gives; `size` unless sparse."""


_FIELDS = Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_ENTRY_TYPES = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,  # "contiguous"
    b"S": FILE,  # old GNU sparse
    b"1": HARDLINK,
    b"2": SYMLINK,
    b"3": CHARACTER_DEVICE,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"D": DIRECTORY,  # GNU, incremental: its data is a list of names
    b"6": FIFO,
}
ONTO = b"BACKUPD.onto"
"""A pax record of ours, beside those of a sparse file."""
_XATTR = b"SCHILY.xattr."
_NEVER = 1 << 67
"""Nanoseconds: some thousand years away. 64 bits of them end in 2262, file systems go to 2446."""
_META_MAX = 64 << 20
"""No pax header, long name or sparse map is larger; a damaged size must not eat the memory."""


class TarReader:
    """Read a tar from a file that cannot seek: a pipe, a socket, an iterator's bytes.

    Knows ustar, pax (x and g), GNU long names and links, GNU sparse files in all four forms, base-256
    numbers, xattrs and ACLs. Iterate it; between two steps `readinto` gives the entry's data; what is left
    unread is skipped. The stream is read to its very end: what makes it may raise there. `notes` tells what
    could not be kept.

    Raises Damaged with the offset: cut short, wrong checksum, no closing blocks, names outside the tree.
    """

    def __init__(self, file: BinaryIO, *, buffer: int = 1 << 20) -> None:
        self.notes: list[str] = []
        self._file = file
        self._into = getattr(file, "readinto", None)
        self._buffer = b""
        self._at = 0  # in the buffer
        self._base = 0  # offset of the buffer in the stream
        self._step = buffer
        self._left = 0  # of the entry's data
        self._pad = 0  # behind it
        self._globals: dict[bytes, bytes] = {}

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed."""
        return self._base + self._at

    def __iter__(self) -> Iterator[TarEntry]:
        while (entry := self._next()) is not None:
            yield entry
        self._drain()

    def readinto(self, view: memoryview | bytearray) -> int:
        """Fill `view` from the entry's data; the number of bytes put in, 0 at the end of the data."""
        want = min(len(view), self._left)
        if not want:
            return 0
        have = len(self._buffer) - self._at
        if have:
            got = min(have, want)
            view[:got] = self._buffer[self._at : self._at + got]
            self._at += got
        elif self._into is not None and want >= 65536:
            # Large data goes from the pipe into the caller's memory; the one copy less is worth a third.
            got = self._into(memoryview(view)[:want])
            if not got:
                raise self._damaged("it ends inside the data of an entry")
            self._base += got
        else:
            self._fill()
            return self.readinto(view)
        self._left -= got
        return got

    # -- the stream

    def _damaged(self, what: str) -> Damaged:
        return Damaged(
            f"the tar stream is damaged at byte {self.offset}: {what}",
            hint="what produced it was interrupted, or altered the bytes; look at its own messages",
        )

    def _fill(self) -> None:
        """Another buffer; only when this one is used up. Raises Damaged at the end of the stream."""
        self._base += len(self._buffer)
        self._at = 0
        self._buffer = self._file.read(self._step)
        if not self._buffer:
            raise self._damaged("it ends too early")

    def _take(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        start = self._at
        end = start + size
        if end <= len(self._buffer):
            self._at = end
            return self._buffer[start:end]
        parts = [self._buffer[start:]]
        size -= len(parts[0])
        while size:
            self._at = len(self._buffer)
            self._fill()
            parts.append(self._buffer[:size])
            self._at = len(parts[-1])
            size -= self._at
        return b"".join(parts)

    def _skip(self, size: int) -> None:
        while size > (have := len(self._buffer) - self._at):
            size -= have
            self._at = len(self._buffer)
            self._fill()
        self._at += size

    def _drain(self) -> None:
        """To the end of the stream: tar fills its last record, and a producer's failure shows only there."""
        self._at = len(self._buffer)
        while more := self._file.read(self._step):
            self._base += len(more)

    # -- entries

    def _next(self) -> TarEntry | None:
        if self._left or self._pad:
            self._skip(self._left + self._pad)
            self._left = self._pad = 0
        local: dict[bytes, bytes] = {}
        order: list[tuple[int, int]] = []  # GNU sparse 0.0 repeats its keys
        while True:
            block = self._take(BLOCK)
            if not block[0] and not any(block):
                self._end(local)
                return None
            fields = _FIELDS.unpack(block)
            self._check_sum(block, fields[6])
            kind = fields[7]
            if kind in b"xgXLKVNM":
                self._meta(kind, fields, local, order)
            else:
                return self._entry(block, fields, local, order)

    def _end(self, local: dict[bytes, bytes]) -> None:
        if local:
            raise self._damaged("an extended header that nothing follows")
        if any(self._take(BLOCK)):
            raise self._damaged("a single block of zeros between entries")

    def _check_sum(self, block: bytes, stated: bytes) -> None:
        """The sum with the field itself as blanks. Half a header cannot reach adler32's modulus."""
        total = (adler32(block[:256]) & 65535) + (adler32(block[256:]) & 65535) - 2 - sum(stated) + 8 * 32
        if total != self._number(stated):
            raise self._damaged("a header with a wrong checksum; this is no tar, or not any more")

    def _number(self, text: bytes) -> int:
        """Octal digits, or GNU's base 256 where the first bit is set (two's complement for negative ones)."""
        if text[0] & 0x80:
            value = int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
            return value - (1 << (8 * len(text) - 1)) if text[0] & 0x40 else value
        digits = text.split(b"\0", 1)[0].strip()
        try:
            return int(digits, 8) if digits else 0
        except ValueError:
            raise self._damaged(f"a header with the number {digits!r}") from None

    def _meta(
        self, kind: bytes, fields: tuple[bytes, ...], local: dict[bytes, bytes], order: list[tuple[int, int]]
    ) -> None:
        """A header that tells of the entry behind it."""
        if kind == b"M":
            raise self._damaged("the continuation of another volume's file")
        size = self._number(fields[4])
        if not 0 <= size <= _META_MAX:
            raise self._damaged(f"an extended header of {size} bytes")
        data = self._take(size)
        self._skip(-size & 511)
        if kind in b"xX":
            self._records(data, local, order)
        elif kind == b"g":
            self._records(data, self._globals, [])
        elif kind == b"L":
            local[b"path"] = data.split(b"\0", 1)[0]
        elif kind == b"K":
            local[b"linkpath"] = data.split(b"\0", 1)[0]

    def _records(self, data: bytes, into: dict[bytes, bytes], order: list[tuple[int, int]]) -> None:
        at = 0
        offset = b""
        while at < len(data):
            space = data.find(b" ", at, at + 20)
            digits = data[at:space]
            if space < 0 or not digits.isdigit():
                raise self._damaged("an extended header that is none")
            end = at + int(digits)
            equals = data.find(b"=", space + 1, end)
            if end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
                raise self._damaged("an extended header whose lengths are wrong")
            key = data[space + 1 : equals]
            value = data[equals + 1 : end - 1]
            if key == b"GNU.sparse.offset":
                offset = value
            elif key == b"GNU.sparse.numbytes":
                order.append((self._decimal(offset), self._decimal(value)))
            into[key] = value
            at = end

    def _decimal(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            raise self._damaged(f"an extended header with the number {text[:40]!r}") from None

    def _time(self, text: bytes) -> int:
        """Seconds as a decimal, exactly; Python's tarfile also writes `1e-09`."""
        from decimal import Decimal  # 2 ms, and only where times have fractions

        try:
            value = int(Decimal(text.decode("ascii")).scaleb(9))
        except (ArithmeticError, ValueError):
            value = _NEVER
        if abs(value) >= _NEVER:
            raise self._damaged(f"an extended header with the time {text[:40]!r}")
        return value

    def _entry(
        self,
        block: bytes,
        fields: tuple[bytes, ...],
        local: dict[bytes, bytes],
        order: list[tuple[int, int]],
    ) -> TarEntry:
        name, mode, uid, gid, size, mtime, _, flag, link, magic, _, _, major, minor, prefix = fields
        number = self._number
        name = name.split(b"\0", 1)[0]
        if prefix[0] and magic[:6] == b"ustar\0":
            name = prefix.split(b"\0", 1)[0] + b"/" + name
        kind = _ENTRY_TYPES.get(flag, FILE)  # POSIX: an unknown type is read as a regular file
        if flag == b"\0" and name.endswith(b"/"):
            kind = DIRECTORY
        entry = TarEntry(name, kind, number(mode) & 0o7777, number(uid), number(gid), number(size), 0)
        entry.mtime_ns = number(mtime) * 1_000_000_000
        if kind != FILE:
            entry.link = link.split(b"\0", 1)[0]
            if kind in b"34":
                entry.device = (number(major), number(minor))
        if local or self._globals:
            self._apply(entry, {**self._globals, **local})
        entry.stored = entry.size
        if kind == DIRECTORY and flag == b"D":
            entry.size = 0
        elif kind != FILE:
            entry.size = entry.stored = 0  # a directory may state a size, but no data follows
        if entry.size < 0:
            raise self._damaged(f"an entry of {entry.size} bytes")
        self._left = entry.stored
        self._pad = -entry.stored & 511
        if flag == b"S":
            self._old_sparse(entry, block)
        elif kind == FILE and any(key.startswith(b"GNU.sparse.") for key in local):
            self._pax_sparse(entry, local, order)
        entry.name = self._clean(entry.name)
        if kind == HARDLINK:
            entry.link = self._clean(entry.link)
        return entry

    def _clean(self, name: bytes) -> bytes:
        """Without a leading `./` and a closing slash. A name that leads out of the tree is refused."""
        if name.startswith(b"./") or name.endswith(b"/") or b"//" in name or b"/./" in name:
            name = b"/" * name.startswith(b"/") + b"/".join(
                part for part in name.split(b"/") if part not in (b"", b".")
            )
        if name.startswith(b"/") or (b".." in name and b".." in name.split(b"/")):
            raise self._damaged(f"the name {name[:200]!r} leads out of the tree")
        return name or b"."

    def _apply(self, entry: TarEntry, records: dict[bytes, bytes]) -> None:
        acls: list[tuple[bytes, bytes]] = []
        for key, value in records.items():
            if key.startswith(_XATTR):
                entry.xattrs[_unquote(key[len(_XATTR) :])] = value
            elif not value:
                continue  # POSIX: an empty value takes back what a global header said
            elif key == b"path":
                entry.name = value
            elif key == b"linkpath":
                entry.link = value
            elif key == b"mtime":
                entry.mtime_ns = self._time(value)
            elif key in (b"size", b"uid", b"gid"):
                setattr(entry, key.decode(), self._decimal(value))
            elif key in TEXT_KEYS:
                acls.append((TEXT_KEYS[key], value))
            elif key == b"RHT.security.selinux":
                entry.xattrs.setdefault(b"security.selinux", value + b"\0")
        for attribute, text in acls:
            if attribute not in entry.xattrs:
                try:
                    entry.xattrs[attribute] = acl_from_text(text)
                except ValueError as error:
                    self.notes.append(
                        f"{entry.name.decode(errors='backslashreplace')}: ACL not kept: {error}"
                    )

    # -- sparse files

    def _old_sparse(self, entry: TarEntry, block: bytes) -> None:
        """GNU type S: four pieces in the header at 386, the rest in blocks of 21 behind it."""
        pieces = self._old_pieces(block, 386, 4)
        more = block[482]
        entry.size = self._number(block[483:495])
        while more:
            block = self._take(BLOCK)
            pieces += self._old_pieces(block, 0, 21)
            more = block[504]
        self._set_sparse(entry, pieces)

    def _old_pieces(self, block: bytes, start: int, count: int) -> list[tuple[int, int]]:
        numbers = [block[at : at + 12] for at in range(start, start + 24 * count, 12)]
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [(self._number(a), self._number(b)) for a, b in pairs if a[0]]

    def _pax_sparse(self, entry: TarEntry, local: dict[bytes, bytes], order: list[tuple[int, int]]) -> None:
        entry.name = local.get(b"GNU.sparse.name") or entry.name
        real = local.get(b"GNU.sparse.realsize") or local.get(b"GNU.sparse.size")
        if real is None:
            raise self._damaged("a sparse file without its size")
        entry.size = self._decimal(real)
        if local.get(b"GNU.sparse.major") == b"1":
            order = self._new_map()
            entry.stored = self._left
        elif b"GNU.sparse.map" in local:
            numbers = [self._decimal(part) for part in local[b"GNU.sparse.map"].split(b",")]
            if len(numbers) % 2:
                raise self._damaged("a sparse file whose map is cut")
            order = list(zip(numbers[::2], numbers[1::2], strict=True))
        entry.onto = ONTO in local
        self._set_sparse(entry, order)

    def _new_map(self) -> list[tuple[int, int]]:
        """The map of GNU sparse 1.0 stands before the data and is counted with it."""
        text = b""
        numbers: list[int] = []
        want = 1
        while len(numbers) < want:
            line, newline, rest = text.partition(b"\n")
            if newline:
                numbers.append(self._decimal(line))
                if len(numbers) == 1:
                    want = 1 + 2 * numbers[0]
                text = rest
            elif len(line) > 2 * BLOCK or self._left < BLOCK:
                raise self._damaged("a sparse file whose map is cut")
            else:
                text += self._take(BLOCK)
                self._left -= BLOCK
        return list(zip(numbers[1::2], numbers[2::2], strict=True))

    def _set_sparse(self, entry: TarEntry, pieces: list[tuple[int, int]]) -> None:
        """Without the empty piece that marks a hole at the end; in order, inside the file, and all there."""
        at = 0
        for offset, length in pieces:
            if length < 0 or offset < at:
                raise self._damaged("a sparse file whose map is out of order")
            at = offset + length
        kept = [piece for piece in pieces if piece[1]]
        if at > entry.size or sparse_size(kept) != entry.stored:
            raise self._damaged("a sparse file whose map does not agree with its size")
        entry.sparse = kept


def _unquote(key: bytes) -> bytes:
    return key.replace(b"%3D", b"=").replace(b"%25", b"%")
