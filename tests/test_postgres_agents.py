"""Real servers and the agents around them: who may have the slot, what it keeps, which branch of a history is whose."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import services as bed
from commands import Home
from test_postgres_physical import ENGINE, Start, connect, driver_of, one, sql, start_server
from test_postgres_to_the_second import serving, window_end

from backupd import backup
from backupd.agent.recording import RecorderState, Recordings
from backupd.archive import open_archive
from backupd.backup import back_up
from backupd.chain import chains
from backupd.drivers._tarstream import END
from backupd.drivers.postgres_physical import PhysicalSource, PostgresPhysical
from backupd.drivers.postgres_recovery import Home as DataHome
from backupd.drivers.postgres_recovery import Replayed, wal_files
from backupd.drivers.postgres_replication import Server
from backupd.errors import NoRecoveryPoint
from backupd.logs import read_logs
from backupd.model import Container, RecoveryPoint, Silence
from backupd.plan import LATEST, Step, plan_restore, windows
from backupd.repository import Repository
from backupd.retained import worry
from backupd.sandbox.docker import DockerSandbox
from backupd.stores import MemoryStore
from backupd.verify import verify

__all__ = ["start_server"]  # the fixture

MIB = 1 << 20


SERVED = """
mode = "pitr"
log_interval = "300ms"
[serve]
listen = "127.0.0.1:{free}"
prune_schedule = "never"
verify_schedule = "never"
"""
URL = (
    """
[repository]
location = "{repository}"
[sources.orders]
driver = "postgres"
url = "postgresql://backup:secret@{host}:{port}/postgres"
"""
    + SERVED
)
NAMED = (
    """
[repository]
location = "repo"
[sources.orders]
driver = "postgres"
container = "{name}"
user = "backup"
password = "secret"
"""
    + SERVED
)


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Protected:
    """A repository, and what an agent does with it; several may."""

    repository: Repository = field(default_factory=lambda: Repository.create(MemoryStore(), clock=now))

    @contextmanager
    def recording(self, driver: PostgresPhysical) -> Iterator[Callable[[], RecorderState]]:
        """An agent's recorder. When it is left, all that was acknowledged is stored."""
        with Recordings(
            {"orders": timedelta(seconds=0.2)}, driver=lambda _: driver, repository=lambda: self.repository,
            clock=now, pause=0.1, look_every=0.2,
        ) as made:  # fmt: skip
            yield lambda: made.states()[0]

    def base(self, driver: PostgresPhysical) -> RecoveryPoint:
        run = back_up(
            "orders", driver, self.repository, clock=now, progress=Silence(), stop=threading.Event()
        )
        return self.repository.find(run.point)

    def step(self, at: datetime) -> Step:
        """What is planned for this instant."""
        logs = chains(*self.repository.logs("orders"))
        (step,) = plan_restore(self.repository.points(), at, ["orders"], logs=logs).steps
        return step

    def restore(
        self,
        at: datetime,
        sandbox: DockerSandbox,
        name: str,
        beside: Sequence[tuple[str, bytes | bytearray]] = (),
    ) -> Container:
        """As planned, into a fresh container; `beside` are files in its `pg_wal`."""
        step = self.step(at)
        driver = PostgresPhysical(PhysicalSource("orders", lambda: Server({})))
        spec = driver.home(step.point)
        container = sandbox.create(name, spec)
        pieces = read_logs(self.repository, step.logs)
        driver.load_to(open_archive(self.repository, step.point), pieces, step.replay_to, container)
        wal = "/var/lib/postgresql/data/pg_wal"
        container.write(wal, [*DataHome(wal, wal, 999, 999).files(beside), END])
        container.start()
        sandbox.wait_ready(container, spec)
        return container

    def wal_of_all(self) -> list[tuple[str, bytes | bytearray]]:
        """The newest branch, as an archive of WAL would have it."""
        point = self.step(LATEST).point
        history = str(point.attributes["timeline_history"]).encode()
        (chain,) = (
            c for c in chains(*self.repository.logs("orders")) if c.epoch == point.attributes["epoch"]
        )
        segments = wal_files(read_logs(self.repository, chain.spans), point, Replayed(None))
        copies = [(name, bytes(content)) for name, content in segments]  # each is ours until the next
        return [(f"{point.attributes['timeline']:08X}.history", history), *copies]

    def sound(self) -> bool:
        return verify(self.repository, sources=None, data_percent=100, progress=Silence()).problems == []


@pytest.fixture
def protected() -> Protected:
    return Protected()


