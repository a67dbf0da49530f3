"""PostgreSQL to the second, on real servers: what a base and its log bring back, and what the recorder promises."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import services as bed
from captured import take

from backupd import backup
from backupd.archive import open_archive
from backupd.backup import back_up
from backupd.drivers import postgres_physical
from backupd.drivers.postgres_client import InContainer
from backupd.drivers.postgres_pace import BEHIND
from backupd.drivers.postgres_physical import PhysicalSource, PostgresPhysical
from backupd.drivers.postgres_place import lay_base
from backupd.drivers.postgres_recovery import Home as DataHome
from backupd.drivers.postgres_replication import Server, ServerRefused, position_text
from backupd.errors import CaptureFailed, Damaged, RestoreFailed
from backupd.model import Anchor, Archive, Container, LogSpan, RecoveryPoint, Silence
from backupd.repository import Repository
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.stores import MemoryStore

ENGINE = Engine()
INTERVAL = 0.2
DOUBT = timedelta(milliseconds=3)
"""A commit takes its time a moment before it is written: so close to the target it may be on either side."""


@dataclass
class Log:
    """A `model.LogSink` in memory. It fails by itself where the log has a hole."""

    spans: list[tuple[LogSpan, bytes]] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)
    broken: bool = False

    def claim(self, server: str) -> None:
        assert server

    def begin(self, epoch: str, position: int) -> None:
        self.begun.append((epoch, position))
        self.epoch, self.end = epoch, position

    def piece(self, start: int, end: int, data: bytes) -> None:
        if self.broken:
            raise ZeroDivisionError
        assert (start, len(data)) == (self.end, end - start)
        self.end = end
        newest = next((a for a in reversed(self.anchors) if a.position <= end), None)
        self.spans.append((LogSpan("s", self.epoch, start, end, newest, len(data)), data))

    def anchor(self, at: datetime, position: int) -> None:
        self.anchors.append(Anchor(at, position))

    def last(self, belongs: Callable[[str], bool]) -> LogSpan | None:
        return next((span for span, _ in reversed(self.spans) if belongs(span.epoch)), None)

    def tail(self, epoch: str, size: int) -> bytes:
        return self.bytes_from(self.end - size)

    def gap(self, reason: str) -> None:
        self.gaps.append(reason)

    @property
    def since(self) -> LogSpan | None:
        return self.spans[-1][0] if self.spans else None

    def read(self, point: Any) -> Iterator[tuple[LogSpan, bytes]]:
        """As a restore of this point gets it."""
        return (one for one in self.spans if one[0].end > point.attributes["start"])

    def bytes_from(self, position: int) -> bytes:
        """All from this position on."""
        return b"".join(d[max(0, position - s.start) :] for s, d in self.spans if s.end > position)


@contextlib.contextmanager
def recording(
    driver: PostgresPhysical, log: Log, *, interval: float = INTERVAL
) -> Iterator[threading.Thread]:
    """A recorder at work; what it raises comes out at the end."""
    stop, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            driver.recorder(interval=interval).record(log.since, log, stop)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        bed.wait_until(lambda: bool(log.anchors or failures), timeout=30, what="the recorder")
        yield thread
    finally:
        stop.set()
        thread.join(30)
        if failures:  # also where the test gave up waiting for what could not come
            raise failures[0]
    assert not thread.is_alive()


def connect(service: bed.Service, database: str = "app") -> psycopg.Connection[Any]:
    return psycopg.connect(
        host=service.host, port=service.port, user=service.user, password=service.password, dbname=database,
        autocommit=True,
    )  # fmt: skip


def one(service: bed.Service, question: str) -> Any:
    """The only value of an answer."""
    with connect(service) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row is not None
    return row[0]


def sql(container: Container, text: str, database: str = "app") -> str:
    """What psql prints in a restored server."""
    return b"".join(InContainer(container).run("psql", "-AtXc", text, database=database)).decode().strip()


def driver_of(
    service: bed.Service, name: str = "orders", *, image: str = bed.POSTGRES_IMAGE, **settings: Any
) -> PostgresPhysical:
    """By the network alone, as the role of the documentation."""
    server = Server({"host": service.host, "port": str(service.port), "user": "backup", "password": "secret"})
    return PostgresPhysical(PhysicalSource(name, lambda: server, lambda: image, **settings))


def prepare(service: bed.Service) -> None:
    """The role and the line of pg_hba.conf that the documentation gives."""
    text = postgres_physical.__doc__ or ""
    role = re.search(r"CREATE ROLE .*;", text)
    line = re.search(r"host replication .*", text)
    assert role
    assert line
    with connect(service) as connection:
        connection.execute(role[0].encode())
    service.exec("sh", "-c", f"echo '{line[0]}' >> $PGDATA/pg_hba.conf")
    one(service, "SELECT pg_reload_conf()")


Start = Callable[..., bed.Service]


@pytest.fixture
def start_server(services: bed.Services) -> Start:
    """Servers with the role of the documentation."""

    def start(*settings: str, **options: Any) -> bed.Service:
        command = ["postgres", "-c", "track_commit_timestamp=on"]
        for setting in settings:
            command += ["-c", setting]
        service = services.postgres(command=command, **options)
        prepare(service)
        return service

    return start


@pytest.fixture
def sandbox() -> Iterator[DockerSandbox]:
    """Its name is free; what is left of it is removed after the test."""
    made = DockerSandbox(ENGINE, f"test-{time.time_ns()}", labels=bed.labels())
    yield made
    made.destroy()


@pytest.fixture
def restore(sandbox: DockerSandbox) -> Callable[..., Container]:
    """Restores into fresh containers, as `restore` does it."""
    count = iter(range(99))

    def into_fresh(
        driver: PostgresPhysical, held: Archive, log: Log, at: datetime | None = None, **target: str
    ) -> Container:
        spec = driver.home(held.point)
        container = sandbox.create(f"pg{next(count)}", spec)
        driver.load_to(held, log.read(held.point), at, container, **target)
        container.start()
        sandbox.wait_ready(container, spec)
        return container

    return into_fresh


def wait_for_anchor(log: Log, after: datetime) -> None:
    """Until everything before this instant is stored."""
    bed.wait_until(
        lambda: any(a.at > after and a.position <= log.end for a in log.anchors[-20:]),
        timeout=30,
        what="the log",
    )


# --- exactness ----------------------------------------------------------------------------------------------


def test_a_restore_to_an_instant_holds_exactly_what_was_committed_by_then(
    start_server: Start, restore: Callable[..., Container]
) -> None:
    """While two clients write, and a base backup is taken meanwhile: for instants between, at a commit's very time,
    at the last commit and after it."""
    service = start_server()
    driver, log = driver_of(service), Log()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(id serial, who int, pad text)")
    stop = threading.Event()

    def write(who: int) -> None:
        with connect(service) as connection:
            while not stop.is_set():
                connection.execute("INSERT INTO t(who, pad) VALUES (%s, repeat('x', 200))", [who])
                time.sleep(0.001)

    with recording(driver, log):
        writers = [threading.Thread(target=write, args=[who]) for who in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.5)
        held = take(driver)
        time.sleep(2)
        stop.set()
        for writer in writers:
            writer.join()
        with connect(service) as connection:
            rows = connection.execute(
                "SELECT id, pg_xact_commit_timestamp(xmin) FROM t ORDER BY 2"
            ).fetchall()
            now = datetime.now(UTC)
        wait_for_anchor(log, now)
    commits = {number: at.astimezone(UTC) for number, at in rows}
    inside = [at for at in commits.values() if at > held.point.instant]
    assert len(inside) > 200
    assert held.point.warnings == ()
    targets = [
        inside[len(inside) // 3],
        inside[len(inside) // 2] + timedelta(microseconds=1),
        inside[-1],
        now,
    ]
    for at in targets:
        container = restore(driver, held, log, at)
        found = {int(line) for line in sql(container, "SELECT id FROM t").split()}
        wrong = found ^ {number for number, committed in commits.items() if committed <= at}
        assert all(abs(commits[number] - at) <= DOUBT for number in wrong), at
        told = driver.recovered(container)
        assert datetime.fromisoformat(str(told["last_commit"])) <= at
        assert (told["first_left_out"] is None) == (at >= inside[-1])
    with pytest.raises(RestoreFailed, match="consistent"):
        restore(driver, held, log, held.point.instant - timedelta(milliseconds=1))


@pytest.mark.parametrize("way", ["into its volume", "through the engine"])
def test_a_cluster_comes_back_whole(
    way: str, start_server: Start, restore: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its tablespace, its configuration and its passwords; every page and index is sound; the sandbox's server
    archives nothing, and the copy is writable, on a timeline of its own."""
    if way == "through the engine":
        monkeypatch.setattr(postgres_physical, "reached", lambda *_: None)
    else:
        monkeypatch.setattr(
            postgres_physical, "whole_tar", lambda *_: pytest.fail("its volume was not reached")
        )
    service = start_server(
        "archive_mode=on", "archive_command=touch /tmp/archived", "max_prepared_transactions=4"
    )
    service.exec("sh", "-c", "install -d -o postgres /var/lib/postgresql/spaced")
    driver, log = driver_of(service), Log()
    with connect(service) as connection:
        for text in (
            "CREATE EXTENSION amcheck",
            "ALTER SYSTEM SET work_mem = '9MB'",
            "CREATE TABLESPACE fast LOCATION '/var/lib/postgresql/spaced'",
            "CREATE TABLE spaced(n int PRIMARY KEY) TABLESPACE fast",
            "INSERT INTO spaced SELECT generate_series(1, 30000)",
            "CREATE TABLE plain AS SELECT g AS n, md5(g::text) FROM generate_series(1, 30000) g",
            "BEGIN; INSERT INTO plain VALUES (-1, 'prepared'); PREPARE TRANSACTION 'two'",
        ):
            connection.execute(text.encode())
    with recording(driver, log):
        held = take(driver)
        with connect(service) as connection:
            connection.execute("CREATE TABLE later(n int) TABLESPACE fast")
            connection.execute("INSERT INTO later VALUES (1)")
        wait_for_anchor(log, datetime.now(UTC))
    container = restore(driver, held, log)
    counted = (
        "SELECT (SELECT count(*) FROM spaced), (SELECT count(*) FROM plain), (SELECT count(*) FROM later)"
    )
    assert sql(container, counted) == "30000|30000|1"
    assert sql(
        container, "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'"
    ).endswith(
        "backupd_tablespaces/" + str(next(iter(held.point.attributes["tablespaces"])))  # type: ignore[arg-type]
    )
    assert sql(container, "SELECT current_setting('work_mem'), current_setting('archive_mode')") == "9MB|off"
    assert sql(container, "SELECT gid FROM pg_prepared_xacts") == "two"
    assert sql(container, "SELECT timeline_id FROM pg_control_checkpoint()") == "2"
    sql(container, "SELECT bt_index_parent_check('spaced_pkey', true)")
    sql(container, "INSERT INTO plain VALUES (0, 'new')")
    client = ["psql", "-h", "127.0.0.1", "-U", "postgres", "-d", "app", "-Atc", "SELECT 1"]
    assert b"".join(container.exec(client, env={"PGPASSWORD": service.password})) == b"1\n"
    with pytest.raises(RestoreFailed, match="already holds data"):
        driver.load_to(held, log.read(held.point), None, container)


