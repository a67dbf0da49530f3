"""Receive a base backup: a program that `postgres_apart` runs as a process of its own.

A server sends in messages of 32 KB. Whoever takes them holds the interpreter's lock half of the time, and waits for it
at each: beside threads that digest and compress, a base took half as long again.

What was received lies in slots of memory that both processes see, filled in turn; a byte comes back for each that was
read. Bare of everything else it starts while the other one still asks the server for what it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backupd.drivers.postgres_replication import BaseBackup, Replication
    from backupd.model import Bytes

SLOT = 1 << 20
"""Bytes of a slot."""
SLOTS = 4
TOLD = struct.Struct("<BI")
"""What is told, and the length of the JSON that follows; of FILLED the bytes in the next slot, and nothing follows."""
BEGUN, FILLED, ENDED, FAILED = range(4)


class Slots:
    """As the one who fills them sees them."""

    def __init__(self, memory: int, given_back: int, filled: Callable[[int], None]) -> None:
        """`memory` and `given_back` are open files. Each slot that is full is told by its bytes."""
        self._view = memoryview(mmap.mmap(memory, SLOT * SLOTS))
        self._given_back = given_back
        self._filled = filled
        self._free = SLOTS
        self._start = self._at = 0

    def put(self, data: Bytes) -> None:
        """Waits for a slot where all are full. Raises BrokenPipeError where nobody reads any more."""
        left = memoryview(data)
        while left:
            if self._at == self._start:
                self._take()
            part = left[: self._start + SLOT - self._at]
            self._view[self._at : self._at + len(part)] = part
            self._at += len(part)
            left = left[len(part) :]
            if self._at == self._start + SLOT:
                self.flush()

    def flush(self) -> None:
        if self._at > self._start:
            self._filled(self._at - self._start)
            self._start = self._at = (self._start + SLOT) % (SLOT * SLOTS)

    def _take(self) -> None:
        if not self._free:
            self._free = len(os.read(self._given_back, SLOTS))
        if not self._free:
            raise BrokenPipeError
        self._free -= 1


def begin(wire: Replication, manifest: bytes, **how: Any) -> tuple[BaseBackup, bool, str]:
    """A base backup of what changed since the one of this manifest, else of all; whether it is the former, and why it
    is not. `how`: of `base_backup_command`. Raises ServerRefused.

    A server refuses where it has no summaries that reach back so far, as it removes them after ten days.
    """
    from backupd.drivers.postgres_replication import ServerRefused, base_backup_command

    reason = ""
    if manifest:
        try:
            wire.upload_manifest(manifest)
            command = base_backup_command(wire.version, incremental=True, **how)
            return wire.base_backup(command), True, ""
        except ServerRefused as error:
            wire.query_rest()
            reason = error.message
    return wire.base_backup(base_backup_command(wire.version, **how)), False, reason


def _receive(asked: Mapping[str, Any], manifest: bytes, slots: Slots, tell: Callable[..., None]) -> None:
    from backupd.drivers.postgres_base import one_tar
    from backupd.drivers.postgres_replication import Server, ServerRefused, talking
    from backupd.errors import BackupdError

    warnings: list[str] = []
    try:
        with talking(), contextlib.closing(Server(asked["parameters"]).replicate()) as wire:
            warnings = wire.warnings
            base, onto, reason = begin(wire, manifest, **asked["how"])
            tell(BEGUN, start=base.start, timeline=base.timeline, onto=onto, reason=reason)
            for chunk in one_tar(base.messages(), asked["more"], onto=onto):
                slots.put(chunk)
            slots.flush()
            tell(ENDED, end=base.end, sent=base.sent)
    except BackupdError as error:
        refused = isinstance(error, ServerRefused)
        tell(FAILED, message=error.message, hint=error.hint, refused=refused, warnings=warnings[:1])
    except BrokenPipeError:
        pass  # nobody wants it any more
    except Exception as error:  # noqa: BLE001 - nobody else would hear of it
        tell(
            FAILED, message=f"the base backup failed: {type(error).__name__}: {error}",
            hint="this is a bug in backupd: please report it", refused=False, warnings=[],
        )  # fmt: skip


def _main() -> None:
    """Where the modules are comes first, as they take time to load; then what is asked, and a manifest behind it. Slots
    are given back through the same pipe, but none before something was told: what is read ahead here is only that."""
    source, out = sys.stdin.buffer, io.FileIO(1, "w", closefd=False)

    def tell(kind: int, **what: Any) -> None:
        data = json.dumps(what).encode()
        out.write(TOLD.pack(kind, len(data)) + data)

    def filled(size: int) -> None:
        out.write(TOLD.pack(FILLED, size))

    sys.path[:] = json.loads(source.readline())
    import psycopg  # noqa: F401  it takes the longest

    asked = json.loads(source.readline())
    manifest = source.read(asked["manifest"])
    _receive(asked, manifest, Slots(asked["memory"], source.fileno(), filled), tell)


if __name__ == "__main__":
    _main()
