"""What can be counted of a tree, from whichever side it is seen: equal before and after a restore.

Entries, directories, bytes (a file with several names once), and a digest over all names. The digest is a sum of
the names' own digests: no order is needed, and no list is held.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from backupd.drivers._tarstream import open_tar
from backupd.errors import CommandFailed
from backupd.model import Archive, Json, MemberType

LISTING = ("-mindepth", "1", "-printf", r"%y %s %n %D:%i %P\0")
"""For GNU find: what `found_in_listing` reads."""


class Found(NamedTuple):
    """One entry; `size` is 0 for all but the first name of a regular file."""

    name: bytes
    directory: bool
    size: int


def facts_of(found: Iterable[Found]) -> dict[str, Json]:
    """The facts of a tree; the root itself does not count."""
    from hashlib import blake2b  # with OpenSSL, which a capture does not need

    entries = directories = size = names = 0
    for entry in found:
        entries += 1
        directories += entry.directory
        size += entry.size
        digest = blake2b(entry.name + b"/" * entry.directory, digest_size=16).digest()
        names = (names + int.from_bytes(digest, "big")) & ((1 << 128) - 1)
    return {"entries": entries, "directories": directories, "bytes": size, "names": f"{names:032x}"}


def found_in_archive(archive: Archive) -> Iterator[Found]:
    """What the recovery point holds."""
    for member in archive.members():
        if member.name not in ("", "."):
            size = member.size if member.type is MemberType.FILE else 0
            yield Found(os.fsencode(member.name), member.type is MemberType.DIRECTORY, size)


def found_below(root: Path) -> Iterator[Found]:
    """What lies on this machine. Sockets do not count: no recovery point holds them."""
    seen: set[tuple[int, int]] = set()
    base = os.fsencode(root)
    # fwalk goes by directory handles: paths may be longer than the kernel takes
    for at, directories, others, handle in os.fwalk(base, onerror=_raise):
        prefix = at[len(base) :].lstrip(b"/")
        prefix += b"/" if prefix else b""
        for name in directories + others:
            status = os.stat(name, dir_fd=handle, follow_symlinks=False)
            if stat.S_ISSOCK(status.st_mode):
                continue
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            if status.st_nlink > 1 and size:
                size = 0 if (status.st_dev, status.st_ino) in seen else size
                seen.add((status.st_dev, status.st_ino))
            yield Found(prefix + name, stat.S_ISDIR(status.st_mode), size)


def _raise(error: OSError) -> None:
    """What cannot be listed must not count as nothing."""
    raise error


def found_in_listing(chunks: Iterable[bytes]) -> Iterator[Found]:
    """What GNU find tells with LISTING. Raises CommandFailed for anything else."""
    seen: set[bytes] = set()
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\0")
        for line in lines:
            try:
                kind, size, links, inode, name = line.split(b" ", 4)
                length = int(size) if kind == b"f" and inode not in seen else 0
            except ValueError:
                raise CommandFailed(f"find told something unknown: {line[:60]!r}") from None
            if kind == b"s":
                continue
            if links != b"1":
                seen.add(inode)
            yield Found(name, kind == b"d", length)


def found_in_tar(chunks: Iterable[bytes]) -> Iterator[Found]:
    """What the container engine's tar of a directory holds; its first entry is the directory itself."""
    with open_tar(chunks) as tar:
        root: str | None = None
        for entry in tar:
            if root is None:
                root = entry.name.rstrip("/") + "/"
                continue
            name = os.fsencode(entry.name.removeprefix(root).rstrip("/"))
            yield Found(name, entry.isdir(), entry.size if entry.isreg() else 0)