def test_a_base_that_cannot_be_laid_leaves_nothing(tmp_path: Path) -> None:
    class Torn:
        def extract(self, into: Path) -> list[str]:
            (into / "base").mkdir(parents=True)
            raise Damaged("content is not what was written")

    with pytest.raises(Damaged):
        lay_base(Torn(), DataHome("/pg", "/pg", 999, 999), {}, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_restore_goes_to_a_name_a_transaction_or_a_position(
    start_server: Start, restore: Callable[..., Container]
) -> None:
    service = start_server()
    driver, log = driver_of(service), Log()
    one(service, "SELECT set_config('a.b', '', false)")
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(n int)")
    with recording(driver, log):
        held = take(driver)
        with connect(service) as connection:
            connection.execute("INSERT INTO t VALUES (1)")
            connection.execute("SELECT pg_create_restore_point('before the deed')")
            xid = connection.execute("INSERT INTO t VALUES (2) RETURNING xmin::text").fetchone()
            lsn = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            connection.execute("INSERT INTO t VALUES (3)")
            connection.execute("INSERT INTO t VALUES (4)")
        wait_for_anchor(log, datetime.now(UTC))
    assert xid
    assert lsn
    highest = "SELECT max(n) FROM t"
    assert sql(restore(driver, held, log, name="before the deed"), highest) == "1"
    assert sql(restore(driver, held, log, xid=xid[0]), highest) == "2"
    assert sql(restore(driver, held, log, lsn=lsn[0]), highest) == "2"
    assert sql(restore(driver, held, log, lsn=position_text(log.end)), highest) == "4"


def test_a_restore_across_timelines_follows_the_log_it_is_given(
    start_server: Start, restore: Callable[..., Container], services: bed.Services
) -> None:
    """A standby is recorded, and promoted meanwhile: the recorder goes on with the new timeline without a gap."""
    primary = start_server()
    with connect(primary) as connection:
        connection.execute("CREATE TABLE t(n int)")
        connection.execute("INSERT INTO t VALUES (1)")
    script = (
        f"rm -rf $PGDATA/*; PGPASSWORD=secret pg_basebackup -h {primary.address} -U backup -D $PGDATA -R -X stream "
        "-c fast && chown -R postgres $PGDATA && chmod 700 $PGDATA && exec docker-entrypoint.sh postgres"
    )
    library = {
        "LD_LIBRARY_PATH": "/usr/lib/postgresql/16/lib"
    }  # where the stand-in's walreceiver finds libpq
    standby = services.container(bed.POSTGRES_IMAGE, ["sh", "-c", script], port=5432, env=library)
    standby.user, standby.password, standby.db = "postgres", "secret", "app"
    bed.wait_until(lambda: bool(bed.postgres_version(standby)), timeout=60, what="the standby")
    driver, log = driver_of(standby), Log()
    with recording(driver, log):
        with connect(primary) as connection:
            connection.execute("INSERT INTO t VALUES (2)")
        bed.wait_until(
            lambda: one(standby, "SELECT count(*) FROM t") == 2,
            timeout=20,
            what="the standby",
            details=lambda: standby.container.logs(tail=30).decode(),
        )
        held = take(driver)
        one(standby, "SELECT pg_promote()")
        with connect(standby) as connection:
            connection.execute("INSERT INTO t VALUES (3)")
        wait_for_anchor(log, datetime.now(UTC))
    (first, _), (second, begins) = log.begun
    assert (first[-2:], second[-2:]) == ("-1", "-2")
    assert log.gaps == []
    assert any(span.end == begins and span.epoch == first for span, _ in log.spans)
    assert sql(restore(driver, held, log), "SELECT max(n) FROM t") == "3"


def test_a_replay_that_stands_still_is_given_up_and_says_where(
    start_server: Start, sandbox: DockerSandbox
) -> None:
    """It is held up for good at the first commit behind the base."""
    service = start_server()
    driver, log = driver_of(service), Log()
    with recording(driver, log):
        held = take(driver)
        with connect(service) as connection:
            connection.execute("CREATE TABLE t AS SELECT repeat('x', 500) FROM generate_series(1, 60000)")
        wait_for_anchor(log, datetime.now(UTC))
    spec = replace(driver.home(held.point), command=("postgres", "-c", "recovery_min_apply_delay=1h"))
    container = sandbox.create("pg", spec)
    driver.load_to(held, log.read(held.point), None, container)
    assert driver.starting(container) == ""
    container.start()
    with pytest.raises(RestoreFailed, match=r"stood still for 3 s, replayed \d+ of \d\d MB of the log, "):
        sandbox.wait_ready(container, spec, timeout=3, moving=lambda: driver.starting(container))


# --- the recorder ----------------------------------------------------------------------------------------------


def test_a_recorder_that_is_killed_goes_on_to_the_byte(start_server: Start) -> None:
    """Twice, in the middle of a piece; what it had not stored is sent again. Another slot tells what there was."""
    service = start_server()
    whole, cut = Log(), Log()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(pad text)")
    with recording(driver_of(service, "whole"), whole):
        for _ in range(3):
            cut.broken, before = False, len(cut.spans)
            with contextlib.suppress(ZeroDivisionError), recording(driver_of(service, "cut"), cut):
                with connect(service) as connection:
                    connection.execute("INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 20000)")
                bed.wait_until(lambda n=before: len(cut.spans) > n, timeout=20, what="a piece")  # type: ignore[misc]
                cut.broken = True
                with connect(service) as connection:
                    connection.execute("INSERT INTO t SELECT repeat('y', 500) FROM generate_series(1, 20000)")
        cut.broken = False
        with recording(driver_of(service, "cut"), cut):
            wait_for_anchor(cut, datetime.now(UTC))
        wait_for_anchor(whole, datetime.now(UTC))
    assert cut.gaps == []
    start = max(whole.begun[0][1], cut.begun[0][1])
    length = min(whole.end, cut.end) - start
    assert length > 50_000_000
    assert cut.bytes_from(start)[:length] == whole.bytes_from(start)[:length]
    assert all(len(data) <= 9 << 20 for _, data in whole.spans)


def test_a_log_that_fell_behind_is_caught_up_slowly_and_to_the_byte(start_server: Start) -> None:
    """At a bound so low that it is not done by then, and is told to stop meanwhile. Without one it is done."""
    service = start_server()
    log = Log()
    with recording(driver_of(service, max_rate=4), log):
        wait_for_anchor(log, datetime.now(UTC))
    with connect(service) as connection:
        connection.execute("CREATE TABLE t AS SELECT repeat('x', 500) FROM generate_series(1, 400000)")
    before = len(log.anchors)
    with recording(driver_of(service, max_rate=4), log):
        bed.wait_until(lambda: len(log.anchors) > before + 8, timeout=30, what="anchors")
        assert log.end < log.anchors[-1].position - BEHIND
    with recording(driver_of(service), log):
        wait_for_anchor(log, datetime.now(UTC))
    assert log.gaps == []


def test_nothing_is_stored_while_nothing_changes_and_the_anchors_move_on(start_server: Start) -> None:
    service = start_server()
    log = Log()
    with recording(driver_of(service), log):
        one(service, "SELECT pg_switch_wal()::text")
        with connect(service) as connection:
            connection.execute("CHECKPOINT")
        wait_for_anchor(log, datetime.now(UTC))
        time.sleep(1)
        stored = len(log.spans)
        time.sleep(2)
        assert len(log.spans) == stored
        wait_for_anchor(log, datetime.now(UTC) - timedelta(seconds=1))
        held = one(service, "SELECT (restart_lsn - '0/0')::bigint FROM pg_replication_slots")
        assert held == log.end
    ats = [anchor.at for anchor in log.anchors]
    assert ats == sorted(ats)


def test_a_base_does_not_wait_out_the_interval_of_its_log(start_server: Start) -> None:
    """What it needs is stored as soon as it has come, by a recorder that would keep it an hour; the rest waits."""
    service = start_server()
    driver, log = driver_of(service), Log()
    with recording(driver, log, interval=3600):
        end = take(driver).point.attributes["end"]
        bed.wait_until(lambda: log.end >= end, timeout=60, what="the log of the base")
        stored = len(log.spans)
        with connect(service) as connection:
            connection.execute("SELECT pg_notify('backupd_orders', 'nonsense')")
            connection.execute("CREATE TABLE t(n int)")
        anchors = len(log.anchors)
        bed.wait_until(lambda: len(log.anchors) > anchors + 2, timeout=60, what="anchors")
        assert len(log.spans) == stored


def test_a_lost_slot_is_a_gap_and_recording_goes_on_behind_it(start_server: Start) -> None:
    """Dropped by somebody, and the log it held removed."""
    service = start_server("wal_keep_size=0", "max_wal_size=32MB", "min_wal_size=32MB")
    driver, log = driver_of(service), Log()
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(n int)")
    with recording(driver, log):
        wait_for_anchor(log, datetime.now(UTC))
    end = log.end
    with connect(service) as connection:
        connection.execute("SELECT pg_drop_replication_slot('backupd_orders')")
        for number in range(5):
            connection.execute("INSERT INTO t VALUES (%s)", [number])
            connection.execute("SELECT pg_switch_wal()")
        connection.execute("CHECKPOINT")
        connection.execute("CHECKPOINT")
    log.anchors.clear()
    log.spans = [one for one in log.spans if one[0].end <= end]
    with recording(driver, log):
        with connect(service) as connection:
            connection.execute("INSERT INTO t VALUES (99)")
        wait_for_anchor(log, datetime.now(UTC))
    assert len(log.gaps) == 1
    assert "already been removed" in log.gaps[0]
    assert log.begun[-1][1] > end


# --- in a repository ------------------------------------------------------------------------------------------


def test_a_second_base_stores_little_and_both_come_back(
    start_server: Start, restore: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relation files are cut at their pages: what did not change is not stored again."""
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)  # the log is held in memory, not in that repository
    service = start_server()
    driver, log = driver_of(service), Log()
    repository = Repository.create(MemoryStore(), clock=lambda: datetime.now(UTC))

    def back_up_now() -> RecoveryPoint:
        run = back_up(
            "orders",
            driver,
            repository,
            clock=lambda: datetime.now(UTC),
            progress=Silence(),
            stop=threading.Event(),
        )
        return repository.find(run.point)

    with connect(service) as connection:
        connection.execute("CREATE TABLE t AS SELECT g AS n, md5(g::text) FROM generate_series(1, 200000) g")
        connection.execute("VACUUM FREEZE t")  # else the first to read it writes its hint bits everywhere
    with recording(driver, log):
        first = back_up_now()
        with connect(service) as connection:
            connection.execute("UPDATE t SET md5 = 'changed' WHERE n = 777")
        second = back_up_now()
        wait_for_anchor(log, datetime.now(UTC))
    assert first.size > 30_000_000
    assert second.stored < first.stored / 20
    changed = "SELECT count(*), count(*) FILTER (WHERE md5 = 'changed') FROM t"
    for point, at, expected in ((first, first.instant, "200000|0"), (second, None, "200000|1")):
        assert sql(restore(driver, open_archive(repository, point), log, at), changed) == expected


# --- what must fail -----------------------------------------------------------------------------------------


def test_a_damaged_page_fails_the_base_backup(start_server: Start) -> None:
    """The server verifies what it sends, where the cluster has checksums."""
    service = start_server(env={"POSTGRES_INITDB_ARGS": "--data-checksums"})
    with connect(service) as connection:
        connection.execute("CREATE TABLE t AS SELECT generate_series(1, 10000) n")
        connection.execute("CHECKPOINT")
    path = one(service, "SELECT pg_relation_filepath('t')")
    service.exec("sh", "-c", f"printf x | dd of=$PGDATA/{path} bs=1 seek=12345 conv=notrunc")
    with pytest.raises(CaptureFailed, match=rf"damaged pages.*{path}") as failure:
        take(driver_of(service))
    assert "server's log" in failure.value.hint
    assert take(driver_of(service, verify=False)).point.attributes["checksums"] is True


def test_check_tells_what_a_server_lacks(start_postgres: Start) -> None:
    """Each with what to do: the rights, the line of pg_hba.conf, the limit of the slot, a standby by accident."""
    service = start_postgres(
        command=["postgres", "-c", "synchronous_standby_names=*", "-c", "synchronous_commit=local"]
    )
    with connect(service) as connection:
        connection.execute("CREATE ROLE backup LOGIN PASSWORD 'secret'")
    found = {problem.message: problem for problem in driver_of(service).check()}
    assert any("may not replicate" in message for message in found)
    assert any("max_slot_wal_keep_size" in message for message in found)
    assert any("synchronous_standby_names" in message for message in found)
    assert [problem.message for problem in found.values() if problem.fatal] == [
        "the role backup may not replicate"
    ]
    with connect(service) as connection:
        connection.execute("ALTER ROLE backup REPLICATION")
    (problem,) = driver_of(service).check()
    assert "pg_hba.conf" in problem.hint
    assert "host replication" in problem.hint
    with pytest.raises(CaptureFailed, match="no pg_hba"):
        take(driver_of(service))


def test_a_second_recorder_of_a_source_is_refused(start_server: Start) -> None:
    """Two agents would tear one log into two."""
    service = start_server()
    with recording(driver_of(service), Log()), pytest.raises(ServerRefused, match="is active for PID"):
        driver_of(service).recorder(interval=INTERVAL).record(None, Log(), threading.Event())


def test_a_base_without_its_log_is_not_restored(
    start_server: Start, restore: Callable[..., Container]
) -> None:
    service = start_server()
    driver = driver_of(service)
    held = take(driver)
    assert "nothing records the log" in held.point.warnings[0]
    with pytest.raises(RestoreFailed, match="log is not there"):
        restore(driver, held, Log())
