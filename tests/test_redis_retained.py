"""What a Redis server keeps because it is not stored yet: worked out from what it says of itself, and seen on a real
one whose log cannot be stored."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import services as bed
from hypothesis import given
from hypothesis import strategies as st
from test_redis_pitr import DIGESTS, client, driver_of

from backupd.agent.recording import RecorderState, Recordings
from backupd.agent.serving import gauges_of
from backupd.drivers.redis_recorder import BOUND
from backupd.drivers.redis_retained import SETTING, Held, Limits, retained_by
from backupd.model import Bytes, LogSpan
from backupd.repository import Repository
from backupd.retained import Retained, worry
from backupd.stores import MemoryStore

MIB = 1 << 20
OURS, BEFORE, OTHER = "a" * 40, "b" * 40, "c" * 40


def link(position: int, *replicas: str, backlog: int = 64 * MIB, first: int = 1) -> dict[str, str]:
    """INFO replication of a master that was a replica up to 1000."""
    said = {
        "role": "master", "master_replid": OURS, "master_replid2": BEFORE, "second_repl_offset": "1001",
        "master_repl_offset": str(position), "repl_backlog_size": str(backlog),
        "repl_backlog_first_byte_offset": str(first),
    }  # fmt: skip
    return said | {f"slave{n}": about for n, about in enumerate(replicas)}


def stored(position: int, epoch: str = OURS) -> LogSpan:
    return LogSpan("s", epoch, position, position, None, 0)


def replica(position: int, *, port: int = 0, state: str = "online") -> str:
    return f"ip=10.0.0.7,port={port},state={state},offset={position},lag=1"


# --- pure --------------------------------------------------------------------------------------------------------

places = st.integers(1000, 1 << 30)
sizes = st.integers(16 << 10, 1 << 28)


@given(points=st.tuples(places, places, places).map(sorted), backlog=sizes, limit=sizes, linked=st.booleans())
def test_what_is_had_is_safe_and_what_is_behind_it_has_a_limit(
    points: list[int], backlog: int, limit: int, linked: bool
) -> None:
    """What a recorder has already is lost by nothing that the server does; of what it has not, the server keeps as much
    as its backlog holds, or as a connected replica may be behind."""
    ours, received, position = points
    first = max(1, position - backlog + 1)
    held = Held(OURS, received, linked, unsent=7)
    found = retained_by(link(position, backlog=backlog, first=first), Limits(limit, 0), stored(ours), held)
    assert found is not None
    behind = position - received
    assert found.size == position - ours
    assert found.unsent == (7 if linked else None if found.lost else 0)
    assert found.lost == (not linked and behind > backlog)
    if not found.lost:
        assert found.room == max(0, (max(backlog, limit) if linked else backlog) - behind)


@given(points=st.tuples(places, places).map(sorted), backlog=sizes)
def test_an_agent_that_is_away_has_what_is_stored_and_the_backlog(points: list[int], backlog: int) -> None:
    ours, position = points
    first = max(1, position - backlog + 1)
    found = retained_by(link(position, backlog=backlog, first=first), Limits(1, 1), stored(ours), None)
    if position - ours > backlog:
        assert found == Retained(position - ours, 0, lost=True, setting=SETTING)
    else:
        assert found == Retained(position - ours, backlog - (position - ours), setting=SETTING)


def test_who_does_not_know_what_is_stored_asks_the_one_that_receives_it() -> None:
    """It has no port, as no server that receives: those are not taken for it, nor one whose dump is under way."""
    others = replica(9000, port=6379), replica(0), replica(4000, state="wait_bgsave")
    assert retained_by(link(10_000, *others), Limits(0, 0), None, None) is None
    found = retained_by(link(10_000, *others, replica(7000)), Limits(70 * MIB, 0), None, None)
    assert found == Retained(3000, 70 * MIB - 3000, setting=SETTING)


def test_a_history_that_ended_is_lost_and_one_that_was_continued_is_not() -> None:
    """A replica that was promoted goes on from where its master's history ends for it."""
    kept = retained_by(link(2000), None, stored(1000, BEFORE), None)
    assert kept == Retained(1000, 64 * MIB - 1000, setting=SETTING)
    for since in (stored(1001, BEFORE), stored(1000, OTHER)):
        found = retained_by(link(2000), None, since, None)
        assert found is not None
        assert "gave up" in worry(found)


def test_a_server_without_a_limit_is_told_so_by_its_own_setting() -> None:
    behind = Held(OURS, 1000, True, unsent=3 << 30)
    found = retained_by(link(3 << 30), Limits(0, 0), stored(1000), behind)
    assert found is not None
    assert found.room is None
    assert "client-output-buffer-limit" in worry(found)


