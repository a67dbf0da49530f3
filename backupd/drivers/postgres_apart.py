"""A base backup that a process of its own receives: `postgres_receive` says why and how."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn, cast

from backupd import apart
from backupd.drivers import postgres_receive
from backupd.drivers.postgres_receive import ENDED, FAILED, FILLED, SLOT, SLOTS, TOLD
from backupd.drivers.postgres_replication import Server, ServerRefused
from backupd.drivers.postgres_sql import hint_for
from backupd.errors import CaptureFailed


class BaseApart(io.RawIOBase):
    """The base as one tar, to be read once. Leave it as a context: that ends the process."""

    def __init__(self) -> None:
        """The process is started; it loads what it needs until it is asked."""
        super().__init__()
        self.start = self.timeline = self.sent = 0
        self.onto = False
        """Only what changed came."""
        self.reason = ""
        """Why all came, where only what changed was asked for."""
        self.end: int | None = None
        """Where the log must be replayed up to, known when all was read."""
        self._memory = os.memfd_create("backupd-base")
        os.ftruncate(self._memory, SLOT * SLOTS)
        self._slots = mmap.mmap(self._memory, SLOT * SLOTS)
        self._process = apart.start(postgres_receive.__file__, self._memory, bufsize=0)
        self._in = cast("BinaryIO", self._process.stdin)
        self._out = io.BufferedReader(cast("io.RawIOBase", self._process.stdout))
        self._start = 0  # of the slot at hand
        self._at = self._filled = 0  # in it: what was read, and what there is
        self._say(apart.import_path())

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, server: Server, *, manifest: bytes, more: Mapping[str, str], **how: Any) -> None:
        """Ask for it; returns when the server's checkpoint is done. `manifest`: of the base that it may continue;
        `more`: files to come with it; `how`: of `base_backup_command`. Raises ServerRefused, CaptureFailed."""
        asked = {
            "parameters": dict(server.parameters), "how": how, "more": dict(more), "memory": self._memory,
            "manifest": len(manifest),
        }  # fmt: skip
        self._say(asked, manifest)
        _, told = self._hear()
        self.start, self.timeline = told["start"], told["timeline"]
        self.onto, self.reason = told["onto"], told["reason"]

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: object) -> int:
        """As much of `buffer` as one slot has; 0 at the end. Raises CaptureFailed."""
        into = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if self._at == self._filled and not self._next_slot():
            return 0
        size = min(len(into), self._filled - self._at)
        start = self._start + self._at
        into[:size] = memoryview(self._slots)[start : start + size]
        self._at += size
        return size

    def _next_slot(self) -> bool:
        """False at the end."""
        if self.end is not None:
            return False
        if self._filled:
            self._start = (self._start + SLOT) % (SLOT * SLOTS)
            with contextlib.suppress(BrokenPipeError):  # it has sent all, and ended
                self._in.write(b"\0")
        try:
            kind, told = self._hear()
        except ServerRefused as error:
            raise CaptureFailed(
                f"the base backup failed: {error.message}", hint=error.hint or hint_for(error.message)
            ) from error
        self._at, self._filled = 0, told.get("size", 0)
        if kind == ENDED:
            self.end, self.sent = told["end"], told["sent"]
        return kind == FILLED

    def close(self) -> None:
        """Whatever it is at."""
        if not self.closed:
            self._process.kill()
            self._process.wait()
            self._in.close()
            self._out.close()
            self._slots.close()
            os.close(self._memory)
        super().close()

    # --- the process

    def _say(self, line: Any, data: bytes = b"") -> None:
        left = memoryview(json.dumps(line).encode() + b"\n" + data)
        with contextlib.suppress(BrokenPipeError):  # that it has ended shows in what it does not tell
            while left:
                left = left[self._in.write(left) :]

    def _hear(self) -> tuple[int, dict[str, Any]]:
        kind, size = TOLD.unpack(self._read(TOLD.size))
        if kind == FILLED:
            return kind, {"size": size}
        told: dict[str, Any] = json.loads(self._read(size))
        if kind == FAILED:
            _fail(told)
        return kind, told

    def _read(self, size: int) -> bytes:
        data = self._out.read(size)
        if len(data) != size:
            raise CaptureFailed(
                "the process that receives the base backup was killed",
                hint="is there memory enough? back up again",
            )
        return data


def _fail(told: Mapping[str, Any]) -> NoReturn:
    message, hint = told["message"], told["hint"]
    if not told["refused"]:
        raise CaptureFailed(message, hint=hint)
    if "checksum verification" in message:
        first = "".join(f" ({warning})" for warning in told["warnings"])
        raise CaptureFailed(
            f"the server found damaged pages{first}",
            hint="keep the earlier points, and look at the server's log for file and block before anything else",
        )
    raise ServerRefused(message, hint=hint)
