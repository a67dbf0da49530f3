"""Walk a tree and cut its listing into pages.

A page is a few dozen directories. Where it ends depends on names, and on very large files, so that a file that comes
or goes changes one page and leaves the others as they were. Entries carry the stat tuple that says whether they
changed; nothing is opened here but directories.

Every directory is opened relative to the root without following symlinks, and must be the one that was listed:
a path swapped for a symlink while we walk is reported, never followed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TypeAlias
from zlib import crc32

StatTuple: TypeAlias = "tuple[int, int, int, int, int, int, int, int]"
"""mode, size, mtime_ns, ctime_ns, inode, uid, gid, links: the columns of a page's row."""

stat_tuple: Callable[[os.stat_result], StatTuple] = attrgetter(
    "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_uid", "st_gid", "st_nlink"
)
INODE = 4
LINKS = 7

Listing: TypeAlias = "list[tuple[str, StatTuple]]"
Block: TypeAlias = "tuple[str, int, StatTuple | None, Listing]"
"""A directory: its path, its inode, its own tuple (None for the later parts of one cut in two: it changes with every
name that comes or goes), what is in it, sorted."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Pages of 25 to 160 entries: small ones are found unchanged more often, large ones cost less each.
_LEAST, _MOST, _LONG_DIRECTORY = 24, 160, 192
_LARGE = 64 << 20


def open_below(root: int, path: str, flags: int = _DIRECTORY) -> int:
    """Open `path` relative to the directory `root`; also where it is longer than the kernel takes at once."""
    try:
        return os.open(path or ".", flags, dir_fd=root)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # PATH_MAX is 4096 bytes, trees can be deeper
            raise
    current = os.dup(root)
    parts = path.split("/")
    for index, part in enumerate(parts):
        try:
            below = os.open(part, flags if index == len(parts) - 1 else _DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def sort_key(path: str, name: str | None = None) -> str:
    """Depth-first order of a tree: a directory's block sorts before those below it, '/' before every character."""
    key = path.replace("/", "\x01")
    return key if name is None else f"{key}\x00{name}"


class Scan:
    """One walk, or the part of it from the directory with the sort key `start` on and before that with `end`. `warn`
    is told of what could not be read; the walk goes on."""

    def __init__(
        self,
        root: int,
        *,
        wanted: Callable[[str, bool], bool] | None,
        one_file_system: bool,
        warn: Callable[[str], None],
        start: str = "",
        end: str | None = None,
    ) -> None:
        self._root = root
        self._start, self._end = start, end
        self._wanted = wanted
        self._device = os.fstat(root).st_dev if one_file_system else None
        self._warn = warn
        self.sockets = 0

    def pages(self) -> Iterator[list[Block]]:
        """Depth first, names sorted; each page a list of blocks."""
        page: list[Block] = []
        entries = 0
        stack: list[tuple[str, int | None]] = [("", None)]
        while stack:
            path, inode = stack.pop()
            listed = self._list(path, inode)
            if listed is None:
                continue
            own, listing, directories, sockets = listed
            prefix = path + "/" if path else ""
            below = [(prefix + name, entry[INODE]) for name, entry in reversed(directories)]
            if self._start or self._end is not None:
                below = [directory for directory in below if self._leads_inside(sort_key(directory[0]))]
            stack += below
            if sort_key(path) < self._start:  # only on the way to what is ours
                continue
            self.sockets += sockets
            start = 0
            for index in _cuts(listing):
                page.append((path, own[INODE], own if start == 0 else None, listing[start : index + 1]))
                yield page
                page, entries, start = [], 0, index + 1
            page.append((path, own[INODE], own if start == 0 else None, listing[start:]))
            entries += 1 + len(listing) - start
            if entries > _MOST or (entries > _LEAST and crc32(os.fsencode(path)) % 3 == 0):
                yield page
                page, entries = [], 0
        if page:
            yield page

    def _leads_inside(self, key: str) -> bool:
        """Whether a directory, or one below it, lies between start and end. Keys of those below begin with its own."""
        if self._end is not None and key >= self._end:
            return False
        return key >= self._start or self._start.startswith(f"{key}\x01")

    def _list(self, path: str, inode: int | None) -> tuple[StatTuple, Listing, Listing, int] | None:
        try:
            fd = open_below(self._root, path)
        except OSError as error:
            self._warn(f"{path}: {error.strerror}: the directory was left out")
            return None
        try:
            info = os.fstat(fd)
            own = stat_tuple(info)
            if inode is not None and own[INODE] != inode:
                self._warn(f"{path}: was replaced while it was read and was left out")
                return None
            if self._device is not None and info.st_dev != self._device:
                # Excluded, it would not be looked at; taken in silence for all there is, it would be lost.
                self._warn(f"{path}: another file system is mounted here: what is in it was left out")
                return own, [], [], 0  # the mount point itself is kept
            with os.scandir(fd) as entries:
                try:
                    found = [(entry.name, stat_tuple(entry.stat(follow_symlinks=False))) for entry in entries]
                except FileNotFoundError:
                    found = _list_slowly(fd)
        except OSError as error:
            self._warn(f"{path}: {error.strerror}: the directory was left out")
            return None
        finally:
            os.close(fd)
        found.sort()
        return own, *self._sort_out(path, found)

    def _sort_out(self, path: str, found: Listing) -> tuple[Listing, Listing, int]:
        """Files and the like, directories, the number of sockets; without what is not wanted."""
        if self._wanted is not None:
            prefix = path + "/" if path else ""
            wanted = self._wanted
            found = [e for e in found if wanted(prefix + e[0], stat.S_ISDIR(e[1][0]))]
        listing, directories, sockets = [], [], 0
        for entry in found:
            kind = entry[1][0] & 0o170000
            if kind == stat.S_IFDIR:
                directories.append(entry)
            elif kind == stat.S_IFSOCK:
                sockets += 1  # made anew by whoever listens; nothing in it could be kept
            else:
                listing.append(entry)
        return listing, directories, sockets