@pytest.mark.parametrize(
    ("words", "limits", "least"),
    [
        ("normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60", Limits(256 * MIB, 64 * MIB), 64 * MIB),
        ("replica 1048576 0 0", Limits(MIB, 0), MIB),
        ("normal 0 0 0 replica 0 0 0", Limits(0, 0), 0),
        ("", None, None),
        ("replica", None, None),
        ("replica 1mb 0 0", None, None),
    ],
)  # fmt: skip
def test_how_far_a_replica_may_be_behind(words: str, limits: Limits | None, least: int | None) -> None:
    """The lower of two limits, as only moments lie above it; one that is not readable is not known."""
    found = Limits.of_setting(words)
    assert found == limits
    assert (found.least if found else None) == least


# --- a real server -----------------------------------------------------------------------------------------------


class Sticky(MemoryStore):
    """Takes nothing of a log while it is stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        if key.startswith("logs/"):
            assert self.free.wait(60)
        super().put(key, data, overwrite=overwrite)


def until(state: Callable[[], RecorderState], true: Callable[[Retained], object], what: str) -> Retained:
    found: list[Retained] = []

    def look() -> bool:
        kept = state().retained
        found[:] = [kept] if kept is not None and true(kept) else []
        return bool(found)

    bed.wait_until(look, timeout=20, what=what, details=lambda: str(state()))
    return found[0]


def test_what_the_server_keeps_is_seen_while_the_store_is_stuck(services: bed.Services) -> None:
    """The agent takes what it may; then the server's backlog holds the rest, for a while, and no more than that: its
    memory for us stays nothing. How far it is from a loss is told before, and the loss when it is one."""
    source = services.redis(
        *DIGESTS, "--repl-backlog-size", "16mb", "--client-output-buffer-limit", "replica 64mb 64mb 60"
    )
    to: Any = client(source)
    store, driver = Sticky(), driver_of(source)
    repository = Repository.create(store, clock=lambda: datetime.now(UTC))

    def write(mebibytes: int) -> None:
        for _ in range(mebibytes):
            to.set("k", secrets.token_bytes(MIB))

    made = Recordings(
        {"s": timedelta(milliseconds=50)}, driver=lambda _: driver, repository=lambda: repository,
        clock=lambda: datetime.now(UTC), look_every=0.05,
    )  # fmt: skip
    with made:

        def state() -> RecorderState:
            return made.states()[0]

        write(1)
        until(state, lambda kept: kept.size < MIB // 2 and kept.unsent is not None, "a log that is stored")
        assert state().worry == ""
        store.free.clear()
        write(12)
        kept = until(
            state, lambda kept: kept.size >= 12 * MIB and kept.room == 64 * MIB, "what is not stored"
        )
        assert worry(kept) == ""  # the agent has it
        assert to.info("memory")["mem_clients_slaves"] == 0
        bed.wait_until(lambda: driver_of(source).retained() is not None, timeout=5, what="an acknowledgement")
        seen = driver_of(source).retained()  # by a stranger, who is told by the server
        assert seen is not None and seen.size >= 12 * MIB and seen.room == 64 * MIB - seen.size
        write(38)

        def warned() -> bool:
            found = [p for p in driver_of(source).check() if "gives it up after" in p.message]
            return bool(found) and not found[0].fatal and bool(found[0].hint)

        bed.wait_until(warned, timeout=5, what="a warning of check")
        write(BOUND // MIB - 50 + 4)
        kept = until(
            state,
            lambda kept: kept.unsent == 0 and kept.size > BOUND and (kept.room or 0) < 16 * MIB,
            "the link's end",
        )
        bed.wait_until(
            lambda: to.info("replication")["connected_slaves"] == 0, timeout=5, what="its end there"
        )
        assert to.info("memory")["mem_clients_slaves"] == 0
        assert kept.room is not None and 8 * MIB < kept.room < 16 * MIB and not kept.lost
        assert "gives it up after" in worry(kept)
        told = state()
        gauges = {gauge.name: gauge.values["s"] for gauge in gauges_of([told])}
        assert told.retained is not None
        assert gauges["backupd_log_retained_bytes"] == told.retained.size > BOUND
        assert gauges["backupd_log_unsent_bytes"] == 0
        write(14)
        until(state, lambda kept: kept.lost, "a loss")
        assert "gave up" in state().worry
        store.free.set()
        until(state, lambda kept: not kept.lost and kept.size < MIB, "a new stretch")
        assert state().worry == ""
    assert len([mark for mark in repository.logs("s")[1] if not mark.after]) == 1
    spans, _ = repository.logs("s")
    assert sum(span.end - span.start for span in spans) > BOUND
