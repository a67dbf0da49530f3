"""What a server keeps of its log because it is not stored yet, and when that should be looked at. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from backupd.model import LogSpan


@dataclass(frozen=True, slots=True)
class Retained:
    """What a server keeps for a recorder."""

    size: int
    """Bytes."""
    room: int | None
    """Bytes that may be written until the server gives it up; None: it never does."""
    lost: bool = False
    """It was given up."""
    setting: str = "max_slot_wal_keep_size"
    """Of the server: what limits what it keeps."""
    unsent: int | None = None
    """Bytes of it that the server had not sent at most, since the last look: as much lay in the memory that it has for
    our connection. None where that is not known, or no matter: it is on its disk."""


@runtime_checkable
class RetainingDriver(Protocol):
    """A power of those whose server keeps the log until it is stored, for good or for a while."""

    def retained(self, since: LogSpan | None) -> Retained | None:
        """As of now; None where it keeps nothing for us. Touches nothing. Raises CaptureFailed.

        `since`: up to where the log is stored, where the asker knows; not every server does.
        """


MUCH = 2 << 30
"""Bytes that a server without a limit may keep before somebody should know."""
_SHARE = 4  # of what the server may keep, so much must be left: a quarter


def worry(retained: Retained | None) -> str:
    """Why somebody should look at what a server keeps; empty where nobody need. Pure."""
    if retained is None:
        return ""
    if retained.lost:
        return (
            "the server gave up log that was not stored: what came after restores only from the next base on"
        )
    if retained.room is not None:
        if retained.room * (_SHARE - 1) >= retained.size:
            return ""
        return (
            f"the server keeps {_mib(retained.size)} of log that is not stored, and gives it up after "
            f"{_mib(retained.room)} more"
        )
    if retained.size < MUCH:
        return ""
    return (
        f"the server keeps {_mib(retained.size)} of log that is not stored, and goes on until it is full: "
        f"set {retained.setting}"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
