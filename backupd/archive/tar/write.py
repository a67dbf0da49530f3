"""Tar headers, one at a time.

`tarfile` costs 30 to 37 us a header: two seconds for a tree of 60,000 files. A plain file takes `file_header`
(1.5 us); what a ustar header cannot say goes into a pax extended header in front of it (`header`).

Source: POSIX.1-2017, pax Interchange Format; the manual of GNU tar, "Storing Sparse Files".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from zlib import adler32

from backupd.archive.tar.acl import TEXT_KEYS, acl_to_text

BLOCK = 512
END = bytes(1024)
"""Two blocks of zeros close an archive."""

FILE = b"0"
HARDLINK = b"1"
SYMLINK = b"2"
CHARACTER_DEVICE = b"3"
BLOCK_DEVICE = b"4"
DIRECTORY = b"5"
FIFO = b"6"

_ID_MAX = 0o7777777  # seven octal digits
_SIZE_MAX = 0o77777777777  # eleven octal digits: 8 GiB - 1, and the year 2242
_NOBODY = 65534
"""In the ustar field where the true id needs a pax header: a reader blind to pax must not give it to root."""

_NAMED = (b"path", b"linkpath", b"GNU.sparse.name")
_XATTR = b"SCHILY.xattr."
_DEVICE_ZERO = b"0000000\x000000000\0"
# All that stands behind the checksum of a plain file, and what it and eight blanks add to the checksum.
_FILE_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + _DEVICE_ZERO + bytes(167)
_FILE_TAIL_SUM = sum(_FILE_TAIL) + 8 * 32


def padding(size: int) -> bytes:
    """Zeros that fill `size` bytes up to a whole number of blocks."""
    return bytes(-size & 511)


def file_header(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int) -> bytes:
    """The header of a regular file; `mtime` in whole seconds. One per file of a tree: keep it short.

    512 bytes unless something does not fit; then what `header` gives.
    """
    if (
        len(name) <= 100
        and (mode | uid | gid) <= _ID_MAX
        and 0 <= size <= _SIZE_MAX
        and 0 <= mtime <= _SIZE_MAX
    ):
        head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, uid, gid, size, mtime)
        # The low half of adler32 is 1 + the sum of the bytes modulo 65521; 148 bytes cannot reach that.
        return b"%s%06o\0 %s" % (head, (adler32(head) & 65535) - 1 + _FILE_TAIL_SUM, _FILE_TAIL)
    return header(name, FILE, mode, uid, gid, size, mtime * 1_000_000_000)


def header(
    name: bytes,
    typeflag: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime_ns: int,
    *,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[bytes, bytes] | None = None,
    sparse: Sequence[tuple[int, int]] | None = None,
    exact_time: bool = False,
) -> bytes:
    """All that stands before an entry's data: a pax header where needed, the ustar header, the sparse map.

    `size` is the file's real size; other types have none. `sparse` lists (offset, length) of the pieces that
    hold data; then the data is these pieces, one after another (`sparse_size` bytes), and padding to a block.
    `exact_time` keeps nanoseconds. A directory's name gets its closing slash here.
    Raises ValueError where no header can say it (a device number over 2097151).
    """
    if typeflag == DIRECTORY and not name.endswith(b"/"):
        name += b"/"
    if typeflag != FILE:
        size = 0
    records: list[tuple[bytes, bytes]] = []
    blocks = b""
    stored = size
    if sparse is not None and typeflag == FILE:
        blocks = _sparse_map(sparse, size)
        stored = len(blocks) + sparse_size(sparse)
        records += [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", name),
            (b"GNU.sparse.realsize", b"%d" % size),
        ]
        parent, slash, last = name.rpartition(b"/")
        name = parent + slash + b"GNUSparseFile.0/" + last
    seconds, fraction = divmod(mtime_ns, 1_000_000_000)
    if not 0 <= seconds <= _SIZE_MAX or (exact_time and fraction):
        records.append((b"mtime", _pax_time(mtime_ns if exact_time else seconds * 1_000_000_000)))
        seconds = min(max(seconds, 0), _SIZE_MAX)
    prefix, short = _split(name)
    if short is None:
        records.append((b"path", name))
        short = name[:100]
    if len(link) > 100:
        records.append((b"linkpath", link))
    if uid > _ID_MAX:
        records.append((b"uid", b"%d" % uid))
        uid = _NOBODY
    if gid > _ID_MAX:
        records.append((b"gid", b"%d" % gid))
        gid = _NOBODY
    if stored > _SIZE_MAX:
        records.append((b"size", b"%d" % stored))
        stored = 0
    if xattrs:
        records += [(_XATTR + _quote(key), value) for key, value in sorted(xattrs.items())]
        records += _acl_records(xattrs)
    ustar = _ustar(short, mode, uid, gid, stored, seconds, typeflag, link[:100], device, prefix)
    return _pax(records) + ustar + blocks if records else ustar


def sparse_size(sparse: Sequence[tuple[int, int]]) -> int:
    """Bytes of data behind a sparse file's map."""
    return sum(length for _, length in sparse)


