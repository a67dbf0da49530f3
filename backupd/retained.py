"""What a server keeps of its log because it is not stored yet, and when that should be looked at. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Retained:
    """What a server keeps for a recorder."""

    size: int
    """Bytes."""
    room: int | None
    """Bytes that may be written until the server gives it up; None: it never does, and fills its disk."""
    lost: bool = False
    """It was given up."""


@runtime_checkable
class RetainingDriver(Protocol):
    """A power of those whose server keeps the log until it is stored, however long that takes."""

    def retained(self) -> Retained | None:
        """As of now; None where it keeps nothing for us. Touches nothing. Raises CaptureFailed."""


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
        f"the server keeps {_mib(retained.size)} of log that is not stored, and goes on until its disk is full: "
        "set max_slot_wal_keep_size"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
