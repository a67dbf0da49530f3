"""How fast a log is caught up: bounded, and never so slowly that the server gets away."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers.postgres_pace import BEHIND, BURST, Pace, allowed

MB = 10**6
CHUNK = 1 << 20
"""Bytes read at a time. A server sends an eighth; so many steps would say no more."""


def caught_up(
    backlog: int, writes: list[float], most: float, *, line: float = 500 * MB
) -> tuple[float, float]:
    """Read from a server that is `backlog` ahead and writes at these rates, a second each and the last from then on.
    Seconds until the log is live again, and the most that was read in a second before."""
    pace, now, server, position = Pace(most), 0.0, float(backlog), 0
    looked, seconds = -1.0, [0]
    while server - position > BEHIND:
        assert now < 1000, "the server gets away"
        if now - looked >= 0.25:
            pace.seen(now, int(server))
            looked = now
        before = now
        if (wait := pace.wait(now)) > 0:
            now += min(wait, 0.25)
        else:
            now += CHUNK / line
            position += CHUNK
            pace.read(now, CHUNK, position)
            seconds += [0] * (int(now) + 1 - len(seconds))
            seconds[int(now)] += CHUNK
        server += (now - before) * writes[min(int(before), len(writes) - 1)]
    return now, max(seconds[:-1] or [0])


@given(st.integers(0, 1 << 50), st.floats(0, 1e10), st.floats(0, 1e10))
def test_what_is_behind_is_read_faster_than_the_server_writes(
    behind: int, written: float, most: float
) -> None:
    """And what is live without any bound."""
    rate = allowed(behind, written, most)
    assert rate >= most
    assert rate >= 2 * written
    assert math.isinf(rate) == (most == 0 or behind <= BEHIND)


@given(st.integers(BEHIND + 1, 500 * MB), st.integers(5, 100))
def test_a_backlog_of_an_idle_server_is_read_at_the_bound(backlog: int, megabytes: int) -> None:
    most = megabytes * MB
    seconds, fastest = caught_up(backlog, [0], most)
    assert fastest <= most * (1 + 2 * BURST) + CHUNK
    assert seconds <= (backlog - BEHIND) / most * 1.05 + 1


@given(
    st.integers(BEHIND + 1, 300 * MB),
    st.lists(st.floats(2 * MB, 60 * MB), min_size=1, max_size=20),
    st.floats(0.1 * MB, 50 * MB),
)
def test_a_log_is_caught_up_however_low_the_bound_is(backlog: int, writes: list[float], most: float) -> None:
    """While the server writes on: once it writes steadily, the distance is gone within what the bound and the server's
    own rate take for it."""
    seconds, _ = caught_up(backlog, writes, most)
    ahead = backlog + sum(writes) + 3 * writes[-1]
    assert seconds <= len(writes) + 6 + ahead / max(most - writes[-1], writes[-1], 1)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 16 * MB)), max_size=50))
def test_a_live_log_never_waits(came: list[tuple[float, int]]) -> None:
    pace, now, position = Pace(MB), 0.0, 0
    for pause, size in came:
        now += pause
        position += size
        pace.seen(now, position)
        pace.read(now, size, position)
        assert pace.wait(now) == 0


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_server_that_was_set_back_is_read_as_it_comes(before: int, after: int) -> None:
    """A standby may be behind what it has sent already."""
    pace = Pace(MB)
    pace.seen(0, before)
    pace.seen(5, min(before, after))
    pace.read(5, CHUNK, max(before, after))
    assert pace.wait(5) == 0
