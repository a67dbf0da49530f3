"""What a program said before it ended badly, and the error made of it."""

from __future__ import annotations

import contextlib
import signal

from backupd.errors import CommandFailed

KEPT = 4096  # bytes of each end


class Said:
    """Keeps the beginning and the end of a stderr. The beginning names the error where what follows quotes a
    long statement; the end names it where warnings came first."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""
        self._cut = False

    def add(self, data: bytes | memoryview) -> None:
        """More of it."""
        room = KEPT - len(self._head)
        self._head += data[:room]
        if len(data) > room:
            tail = self._tail + data[room:]
            self._cut = self._cut or len(tail) > KEPT
            self._tail = tail[-KEPT:]

    @property
    def text(self) -> str:
        """All of it, or both ends."""
        middle = b"\n[...]\n" if self._cut else b""
        return (self._head + middle + self._tail).decode(errors="replace").strip()


def ended_badly(program: str, status: int, stderr: str, *, where: str = "") -> CommandFailed:
    """The error for a program that ended with `status`, negative or above 128 where a signal ended it."""
    number = -status if status < 0 else status - 128
    what = f"ended with status {status}"
    with contextlib.suppress(ValueError):
        what = f"was ended by signal {number} ({signal.Signals(number).name})"
    last = stderr.strip().rpartition("\n")[2].strip()
    message = f"{program}{where} {what}" + (f": {last}" if last else "")
    return CommandFailed(message, returncode=status, stderr=stderr)
