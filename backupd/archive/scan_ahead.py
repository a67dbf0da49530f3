"""List the second half of a large tree in a process of its own, while the first is listed and read here.

Listing is one `lstat` an entry with a tuple made of it, under the interpreter's lock: threads gain nothing, a second
process halves it. What it finds known it tells by digest; the rest comes through a pipe, which holds it back.
The process runs `scan` as a program, bare of everything else: it starts in 20 ms. Where it cannot run or ends badly,
the reader lists on by itself, from where the answers stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, cast

from backupd import apart
from backupd.archive import scan
from backupd.archive.scan import END, KNOWN, PAGE, RECORD
from backupd.codec import DIGEST_SIZE
from backupd.model import Tree
from backupd.repository import PageRef

LEAST = 20_000
"""Members: of smaller trees half is listed before a process has started."""
_HEAD_START = 4_000
"""Members that are listed here before the process has started."""
_PIPE = 1 << 20  # the most that the kernel gives without privilege


def halfway(pages: Sequence[PageRef]) -> str:
    """Sort key of the directory at which the second half of a tree begins, by the pages it had; empty where a second
    process is of no use."""
    members = sum(page.members for page in pages)
    if members < LEAST or len(os.sched_getaffinity(0)) < 2:
        return ""
    seen = 0
    for page in pages:
        # A page that begins inside a directory has its name in the key: only whole directories can be shared out.
        if seen >= members // 2 + _HEAD_START and page.first and "\0" not in page.first:
            return page.first
        seen += page.members
    return ""


class Ended(Exception):
    """The process is gone, and has not said all."""


class ScanAhead:
    """The process. `root` is an open directory."""

    def __init__(self, root: int, content: Tree, start: str, known: Iterable[str]) -> None:
        request = {
            "root": root,
            "start": start,
            "include": content.include,
            "exclude": content.exclude,
            "one_file_system": content.one_file_system,
            "digest_size": DIGEST_SIZE,
            "path": apart.import_path(),
        }
        self._process = apart.start(scan.__file__, root)
        self._out = cast("BinaryIO", self._process.stdout)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE)
        asked = json.dumps(request).encode() + b"\n" + bytes.fromhex("".join(known))
        # Where it has ended at once, that is told when it is asked.
        with contextlib.suppress(OSError), cast("BinaryIO", self._process.stdin) as pipe:
            pipe.write(asked)
        self.sockets = 0
        self.warnings: list[str] = []

    def pages(self) -> Iterator[tuple[bytes, bytes]]:
        """In order: the digest of a page that is known and nothing, or nothing and a listing. Raises Ended."""
        while True:
            kind, length = RECORD.unpack(self._read(RECORD.size))
            data = self._read(length)
            if kind == KNOWN:
                yield data, b""
            elif kind == PAGE:
                yield b"", data
            elif kind == END:
                self.sockets, self.warnings = json.loads(data)
                return

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()

    def _read(self, size: int) -> bytes:
        data = self._out.read(size)
        if len(data) != size:
            raise Ended
        return data
