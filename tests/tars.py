"""Tars of whole trees, made with our headers, and any tar told in the words of `trees.describe`."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from trees import Entry

from backupd.archive.tar import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    END,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    header,
    padding,
)
from backupd.archive.tar.read import TarEntry, TarReader


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time and cannot seek, as pipes do."""

    def __init__(self, data: bytes, step: int) -> None:
        self._inner = io.BytesIO(data)
        self._step = step

    def readable(self) -> bool:
        return True

    def readinto(self, view: bytearray) -> int:  # type: ignore[override]
        data = self._inner.read(min(self._step, len(view)))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(self._step if size < 0 else min(self._step, size))


def read_all(reader: TarReader, *, step: int = 1000) -> Iterator[tuple[TarEntry, bytes]]:
    for entry in reader:
        data = bytearray()
        view = bytearray(step)
        while got := reader.readinto(view):
            data += view[:got]
        yield entry, bytes(data)


def run(*argv: str | Path, stdin: bytes = b"", locale: str = "C.UTF-8") -> bytes:
    done = subprocess.run(
        argv, input=stdin, capture_output=True, check=False, env={**os.environ, "LC_ALL": locale}
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout


def tar_of(root: Path) -> bytes:
    """The tree as our headers say it: what the engine does, in its plainest form."""
    parts: list[bytes] = []
    seen: dict[tuple[int, int], bytes] = {}
    kinds = {
        stat.S_IFREG: FILE,
        stat.S_IFDIR: DIRECTORY,
        stat.S_IFLNK: SYMLINK,
        stat.S_IFIFO: FIFO,
        stat.S_IFCHR: CHARACTER_DEVICE,
        stat.S_IFBLK: BLOCK_DEVICE,
    }

    def add(path: bytes, name: bytes) -> None:
        status = os.lstat(path)
        kind = kinds.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return
        link = os.readlink(path) if kind == SYMLINK else b""
        first = seen.setdefault((status.st_dev, status.st_ino), name)
        if kind != DIRECTORY and first != name:
            kind, link = HARDLINK, first
        xattrs = {
            os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        sparse = None
        data = b""
        if kind == FILE:
            with open(path, "rb") as file:
                if status.st_blocks * 512 < status.st_size:
                    sparse = list(segments(file.fileno(), status.st_size))
                    data = b"".join(os.pread(file.fileno(), size, at) for at, size in sparse)
                else:
                    data = file.read()
        parts.append(
            header(
                name,
                kind,
                status.st_mode & 0o7777,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
                link=link,
                device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in b"34" else (0, 0),
                xattrs=xattrs,
                sparse=sparse,
                exact_time=True,
            )
        )
        parts.append(data + padding(len(data)))
        if kind == DIRECTORY:
            for child in sorted(os.listdir(path)):
                add(path + b"/" + child, child if name == b"." else name + b"/" + child)

    add(os.fsencode(root), b".")
    return b"".join(parts) + END


def segments(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at - start


LETTERS = {FILE: "-", SYMLINK: "l", CHARACTER_DEVICE: "c", BLOCK_DEVICE: "b", DIRECTORY: "d", FIFO: "p"}


def described(stream: bytes) -> dict[str, Entry]:
    """An archive in the words of `describe`."""
    found: dict[str, Entry] = {}
    reader = TarReader(Pipe(stream, 65536))  # type: ignore[arg-type]
    for entry, data in read_all(reader, step=1 << 17):
        name = os.fsdecode(entry.name)
        if entry.typeflag == HARDLINK:
            first = os.fsdecode(entry.link)
            found[name] = found[first]
            found[first]["same as"] = first
            continue
        described = found[name] = {
            "type": LETTERS[entry.typeflag],
            "mode": oct(entry.mode),
            "owner": (entry.uid, entry.gid),
            "mtime": entry.mtime_ns,
            "xattrs": {os.fsdecode(key): value for key, value in entry.xattrs.items()},
        }
        if entry.typeflag == FILE:
            content = data
            if entry.sparse is not None:
                whole = bytearray(entry.size)
                at = 0
                for offset, size in entry.sparse:
                    whole[offset : offset + size] = data[at : at + size]
                    at += size
                content = bytes(whole)
            described |= {
                "size": len(content),
                "digest": sha256(content).hexdigest(),
                "sparse": entry.sparse is not None,
            }
        elif entry.typeflag == SYMLINK:
            described["link"] = os.fsdecode(entry.link)
        elif entry.device != (0, 0):
            described["device"] = entry.device
    assert reader.notes == []
    return found


def hard_links_alike(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Which of its names a file is stored under is the tar's choice: name the group by its first in order."""
    first: dict[str, str] = {}
    for path in sorted(entries):
        if "same as" in entries[path]:
            first.setdefault(str(entries[path]["same as"]), path)
    return {
        path: {**entry, "same as": first[str(entry["same as"])]} if "same as" in entry else entry
        for path, entry in entries.items()
    }


def whole_seconds(entries: dict[str, Entry]) -> dict[str, Entry]:
    return {path: {**entry, "mtime": int(str(entry["mtime"])) // 10**9} for path, entry in entries.items()}
