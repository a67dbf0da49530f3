"""Redis to the second is exact: the digest at every quiesced instant, recorded by the real recorder."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import captured
import pytest
import redis as redis_py
import services as bed
from redis_exact import Instant, Tape, check_instants, instant, own_digest, record, seen_from, work

from backupd.drivers.redis import RedisDriver, RedisSettings
from backupd.drivers.redis_pitr import RedisPitr
from backupd.drivers.redis_stream import select
from backupd.drivers.redis_wire import RedisAddress
from backupd.live import Way
from backupd.model import Anchor, LogSpan, Silence

DEBUG = ("--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0", "--save", "")


def client(service: bed.Service) -> Any:
    """redis-py shares no code with the driver."""
    return redis_py.Redis(service.host, service.port, socket_timeout=20)


@pytest.fixture
def recorded(services: bed.Services) -> Iterator[tuple[Any, RedisPitr, Tape]]:
    """A source, its driver, and what the recorder has of it, while it records."""
    source = services.redis(*DEBUG)
    driver = RedisPitr(RedisDriver(RedisSettings(RedisAddress(source.host, source.port))))
    tape, stop = Tape(), threading.Event()
    thread = threading.Thread(target=record, args=(driver, tape, stop))
    thread.start()
    try:
        assert tape.begun.wait(20)
        yield client(source), driver, tape
    finally:
        stop.set()
        thread.join(20)


def test_fifty_instants_have_the_digest_that_the_source_had(
    recorded: tuple[Any, RedisPitr, Tape], services: bed.Services
) -> None:
    """Every type, several databases, expiry, scripts, functions, transactions; a link that is cut in the middle."""
    source, driver, tape = recorded
    dice = random.Random(7)
    work(source, dice, 300)
    point = captured.take(driver)
    about: Any = point.point.attributes
    instants: list[Instant] = []
    for number in range(50):
        work(source, dice, 20)
        instants.append(instant(source))
        if number == 25:
            source.execute_command("CLIENT", "KILL", "TYPE", "replica")
    last = instants[-1]
    bed.wait_until(lambda: tape.end(last.replid) >= last.offset, timeout=20, what="the recorder")
    assert "gap" not in tape.events
    fresh = services.redis(*DEBUG)
    first = select(int(about["stream_database"]))
    compared = check_instants(
        client(fresh), seen_from(fresh.host, fresh.port), point.files["dump.rdb"],
        int(about["start"]), tape, first, instants,
    )  # fmt: skip
    assert len(compared) == 50
    assert len({digest for digest, _ in compared}) == 50, "the workload must change something"
    assert [n for n, (there, here) in enumerate(compared) if there != here] == []


def test_our_own_digest_tells_values_and_expiry_apart(services: bed.Services) -> None:
    """It stands in for DEBUG DIGEST where that is not allowed."""
    one = client(services.redis())
    one.hset("h", "a", "1")
    before = own_digest(one)
    assert own_digest(one) == before != f"{0:040x}"
    one.pexpire("h", 100_000)
    assert own_digest(one) != before


def test_a_running_server_goes_back_to_an_instant_of_its_log(recorded: tuple[Any, RedisPitr, Tape]) -> None:
    """In place, from the base and what the recorder has behind it; not a write more, not one less."""
    source, driver, tape = recorded
    source.set("k", 0)
    point = captured.take(driver)
    instants: list[Instant] = []
    for number in range(5):
        source.incr("k")
        source.hset("h", f"f{number}", number)
        source.set(f"e{number}", 1, ex=1000)
        instants.append(instant(source))
        time.sleep(0.02)
    last = instants[-1]
    bed.wait_until(lambda: tape.end(last.replid) >= last.offset, timeout=20, what="the recorder")
    begin, log = tape.logs[last.replid]
    anchors = tuple(Anchor(one.at, one.offset) for one in instants)
    span = LogSpan("s", last.replid, begin, begin + len(log), anchors[-1], len(log), anchors)
    with driver.standing() as standing:
        done = standing.replace(
            point, lambda: iter([(span, bytes(log))]), instants[2].at, Way(safety="p"), Silence()
        )
    assert source.execute_command("DEBUG", "DIGEST").decode() == instants[2].digest
    assert source.get("k") == b"3" and source.set("k", 9)
    assert done.recovered["as_of"] == instants[2].at.isoformat() and done.recovered["expired"] == 0
    bed.wait_until(lambda: "gap" in tape.events, timeout=20, what="the recorder's gap")