@pytest.fixture
def sandbox() -> Iterator[DockerSandbox]:
    made = DockerSandbox(ENGINE, f"test-{time.time_ns()}", labels=bed.labels())
    yield made
    made.destroy()


def until(true: Callable[[], object], what: str) -> None:
    bed.wait_until(lambda: bool(true()), timeout=30, what=what)


def put(service: bed.Service, *numbers: int) -> None:
    with connect(service) as connection:
        for number in numbers:
            connection.execute("INSERT INTO t VALUES (%s)", [number])


def table(service: bed.Service) -> None:
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(n int)")


def rows(container: Container) -> list[int]:
    return sorted(map(int, sql(container, "SELECT n FROM t").split()))


# --- two agents ------------------------------------------------------------------------------------------------


def test_of_two_agents_one_records_and_the_other_takes_over_when_it_goes(
    start_server: Start, protected: Protected
) -> None:
    """The slot has room for one. The second is refused before it writes anything, and says so; no piece of the log
    is torn, doubled or missing afterwards."""
    service = start_server()
    table(service)
    driver = driver_of(service)
    with protected.recording(driver) as first:
        until(lambda: first().state == "recording", "the first")
        put(service, 1)
        with protected.recording(driver_of(service)) as second:
            until(lambda: second().failures > 2, "its refusals")
            assert (second().state, "is active for PID" in second().error) == ("failing", True)
            assert first().state == "recording"
            base = protected.base(driver)
            put(service, 2)
    with protected.recording(driver_of(service)) as second:
        until(lambda: second().state == "recording", "the second")
        put(service, 3)
    spans, marks = protected.repository.logs("orders")
    assert marks == []
    (chain,) = chains(spans)
    ordered = sorted((span for span in spans if span.start < span.end), key=lambda span: span.start)
    assert all(one.end == other.start for one, other in itertools.pairwise(ordered))
    assert base.warnings == ()
    assert chain.reach
    assert protected.sound()


def test_an_agent_that_stood_still_while_another_took_over_tears_nothing(
    start_server: Start, tmp_path: Path
) -> None:
    """Two hosts with one repository. The server drops who does not answer; when that one wakes up, it may store what
    it had received, which the other has stored, too."""
    service = start_server("wal_sender_timeout=2s")
    table(service)
    homes = [Home(tmp_path / name) for name in ("one", "other")]
    for home in homes:
        home.path.mkdir()
        home.configure(
            URL.format(
                repository=tmp_path / "repo", host=service.host, port=service.port, free=bed.free_ports(1)[0]
            )
        )
    one_home, other_home = homes
    one_home.ok("init")

    def is_held_by(pid: object) -> bool:
        return bool(one(service, "SELECT active_pid FROM pg_replication_slots") == pid)

    with serving(one_home) as first:
        until(lambda: window_end(one_home).year > 1, "a window")
        put(service, *range(100))
        sender = one(service, "SELECT active_pid FROM pg_replication_slots")
        first.send_signal(signal.SIGSTOP)
        put(service, *range(100, 200))  # on its way to the first
        with serving(other_home) as second:
            until(lambda: not is_held_by(sender) and not is_held_by(None), "the second")
            put(service, *range(200, 300))
            first.send_signal(signal.SIGCONT)
            time.sleep(2)
            put(service, *range(300, 400))
            time.sleep(1)
            second.terminate()
            assert second.wait(timeout=30) == 0
        until(lambda: not is_held_by(None), "the first again")
        put(service, *range(400, 500))
        time.sleep(1)
        first.terminate()
        assert first.wait(timeout=30) == 0
    one_home.ok("verify", "--data", "100%")
    assert len(one_home.ok("window", "orders", "--json").json["orders"]["continuous"]) == 1
    name = f"two-{time.time_ns()}"
    try:
        one_home.ok("restore", "--at", "latest", "orders", "--name", name)
        assert rows(ENGINE.container(f"backupd-{name}-orders")) == list(range(500))
    finally:
        one_home.run("sandbox", "remove", name)


# --- what the slot keeps ----------------------------------------------------------------------------------------


