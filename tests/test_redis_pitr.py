"""Redis, mode pitr, against real servers: the stream is recorded without a hole and restored exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import captured
import pytest
import redis as redis_py
import services as bed
from conftest import StartService
from redis_exact import Instant, at_rest, instant

from backupd.chain import chains, need_of
from backupd.drivers import redis_pitr
from backupd.drivers.redis import RedisDriver, RedisSettings
from backupd.drivers.redis_pitr import RedisPitr
from backupd.drivers.redis_recorder import RedisRecorder, join
from backupd.drivers.redis_wire import Connection, RedisAddress, RedisError
from backupd.errors import CaptureFailed, RestoreFailed
from backupd.logs import LogWriter, read_logs
from backupd.model import Container, LogSpan
from backupd.repository import Repository
from backupd.sandbox.engine import Engine
from backupd.stores import MemoryStore

INTERVAL = 0.2
DIGESTS = ["--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"]


@pytest.fixture
def engine(docker_client: object) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def client(service: bed.Service, db: int = 0) -> Any:
    return redis_py.Redis(
        service.host, service.port, db, password=service.password or None, socket_timeout=20
    )


def driver_of(service: bed.Service, **options: Any) -> RedisPitr:
    at = RedisAddress(service.host, service.port, password=service.password)
    return RedisPitr(RedisDriver(RedisSettings(at, **options)))


class Kept:
    """A repository in memory, and what a recorder put into it."""

    def __init__(self, driver: RedisPitr) -> None:
        self.driver = driver
        self.repository = Repository.create(MemoryStore(), clock=lambda: datetime.now(UTC))
        self.begun: list[tuple[str, int]] = []

    def writer(self) -> LogWriter:
        writer = LogWriter(self.repository, "s", on_begin=lambda: self._begin(writer))
        return writer

    def _begin(self, writer: LogWriter) -> None:
        self.begun.append((writer.recorded.epoch, writer.recorded.position))

    @contextlib.contextmanager
    def recording(self) -> Iterator[threading.Thread]:
        """A recorder at work; what it raises comes out at the end."""
        stop, failures, writer = threading.Event(), list[BaseException](), self.writer()
        count = len(self.begun)

        def run() -> None:
            try:
                self.driver.recorder(interval=INTERVAL).record(writer.since, writer, stop)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
            writer.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            bed.wait_until(lambda: len(self.begun) > count or bool(failures), timeout=30, what="the recorder")
            yield thread
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()
            if failures:
                raise failures[0]

    def chain(self) -> Any:
        """The only one there is."""
        (found,) = chains(*self.repository.logs("s"))
        return found

    def reasons(self) -> list[str]:
        """Epochs that were closed by a gap."""
        return [mark.epoch for mark in self.repository.logs("s")[1] if not mark.after]

    def log(self) -> bytes:
        return b"".join(data for _, data in read_logs(self.repository, self.chain().spans))

    def wait_for(self, position: int) -> None:
        """Until the log is stored up to there."""
        bed.wait_until(
            lambda: any(span.end >= position for span in self.repository.logs("s")[0]), timeout=30,
            what=f"the log up to {position}",
        )  # fmt: skip

    def restore(self, taken: captured.Held, at: datetime | None, container: Container) -> None:
        need = need_of(taken.point)
        assert need is not None and self.chain().covers(need)
        self.driver.load_to(taken, read_logs(self.repository, self.chain().spans), at, container)


def churn(service: bed.Service, seed: int, stop: threading.Event) -> None:
    """All that is sent to replicas in another form than it was given, or depends on time or chance."""
    rnd, one = random.Random(seed), client(service)
    many = [client(service, db) for db in (0, 3, 9)]
    lives = (1, 30, 400, 90_000)
    while not stop.is_set():
        on, n = rnd.choice(many), rnd.randrange(60)
        kind = rnd.randrange(12)
        with contextlib.suppress(redis_py.ResponseError):
            if kind == 0:
                on.set(f"x{n}", rnd.random(), px=rnd.choice(lives))
            elif kind == 1:
                on.rpush(f"l{n}", *range(rnd.randrange(1, 9)))
                on.lpop(f"l{n}")
            elif kind == 2:
                on.xadd(f"st{n}", {"a": n}, maxlen=20)
            elif kind == 3:
                on.sadd(f"s{n}", *range(9))
                on.spop(f"s{n}")
            elif kind == 4:
                on.incrbyfloat(f"f{n}", 0.1)
            elif kind == 5:
                with on.pipeline(transaction=True) as batch:
                    batch.incr(f"i{n}").pexpire(f"i{n}", rnd.choice(lives)).hset(f"h{n}", "f", n).execute()
            elif kind == 6:
                script = "redis.call('SET', KEYS[1], redis.call('TIME')[2]); redis.call('PEXPIRE', KEYS[1], ARGV[1])"
                on.eval(script, 1, f"e{n}", rnd.choice(lives))
            elif kind == 7:
                on.fcall("f", 1, f"fn{n}", n)
            elif kind == 8:
                on.getex(f"x{n}", px=rnd.choice(lives))
                on.get(f"x{n}")
            elif kind == 9:
                on.copy(f"l{n}", f"l{n + 1}", replace=True)
            elif kind == 10:
                on.zadd(f"z{n}", {f"m{kind}": rnd.random()})
                on.zpopmin(f"z{n}")
            elif kind == 11 and n < 3:
                one.swapdb(3, 9)


def as_replica(services: bed.Services, of: Container) -> bed.Service:
    """A server on the files of another that expires nothing by itself, as it thinks it has a master."""
    argv = ["redis-server", "--appendonly", "yes", "--replicaof", "127.0.0.1", "1", *DIGESTS]
    made = services.container(bed.REDIS_IMAGE, argv, port=6379, volumes_from=[of.name])
    bed.wait_until(lambda: bed.redis_answers(made), timeout=30, what="the copy")
    return made


# --- exactness -------------------------------------------------------------------------------------------------


def test_a_restored_server_holds_exactly_what_its_source_held(services: bed.Services, engine: Engine) -> None:
    """At instants under full load, keys included that have expired since: equal by Redis' own digest."""
    source = services.redis(*DIGESTS, "--repl-ping-replica-period", "1")
    client(source).function_load(
        "#!lua name=l\nredis.register_function('f', function(k, a) return redis.call('SET', k[1], a[1], 'PX', 90) end)"
    )
    for n in range(200):
        client(source).set(f"early:{n}", n, px=1 + 10 * n)
    kept, stop = Kept(driver_of(source)), threading.Event()
    threads = [threading.Thread(target=churn, args=(source, seed, stop)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    seen: list[Instant] = []
    with kept.recording():
        taken = captured.take(kept.driver)
        with client(source).client() as mine:
            mine.set("awaited", 1)
            mine.wait(1, 1)  # sends GETACK along
        for _ in range(3):
            time.sleep(0.7)
            seen.append(instant(client(source)))
        stop.set()
        for thread in threads:
            thread.join()
        seen.append(at_rest(client(source)))
        kept.wait_for(seen[-1].offset)
    log = kept.log()
    assert b"GETACK" in log and b"ping" in log.lower() and b"SWAPDB" in log and b"MULTI" in log
    for one in seen:
        fresh = services.container(
            bed.REDIS_IMAGE, ["redis-server", "--appendonly", "yes", *DIGESTS], start=False
        )
        home = engine.container(fresh.name)
        if one == seen[-1]:
            kept.restore(taken, one.at, home)
        else:  # the place is known exactly here; an anchor would lie somewhere before it
            kept.driver.load_to(taken, cut(kept, one.offset), None, home)
        copy = as_replica(services, home)
        assert instant(client(copy)).held == one.held
        copy.container.remove(force=True)


def cut(kept: Kept, position: int) -> Iterator[tuple[LogSpan, bytes]]:
    """The log up to a place, as if nothing more had been recorded."""
    for span, data in read_logs(kept.repository, kept.chain().spans):
        end = min(span.end, position)
        if end > span.start:
            known = tuple(anchor for anchor in span.anchors if anchor.position <= end)
            yield dataclasses.replace(span, end=end, anchors=known), data[: end - span.start]


@pytest.mark.parametrize("appendonly", ["no", "yes"])
def test_what_is_restored_outlives_restarts_however_the_server_persists(
    appendonly: str, services: bed.Services, engine: Engine
) -> None:
    """Append-only or not: the container is set as its maker set it, and what is written later stays too."""
    source = services.redis("--repl-diskless-sync-delay", "0", "--databases", "20")
    client(source, 17).set("before", "1")
    kept = Kept(driver_of(source))
    with kept.recording():
        taken = captured.take(kept.driver)
        client(source, 17).set("after", "2")
        client(source).rpush("list", *range(1000))
        kept.wait_for(int(client(source).info("replication")["master_repl_offset"]))
    argv = ["redis-server", "--databases", "20", "--appendonly", appendonly]
    fresh = services.container(bed.REDIS_IMAGE, argv, port=6379, start=False)
    home = engine.container(fresh.name)
    kept.restore(taken, None, home)
    assert not home.running
    fresh.host = "127.0.0.1"
    for turn in range(3):
        home.start()
        fresh.refresh_port(6379)
        bed.wait_until(lambda: bed.redis_answers(fresh), timeout=30, what="the restored server")
        assert client(fresh, 17).mget("before", "after") == [b"1", b"2"]
        assert client(fresh).llen("list") == 1000 + turn
        assert client(fresh).info("persistence")["aof_enabled"] == (appendonly == "yes")
        client(fresh).rpush("list", "later")
        client(fresh).save()
        if turn == 0:
            assert "holds_until" in kept.driver.recovered(home) or "as_of" in kept.driver.recovered(home)
            names = fresh.exec("ls", "-A", "/data").split()
            assert not [name for name in names if "restore" in name]
            with pytest.raises(RestoreFailed, match="already holds"):
                kept.restore(taken, None, home)
        home.stop()


# --- recording -------------------------------------------------------------------------------------------------


def test_the_stream_is_joined_without_any_dump(services: bed.Services) -> None:
    """A server that never had a replica is not made to fork; no replica stays when the recorder stops."""
    source = services.redis()  # with the delay that it has by itself: a dump is begun after five seconds
    kept = Kept(driver_of(source))
    with kept.recording():
        client(source).set("a", "1")
        kept.wait_for(int(client(source).info("replication")["master_repl_offset"]))
        (slave,) = [client(source).info("replication")["slave0"]]
        assert slave["port"] == 0 and slave["state"] == "online"
    assert client(source).info("stats")["total_forks"] == 0
    assert client(source).info("replication")["connected_slaves"] == 0
    assert b"$1\r\na\r\n$1\r\n1\r\n" in kept.log()


class Stuck:
    """A sink whose store is away until it is told."""

    def __init__(self, inner: LogWriter) -> None:
        self.inner, self.free, self.waiting = inner, threading.Event(), threading.Event()

    def piece(self, start: int, end: int, data: bytes) -> None:
        self.waiting.set()
        assert self.free.wait(60)
        self.inner.piece(start, end, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_store_that_is_away_holds_up_neither_the_server_nor_the_memory(services: bed.Services) -> None:
    """Beyond the bound the link is let go, and the rest waits in the backlog: it is all there at the end."""
    source = services.redis(*DIGESTS, "--repl-backlog-size", "32mb")
    kept, stop = Kept(driver_of(source)), threading.Event()
    sink = Stuck(kept.writer())
    at = RedisAddress(source.host, source.port)
    recorder = RedisRecorder(lambda: Connection(at), interval=INTERVAL, bound=1 << 20)
    thread = threading.Thread(target=recorder.record, args=(None, sink, stop))
    thread.start()
    bed.wait_until(lambda: bool(kept.begun), timeout=20, what="the recorder")
    client(source).set("first", "v")
    assert sink.waiting.wait(20)
    for n in range(80):
        client(source).set(f"k{n}", secrets.token_bytes(100_000))
    bed.wait_until(
        lambda: client(source).info("replication")["connected_slaves"] == 0, timeout=20, what="the link's end"
    )
    assert client(source).info("memory")["mem_clients_slaves"] == 0
    sink.free.set()
    kept.wait_for(int(client(source).info("replication")["master_repl_offset"]))
    stop.set()
    thread.join(20)
    log = kept.log()
    assert all(b"$%d\r\nk%d\r\n" % (len(str(n)) + 1, n) in log for n in range(80))
    assert not kept.reasons()


# --- rights, TLS, check ------------------------------------------------------------------------------------------


def rights() -> list[str]:
    """Those that the driver documents."""
    line = next(line for line in (redis_pitr.__doc__ or "").splitlines() if "SETUSER backupd" in line)
    return line.split("PASSWORD ")[1].split()


def test_the_documented_rights_are_enough_and_each_is_needed(services: bed.Services) -> None:
    """For check, the base and the log; without any one of them something is refused, with a hint."""
    source = services.redis(*DIGESTS)
    admin = client(source)
    admin.set("k", "v")
    with Connection(RedisAddress(source.host, source.port)) as plain:
        for _ in plain.dump()[1]:  # from here on there is a backlog
            pass

    def work(given: list[str]) -> None:
        admin.execute_command("ACL", "SETUSER", "backupd", "reset", "on", ">secret", *given)
        at = RedisAddress(source.host, source.port, username="backupd", password="secret")
        mine = RedisPitr(RedisDriver(RedisSettings(at)))
        problems = [problem for problem in mine.check() if problem.fatal]
        if problems:
            raise CaptureFailed(problems[0].message, hint=problems[0].hint)
        captured.take(mine)
        kept = Kept(mine)
        with kept.recording():
            kept.wait_for(int(admin.info("replication")["master_repl_offset"]))

    all_of_them = rights()
    work(all_of_them)
    for left_out in all_of_them[1:]:
        if left_out in ("+config|get", "+ping"):  # where it sees no settings it takes the usual ones
            continue
        with pytest.raises((CaptureFailed, RedisError), match="NOPERM") as failure:
            work([right for right in all_of_them if right != left_out])
        assert failure.value.hint


def test_over_tls(services: bed.Services, tmp_path: Path) -> None:
    """`rediss://`: base and log."""
    source, certificate = services.redis_over_tls(
        tmp_path, "--repl-diskless-sync-delay", "0", "--requirepass", "secret"
    )
    url = f"rediss://:secret@{source.host}:{source.port}?ssl_ca_certs={certificate}"
    at = RedisAddress.of_url(url)
    mine = RedisPitr(RedisDriver(RedisSettings(at)))

    def ready() -> bool:
        return not [problem for problem in mine.check() if problem.fatal]

    bed.wait_until(ready, timeout=20, what="Redis over TLS")
    kept = Kept(mine)
    with kept.recording(), Connection(at) as writer:
        taken = captured.take(mine)
        writer.call("SET", "key", "over tls")
        kept.wait_for(writer.moment().position)
    need = need_of(taken.point)
    assert need is not None and kept.chain().covers(need)
    assert b"over tls" in kept.log()


def test_check_tells_of_a_small_backlog_and_leaves_nothing(services: bed.Services) -> None:
    """A warning with its fix, and no replica, no dump."""
    source = services.redis()
    (problem,) = driver_of(source).check()
    assert not problem.fatal and "repl-backlog-size is 1024 KiB" in problem.message
    assert "64mb" in problem.hint
    client(source).config_set("repl-backlog-size", "64mb")
    assert driver_of(source).check() == []
    assert client(source).info("stats")["total_forks"] == 0
    assert client(source).info("replication")["connected_slaves"] == 0


def test_a_target_that_is_no_time_is_refused(services: bed.Services, engine: Engine) -> None:
    """And one before the base: before anything is written."""
    source = services.redis(*DIGESTS)
    mine = driver_of(source)
    taken = captured.take(mine)
    fresh = engine.container(services.container(bed.REDIS_IMAGE, start=False).name)
    with pytest.raises(RestoreFailed, match="knows no lsn"):
        mine.load_to(taken, iter(()), None, fresh, lsn="16/0")
    with pytest.raises(RestoreFailed, match="lies before"):
        mine.load_to(taken, iter(()), taken.point.instant - timedelta(seconds=1), fresh)
    assert not fresh.running


def test_a_replica_that_is_behind_what_is_stored_is_waited_for(start_valkey: StartService) -> None:
    """It was restarted with what it had on its disk, and its master brings it the rest: the same log, and no gap."""
    master = start_valkey("master")
    client(master).set("k", "v")
    replica = start_valkey("replica", "--replicaof", "127.0.0.1", str(master.port))
    bed.wait_until(lambda: client(replica).get("k") == b"v", timeout=20, what="the replica")
    about = client(replica).info("replication")
    end = about["slave_repl_offset"] + 10_000
    at = RedisAddress(replica.host, replica.port)
    stored = LogSpan("s", about["master_replid"], 0, end, None, 0)
    with pytest.raises(RedisError, match=f"its log is stored up to {end}"):
        join(lambda: Connection(at), stored)
    client(master).set("large", "v" * 10_000)
    bed.wait_until(lambda: client(replica).exists("large") == 1, timeout=20, what="the replica")
    joined = join(lambda: Connection(at), stored)
    with contextlib.closing(joined.link):
        assert (joined.position, joined.gap) == (end, "")


def test_a_position_that_is_gone_is_no_beginning(services: bed.Services) -> None:
    """Of another server, or of a history that was never this one's."""
    source = services.redis(*DIGESTS)
    at = RedisAddress(source.host, source.port)
    joined = join(lambda: Connection(at), LogSpan("s", "0" * 40, 0, 5000, None, 0))
    with contextlib.closing(joined.link):
        assert "no longer has what follows 5000" in joined.gap
        assert joined.epoch != "0" * 40
