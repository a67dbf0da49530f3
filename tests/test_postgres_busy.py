"""A server at work is left between one look at its log and the next: nothing is missed, and nobody else comes in."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import services as bed
from captured import take
from test_postgres_physical import (
    INTERVAL,
    Log,
    Start,
    connect,
    driver_of,
    one,
    recording,
    start_server,
)

from backupd.drivers.postgres_replication import ServerRefused, position_of
from backupd.drivers.postgres_slot import slot_name

__all__ = ["start_server"]  # the fixture

STREAMED = "SELECT active FROM pg_replication_slots WHERE slot_name = 'backupd_orders'"
BEHIND = "SELECT pg_current_wal_flush_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = '{}'"
FLUSHED = "SELECT pg_current_wal_flush_lsn()::text"


@contextlib.contextmanager
def load(service: bed.Service) -> Iterator[None]:
    """Some megabytes of log a second, in transactions of 8 kB."""
    stop = threading.Event()

    def write() -> None:
        with connect(service) as connection:
            while not stop.is_set():
                connection.execute("INSERT INTO t SELECT repeat('x', 2000) FROM generate_series(1, 4)")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def streamed(service: bed.Service, times: int = 40) -> list[bool]:
    """Whether the log was being streamed, looked at every 50 ms."""
    found = []
    with connect(service) as connection:
        for _ in range(times):
            found.append(connection.execute(STREAMED.encode()).fetchone() == (True,))
            time.sleep(0.05)
    return found


def try_to_record(service: bed.Service) -> None:
    driver_of(service).recorder(interval=INTERVAL).record(None, Log(), threading.Event())


def test_a_busy_server_is_left_between_looks_and_its_log_is_whole(start_server: Start) -> None:
    """Compared with what a slot of its own kept of all of it; and the server gets its room back meanwhile."""
    service = start_server()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(pad text)")
        connection.execute("SELECT pg_create_physical_replication_slot('kept', true)")
    log, whole = Log(), Log()
    with recording(driver_of(service), log):
        with load(service):
            time.sleep(1)
            seen = streamed(service)
            assert seen.count(False) > len(seen) / 4  # it is left alone, mostly for much longer
            bed.wait_until(
                lambda: one(service, BEHIND.format("backupd_orders")) < one(service, BEHIND.format("kept")) / 2,
                timeout=20, what="room for the server",
            )  # fmt: skip
        end = position_of(one(service, FLUSHED))
        bed.wait_until(lambda: log.end >= end, timeout=20, what="the rest")
    with connect(service) as connection:
        connection.execute("SELECT pg_copy_physical_replication_slot('kept', 'backupd_again')")
    with recording(driver_of(service, "again"), whole):
        bed.wait_until(lambda: whole.end >= end, timeout=20, what="all of it once more")
    start = max(log.begun[0][1], whole.begun[0][1])
    assert end - start > 5_000_000
    assert log.gaps == []
    assert log.bytes_from(start)[: end - start] == whole.bytes_from(start)[: end - start]


def test_a_second_recorder_is_refused_also_while_a_busy_server_is_left(start_server: Start) -> None:
    """Its slot is free then. A base knows all the same that somebody records."""
    service = start_server()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(pad text)")
    log = Log()
    with recording(driver_of(service), log), load(service):
        time.sleep(1)
        for _ in range(10):
            with pytest.raises(ServerRefused, match="is active for PID"):
                try_to_record(service)
        assert take(driver_of(service)).point.warnings == ()
    assert log.gaps == []


def test_the_last_commits_before_a_shutdown_are_stored_where_the_load_has_ended(start_server: Start) -> None:
    """A server with little to do is not left. It ends our session first, then sends the rest, which a recorder stores
    that else would have kept it for an hour."""
    service = start_server()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(pad text)")
    log = Log()
    with pytest.raises(ServerRefused), recording(driver_of(service), log, interval=3600) as recorder:
        with load(service):
            time.sleep(1)
        bed.wait_until(lambda: all(streamed(service)), timeout=40, what="the stream, and nothing but it")
        with connect(service) as connection:
            connection.execute("INSERT INTO t VALUES ('last')")
        last = position_of(one(service, FLUSHED))
        assert log.end < last
        service.container.stop()
        recorder.join(30)
    assert log.end >= last


def test_a_recorder_that_fell_silent_is_put_out(start_server: Start) -> None:
    """Its host is gone, or it stands still: nobody told the server."""
    service = start_server("wal_sender_timeout=6s")
    slot = slot_name("orders")
    with contextlib.closing(driver_of(service)._source.server().connect()) as silent:
        silent.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [slot])
        with pytest.raises(ServerRefused, match="is active for PID"):
            try_to_record(service)
        assert silent.execute("SELECT 1").fetchone() == (1,)  # not yet
        time.sleep(6.5)
        with pytest.raises(ServerRefused, match="is active for PID"):
            try_to_record(service)
        log = Log()
        with recording(driver_of(service), log):
            assert log.begun