def test_what_the_slot_keeps_is_seen_while_nobody_records_and_when_it_is_lost(
    start_server: Start, protected: Protected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shrinks once the log is stored. When it was given up, the recorder closes the window and goes on."""
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)
    service = start_server(
        "max_slot_wal_keep_size=64MB", "max_wal_size=32MB", "min_wal_size=32MB", "wal_keep_size=0"
    )
    driver = driver_of(service)
    assert driver.retained() is None
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(pad text)")

    def fill(mebibytes: int) -> None:
        with connect(service) as connection:
            for _ in range(mebibytes):
                connection.execute("INSERT INTO t SELECT repeat('x', 1000) FROM generate_series(1, 950)")
            connection.execute("CHECKPOINT")

    with protected.recording(driver) as state:
        until(lambda: state().retained, "the first look")
        assert worry(state().retained) == ""
    fill(60)
    held = driver.retained()
    assert held
    assert held.size > 50 * MIB
    assert "gives it up after" in worry(held)
    assert "gives it up after" in driver.check()[-1].message
    with protected.recording(driver) as state:
        until(lambda: (found := state().retained) and found.size < 8 * MIB, "a slot that let go")
        assert state().worry == ""
    fill(90)
    lost = driver.retained()
    assert lost
    assert lost.lost
    assert "gave up" in worry(lost)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording" and not state().worry, "a new stretch")
    assert len([mark for mark in protected.repository.logs("orders")[1] if not mark.after]) == 1


# --- branches ----------------------------------------------------------------------------------------------------


def test_a_restored_server_that_is_put_in_place_is_a_branch_of_its_own(
    start_server: Start, protected: Protected, sandbox: DockerSandbox
) -> None:
    """What the first server did after the instant it was set back to stays there to be restored: each instant on the
    branch that was live then, though the newer one is in the same repository."""
    service = start_server()
    table(service)
    driver = driver_of(service)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording", "the recorder")
        protected.base(driver)
        put(service, 1, 2)
        time.sleep(0.05)
        good = now()
        time.sleep(0.05)
        put(service, 3, 4)  # the mistake
        time.sleep(0.05)
        mistaken = now()
        until(lambda: (reach := state().reach) and reach > mistaken, "an anchor behind it")
        restored = protected.restore(good, sandbox, "again")
        assert rows(restored) == [1, 2]
        host, port = restored.address(5432)
        again = bed.Service(
            service.container, restored.name, host, port, user="postgres", password=service.password, db="app"
        )
        driver = driver_of(again)
        with protected.recording(driver) as second:  # while the first one lives
            until(lambda: second().failures > 1, "its refusal")
            assert "another server is recorded as orders now" in second().error
        assert protected.repository.logs("orders")[1] == []
    service.container.stop()
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording", "the recorder of the second server")
        assert "left timeline 1" in state().error
        put(again, 5)
        base = protected.base(driver)
        put(again, 6)
        last = now()
        until(lambda: (reach := state().reach) and reach > last, "an anchor behind all of it")
    assert base.attributes["timeline"] == 2
    logs = chains(*protected.repository.logs("orders"))
    window = windows(protected.repository.points(), logs)["orders"]
    assert len(window.bars) == 2
    with pytest.raises(NoRecoveryPoint, match="hole"):
        plan_restore(
            protected.repository.points(), base.instant - timedelta(seconds=0.01), ["orders"], logs=logs
        )
    # The newer branch beside it does not lead it away; PostgreSQL's default would follow that one.
    abandoned = protected.restore(mistaken, sandbox, "mistaken", beside=protected.wal_of_all())
    assert rows(abandoned) == [1, 2, 3, 4]
    assert rows(protected.restore(LATEST, sandbox, "latest")) == [1, 2, 5, 6]
    assert protected.sound()


def test_a_server_that_is_back_after_another_cluster_had_its_place_goes_on(
    start_server: Start, protected: Protected
) -> None:
    """An upgrade that was given up. Each has its own part of the window, from a base of its own on."""
    old, new = start_server(), start_server()
    for service in (old, new):
        table(service)
    with protected.recording(driver_of(old)) as state:
        until(lambda: state().state == "recording", "the recorder")
        protected.base(driver_of(old))
    put(old, 1)  # meanwhile nobody records it; its slot keeps it
    for service in (new, old):
        driver = driver_of(service)
        with protected.recording(driver) as state:
            until(lambda: state().state == "recording", "the next recorder")
            protected.base(driver)
            put(service, 2)
            time.sleep(0.5)
    points = sorted(protected.repository.points(), key=lambda point: point.instant)
    epochs = [str(point.attributes["epoch"]) for point in points]
    assert epochs[0] == epochs[2] != epochs[1]
    window = windows(points, chains(*protected.repository.logs("orders")))["orders"]
    assert len(window.bars) == 3
    for reach, point in zip(window.reaches, points, strict=True):
        assert (
            {part.epoch for part in reach.chain.parts} == {point.attributes["epoch"]}
            if reach.chain
            else False
        )
    assert protected.sound()


def test_a_server_that_was_set_back_on_its_own_timeline_is_never_mixed_with_what_it_was(
    start_server: Start, protected: Protected
) -> None:
    """A snapshot of its disk was put back: the same positions hold other bytes now. It is refused until it is
    promoted, also once it has come as far as it was; then a new stretch begins."""
    service = start_server()
    table(service)
    driver = driver_of(service)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording", "the recorder")
        put(service, 1)
    data = "/var/lib/postgresql/data"
    one(service, "SELECT pg_switch_wal()::text")
    # Files go while they are copied: then once more.
    snapshot = f"psql -U postgres -Atc CHECKPOINT; until rm -rf /snapshot && cp -a {data} /snapshot; do sleep 0.2; done"
    service.exec("sh", "-c", snapshot)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording", "the recorder")
        put(service, *range(100))
        time.sleep(0.5)
    before = protected.repository.logs("orders")
    end = max(span.end for span in before[0])

    swap = f"[ ! -e /set-back ] || {{ rm -rf {data}/* && cp -a /snapshot/* {data} && rm /set-back; }}"
    service.exec("sh", "-c", 'sed -i "1a $SWAP" $(command -v docker-entrypoint.sh)', env={"SWAP": swap})

    def set_back() -> None:
        """While it stands: a server from under which its files are taken ends in the middle."""
        service.exec("touch", "/set-back")
        service.container.kill()
        service.container.start()
        service.refresh_port(5432)
        until(lambda: bed.postgres_version(service), "the server of before")

    def write_beyond(end: int) -> None:
        while one(service, "SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint") <= end:
            put(service, *range(1000, 1100))
            one(service, "SELECT pg_switch_wal()::text")
        put(service, *range(1000, 1100))

    set_back()
    driver = driver_of(service)
    with protected.recording(driver) as state:
        until(lambda: state().failures > 1, "its refusal")
        assert "before what was recorded of it" in state().error
        write_beyond(end)
        failures = state().failures
        until(lambda: state().failures > failures + 1, "its refusal further on")
        assert state().state == "failing"
        assert "has another log before" in state().error
    assert protected.repository.logs("orders") == before
    service.exec("touch", f"{data}/standby.signal", user="postgres")
    service.container.restart()
    service.refresh_port(5432)
    until(lambda: bed.postgres_version(service), "the standby")
    one(service, "SELECT pg_promote()")
    driver = driver_of(service)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording" and state().epoch.endswith("-2"), "the new timeline")
        protected.base(driver)
        put(service, 2000)
    assert protected.sound()
    # Once more, where what was recorded ends with a segment: nothing of the next one tells anything yet.
    service.exec("sh", "-c", snapshot)
    with protected.recording(driver) as state:
        until(lambda: state().state == "recording", "the recorder")

        def ends_with_a_segment() -> bool:
            put(service, 3000)
            one(service, "SELECT pg_switch_wal()::text")
            time.sleep(0.5)  # the server may write something by itself meanwhile: then once more
            return state().position % (16 * MIB) == 0

        until(ends_with_a_segment, "the segment's end")
    before = protected.repository.logs("orders")
    set_back()
    write_beyond(max(span.end for span in before[0]))
    with protected.recording(driver_of(service)) as state:
        until(lambda: state().failures > 1, "its refusal behind the segment")
        assert "has another log before" in state().error
    assert protected.repository.logs("orders") == before


# --- by the container's name ----------------------------------------------------------------------------------------


def test_a_container_is_recorded_and_restored_by_its_name(start_server: Start, tmp_path: Path) -> None:
    """Wherever the engine publishes its port. No schedule: the base is made when recording begins."""
    service = start_server()
    table(service)
    home = Home(tmp_path)
    home.configure(NAMED.format(name=service.name, free=bed.free_ports(1)[0]))
    home.ok("init")
    home.ok("check")
    with serving(home) as agent:
        until(lambda: window_end(home).year > 1, "a window")
        put(service, 1, 2)
        time.sleep(0.05)
        at = now()
        time.sleep(0.05)
        put(service, 3)
        time.sleep(0.5)  # an anchor behind it
        (told,) = home.ok("status", "--json").json
        assert told["retained"]["size"] < 16 * MIB
        agent.terminate()
        assert agent.wait(timeout=60) == 0
    name = f"by-name-{time.time_ns()}"
    try:
        home.ok("restore", "--at", at.isoformat(), "orders", "--name", name)
        assert rows(ENGINE.container(f"backupd-{name}-orders")) == [1, 2]
    finally:
        home.run("sandbox", "remove", name)