def _cuts(listing: Listing) -> list[int]:
    """After which entries of a directory a page ends: by name in a long one, and after each very large file, so that
    a run which is interrupted has it in a page that the next can take over."""
    long = len(listing) > _LONG_DIRECTORY
    return [
        index
        for index, (name, entry) in enumerate(listing)
        if entry[1] >= _LARGE or (long and crc32(os.fsencode(name)) & 63 == 0)
    ]


def _list_slowly(fd: int) -> Listing:
    """Entries vanish while we list them: take those that stay."""
    found = []
    for name in os.listdir(fd):
        with contextlib.suppress(FileNotFoundError):
            found.append((name, stat_tuple(os.stat(name, dir_fd=fd, follow_symlinks=False))))
    return found


# --- as a program of its own: see `scan_ahead` ------------------------------------------------------------

KNOWN, PAGE, END = b"K", b"P", b"E"
RECORD = struct.Struct("<cI")
"""Kind and length of what follows: the digest of a page that is known, a page, how the walk ended."""


def encode_listing(page: list[Block]) -> bytes:
    """Bytes that are the same wherever the same page is listed."""
    return marshal.dumps(page, 2)  # 2: equal values give equal bytes, whether or not they are one object


def decode_listing(data: bytes) -> list[Block]:
    page: list[Block] = marshal.loads(data)  # noqa: S302  written by this very program
    return page


def has_links(page: list[Block]) -> bool:
    """Whether anything on it has several names: then the reader wants to know, also where nothing changed."""
    return any(entry[LINKS] > 1 for _, _, _, listing in page for _, entry in listing)


def _main() -> None:
    """The request comes as one line of JSON, then the digests of known pages; the answer goes to standard output."""
    request = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = request["path"]
    from blake3 import blake3

    raw = sys.stdin.buffer.read()
    size = request["digest_size"]
    known = {raw[at : at + size] for at in range(0, len(raw), size)}
    wanted = None
    if request["include"] or request["exclude"]:
        from runpy import run_path  # not as a module: its package would bring the whole engine

        compile_patterns = run_path(os.path.join(os.path.dirname(__file__), "patterns.py"))[
            "compile_patterns"
        ]
        wanted = compile_patterns(request["include"], request["exclude"])
    warnings: list[str] = []
    scan = Scan(
        request["root"], wanted=wanted, one_file_system=request["one_file_system"], warn=warnings.append,
        start=request["start"],
    )  # fmt: skip
    out = sys.stdout.buffer

    def tell(kind: bytes, data: bytes) -> None:
        out.write(RECORD.pack(kind, len(data)) + data)

    for page in scan.pages():
        data = encode_listing(page)
        digest = blake3(data).digest(length=size)
        if digest in known and not has_links(page):
            tell(KNOWN, digest)
        else:
            tell(PAGE, data)
    tell(END, json.dumps([scan.sockets, warnings]).encode())
    out.flush()


if __name__ == "__main__":
    _main()
