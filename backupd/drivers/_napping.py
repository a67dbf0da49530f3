"""A busy server sends its log at each write, some thousand times a second: it is read in larger pieces, since each time
that we wake takes the processor from it."""

from __future__ import annotations

import time

_LITTLE = 1 << 15
"""Bytes."""
_NAP = 0.02
"""Seconds. What comes meanwhile lies in the kernel's buffers; of 100 MB/s two may lie in the server's."""


def let_more_come(came: int) -> None:
    """Wait for a moment, where only so few bytes came."""
    if came < _LITTLE:
        time.sleep(_NAP)