def _split(name: bytes) -> tuple[bytes, bytes | None]:
    """A name as ustar's prefix and name; (b"", None) when it does not fit. The prefix is cut at a slash."""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101, len(name) - 1)
    if 0 < cut <= 155:
        return name[:cut], name[cut + 1 :]
    return b"", None


def _ustar(
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    typeflag: bytes,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
    prefix: bytes = b"",
) -> bytes:
    numbers = _DEVICE_ZERO if device == (0, 0) else b"%07o\0%07o\0" % device
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        name.ljust(100, b"\0"),
        mode & 0o7777,
        uid,
        gid,
        size,
        mtime,
    )
    tail = b"%s%sustar\x0000%s" % (typeflag, link.ljust(100, b"\0"), bytes(64))
    rest = b"%s%s" % (numbers, prefix.ljust(167, b"\0"))
    sums = (adler32(head) & 65535) + (adler32(tail) & 65535) + (adler32(rest) & 65535) - 3
    block = b"%s%06o\0 %s%s" % (head, sums + 8 * 32, tail, rest)
    if len(block) != BLOCK:
        raise ValueError(
            f"a tar header cannot say this of {name!r}: {uid=} {gid=} {size=} {mtime=} {device=}"
        )
    return block


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    """A pax extended header. It declares BINARY when a name is no UTF-8: bsdtar would guess otherwise."""
    if any(key in _NAMED and not _is_utf8(value) for key, value in records):
        records = [(b"hdrcharset", b"BINARY"), *records]
    body = b"".join(_record(key, value) for key, value in records)
    return _ustar(b"././@PaxHeader", 0o644, 0, 0, len(body), 0, b"x") + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """`<length> <key>=<value>\\n`, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _pax_time(nanoseconds: int) -> bytes:
    """Sign and decimal, as GNU tar writes times before 1970: -1.5 is a second and a half before."""
    whole, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    text = b"%s%d" % (b"-" if nanoseconds < 0 else b"", whole)
    return text + (b".%09d" % fraction).rstrip(b"0") if fraction else text


def _acl_records(xattrs: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """ACLs once more as text, for `tar --acls`."""
    records: list[tuple[bytes, bytes]] = []
    for key, attribute in TEXT_KEYS.items():
        if attribute in xattrs:
            with suppress(ValueError):  # an ACL of an unknown kind stays an attribute
                records.append((key, acl_to_text(xattrs[attribute])))
    return records


def _quote(key: bytes) -> bytes:
    """An attribute's name may hold `=`, which ends a pax key. GNU tar writes %3D, and %25 for %."""
    return key.replace(b"%", b"%25").replace(b"=", b"%3D")


def _sparse_map(sparse: Sequence[tuple[int, int]], size: int) -> bytes:
    """GNU sparse 1.0: a count, then offset and length of each piece, one decimal a line, in whole blocks.

    A file that ends in a hole gets a last piece of length 0 at its end, as GNU tar writes it.
    """
    pieces = list(sparse)
    if not pieces or pieces[-1][0] + pieces[-1][1] < size:
        pieces.append((size, 0))
    text = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % piece for piece in pieces)
    return text + padding(len(text))
