"""Processes that write what frames hold: no interpreter's lock is shared, none is asked for.

A process runs `extract_frame` as a program. It is given frames as they are stored, and what is wanted of each; what
it cannot do it tells, and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import marshal
import os
from typing import Any, BinaryIO, cast

from backupd import apart
from backupd.archive import extract_frame
from backupd.archive.extract_frame import ANSWER, DAMAGED, JOB, READY, REFUSED, Job
from backupd.archive.pack import BLOB
from backupd.errors import Damaged, RestoreFailed

LEAST_MEMBERS, LEAST_BYTES = 4_000, 64 << 20
"""Of less, two processes are hardly started when it is done; 5,000 files take four fifths of the time."""
_COUNT = 2
"""Processes, of 18 to 20 MB each: with a third a restore would have more than 100 MB."""
_PIPE = 1 << 20  # the most that the kernel gives without privilege: one or two frames wait in it


def processes(members: int, size: int) -> int:
    """How many to restore this much; 0 where none is of use."""
    large = members >= LEAST_MEMBERS or size >= LEAST_BYTES
    return _COUNT if large and len(os.sched_getaffinity(0)) > 1 else 0


class ExtractApart:
    """One process. `root` is an open directory."""

    def __init__(self, root: int, codec: str) -> None:
        request = {"root": root, "codec": codec, "blob": BLOB.format, "path": apart.import_path()}
        self._process = apart.start(extract_frame.__file__, root, bufsize=0)
        self._ready: bool | None = None
        self._in = cast("BinaryIO", self._process.stdin)
        self._out = io.BufferedReader(cast("io.RawIOBase", self._process.stdout))
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE)
        # Where it has ended at once, that is told when it is asked.
        with contextlib.suppress(OSError):
            self._in.write(json.dumps(request).encode() + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> bool:
        """Whether it runs; waits until that is known."""
        if self._ready is None:
            try:
                self._ready = self._answer()[0] == READY
            except RestoreFailed:
                self._ready = False
        return self._ready

    def send(self, job: Job, stored: memoryview | None) -> None:
        """Without the frame, the process reads it. Waits while what was sent before waits in the pipe."""
        told = marshal.dumps(job)
        stored = stored or memoryview(b"")
        views: list[bytes | memoryview] = [JOB.pack(len(told), len(stored)) + told, stored]
        with contextlib.suppress(BrokenPipeError):  # it has ended, and may have told why
            while views:
                done = os.writev(self._in.fileno(), views)
                while views and done >= len(views[0]):
                    done -= len(views.pop(0))
                if views:
                    views[0] = memoryview(views[0])[done:]

    def written(self) -> tuple[int, int]:
        """Bytes and number of files of the oldest job that was not asked about. Raises Damaged, RestoreFailed,
        OSError as the disk gave it."""
        _, size, files = self._answer()
        return size, files

    def end(self) -> list[str]:
        """No more jobs come: its warnings. Raises RestoreFailed."""
        if not self.ready():
            return []
        self._in.close()
        _, warnings = self._answer()
        return list(warnings)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """After it was killed, and nobody uses it any more."""
        self._in.close()
        self._out.close()

    def _answer(self) -> tuple[Any, ...]:
        (length,) = ANSWER.unpack(self._read(ANSWER.size))
        answer: tuple[Any, ...] = marshal.loads(self._read(length))  # noqa: S302  written by this very program
        if answer[0] == DAMAGED:
            raise Damaged(answer[1], hint=answer[2])
        if answer[0] == REFUSED:
            raise OSError(*answer[1:])
        return answer

    def _read(self, size: int) -> bytes:
        data = self._out.read(size)
        if len(data) != size:
            raise RestoreFailed(
                "a process that writes files was killed", hint="is there memory enough? restore again"
            )
        return data
