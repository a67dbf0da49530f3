"""Fifty random instants of an eventful hour of a server: each brings back exactly the rows committed by then.

The agent is the real one, in a process of its own. What is restored is laid out by the driver, which also chooses the
recovery's target; only the server is told on its command line to stop there and to answer questions, so that one copy
goes from instant to instant. That it is promoted in the end is for test_postgres_physical.py to show.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import services as bed
from commands import Home
from test_postgres_physical import DOUBT, connect, driver_of, one, prepare
from test_postgres_to_the_second import CONFIG, serving, window_end

from backupd.archive import open_archive
from backupd.chain import chains
from backupd.drivers._tarstream import END
from backupd.drivers.postgres_recovery import Home as DataHome
from backupd.drivers.postgres_recovery import Replayed, Target, last_files, wal_files
from backupd.logs import read_logs
from backupd.model import RecoveryPoint
from backupd.plan import Step, plan_restore, windows
from backupd.repository import Repository
from backupd.sandbox.docker import Engine
from backupd.stores import LocalStore

WRITERS = 4
INSTANTS = 50
BULK = 30_000
_PER_WRITER = 1_000_000


@dataclass
class Row:
    """One committed row, or one whose answer never came."""

    sent: datetime
    acknowledged: datetime | None = None


@dataclass
class Writing:
    """Several connections that write all the time, through whatever happens to the server."""

    service: bed.Service
    rows: dict[int, Row] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Writing:
        self._threads = [threading.Thread(target=self._run, args=[who]) for who in range(WRITERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, who: int) -> None:
        number = who * _PER_WRITER
        while not self._stop.is_set():
            with contextlib.suppress(psycopg.Error), connect(self.service) as connection:
                while not self._stop.is_set():
                    number += 1
                    self.rows[number] = row = Row(datetime.now(UTC))
                    connection.execute("INSERT INTO t(n) VALUES (%s)", [number])
                    row.acknowledged = datetime.now(UTC)
                    time.sleep(0.003)
            time.sleep(0.05)


@dataclass(frozen=True)
class History:
    """What happened, and how the server itself dates it."""

    repository: Repository
    rows: dict[int, Row]
    commits: dict[int, datetime]
    bulk: datetime
    """When the large transaction was committed."""
    bulk_begun: datetime
    vacuumed: datetime
    """While VACUUM FULL was at work."""
    points: Sequence[RecoveryPoint]

    def step(self, at: datetime) -> Step:
        logs = chains(*self.repository.logs("orders"))
        (step,) = plan_restore(self.points, at, ["orders"], logs=logs).steps
        return step


def live(home: Home, service: bed.Service) -> tuple[dict[int, Row], datetime, datetime]:
    """All of it: the rows that were sent, when the large transaction began, and when the table was being rewritten."""
    with serving(home) as agent, Writing(service) as writing:
        bed.wait_until(lambda: window_end(home).year > 1, timeout=60, what="a window")
        with connect(service) as large:
            large.autocommit = False
            large.execute("INSERT INTO bulk SELECT generate_series(1, %s)", [BULK])
            begun = datetime.now(UTC)
            time.sleep(1.5)
            agent.kill()
            agent.wait()
            time.sleep(0.5)
            large.commit()
        with serving(home) as second:
            bed.wait_until(
                lambda: bool(one(service, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")),
                timeout=30, what="the second agent",
            )  # fmt: skip
            with connect(service) as connection:
                asked = datetime.now(UTC)
                connection.execute("VACUUM FULL t")
                vacuumed = asked + (datetime.now(UTC) - asked) / 2
            home.ok("backup", "orders")  # the second base, while all of them write
            time.sleep(0.5)
            service.container.kill()
            service.container.start()
            bed.wait_until(lambda: bool(bed.postgres_version(service)), timeout=30, what="the server again")
            time.sleep(1)
            promote(service)
            bed.wait_until(
                lambda: any((home.path / "repo/logs/orders").glob("*-2/*")),
                timeout=60, what="a log of the second timeline",
            )  # fmt: skip
            time.sleep(1.5)
            writing.__exit__()
            time.sleep(0.5)  # an anchor behind the last commit
            second.terminate()
            assert second.wait(timeout=30) == 0
    return writing.rows, begun, vacuumed


def promote(service: bed.Service) -> None:
    """The server goes on on a timeline of its own, as a standby that takes over."""
    service.exec("touch", "/var/lib/postgresql/data/standby.signal", user="postgres")
    service.container.restart()
    bed.wait_until(lambda: bool(bed.postgres_version(service)), timeout=30, what="the standby")
    assert one(service, "SELECT pg_is_in_recovery() AND pg_promote()")


@pytest.fixture(scope="module")
def history(module_services: bed.Services, tmp_path_factory: pytest.TempPathFactory) -> History:
    (port, free) = bed.free_ports(2)
    service = module_services.postgres(
        command=["postgres", "-c", "track_commit_timestamp=on"], published=port
    )
    prepare(service)
    with connect(service) as connection:
        connection.execute(
            "CREATE TABLE t(n int PRIMARY KEY, committing xid DEFAULT pg_current_xact_id()::xid, "
            "pad text DEFAULT repeat('x', 500))"  # so much that the agent leaves the server now and then
        )
        connection.execute("CREATE TABLE bulk(n int)")
    home = Home(tmp_path_factory.mktemp("history"))
    home.configure(CONFIG.format(host=service.host, port=port, free=free))
    home.ok("init")
    rows, begun, vacuumed = live(home, service)
    with connect(service) as connection:
        dated = connection.execute("SELECT n, pg_xact_commit_timestamp(committing) FROM t").fetchall()
        bulk = connection.execute("SELECT DISTINCT pg_xact_commit_timestamp(xmin) FROM bulk").fetchone()
    assert bulk
    repository = Repository.open(LocalStore(home.path / "repo"))
    commits = {n: at.astimezone(UTC) for n, at in dated}
    return History(repository, rows, commits, bulk[0].astimezone(UTC), begun, vacuumed, repository.points())


# --- recovering to one instant after another -----------------------------------------------------------------

SCRIPT = """
set -eu
chmod 700 "$PGDATA"  # as the entrypoint does
export PGHOST=/var/run/postgresql PGUSER=postgres PGDATABASE=app
begin() {
  pg_ctl start -s -w -l /tmp/log -o '-c fsync=off -c hot_standby=on -c recovery_target_action=pause' ||
    { tail -n 20 /tmp/log; exit 1; }
  until [ "$(psql -AtXc "SELECT CASE WHEN pg_is_in_recovery()
    THEN pg_get_wal_replay_pause_state() ELSE 'promoted' END")" != 'not paused' ]; do sleep 0.02; done
}
ask() {
  psql -AtXq -v ON_ERROR_STOP=1 -c "SET lock_timeout = '1s'" -c "SELECT 'at ' || count(*) FROM bulk" \
    -c 'SELECT n FROM t' >/tmp/said 2>/tmp/why
}
for conf in /rig/*; do
  cp "$conf" "$PGDATA/postgresql.auto.conf"
  begin
  if ! ask; then # a table that was being rewritten then is locked until the recovery ends
    pg_ctl stop -s -w -m immediate
    cp -a "$PGDATA" /tmp/kept
    begin
    psql -AtXqc 'SELECT pg_wal_replay_resume()' >/dev/null
    until [ "$(psql -AtXc 'SELECT pg_is_in_recovery()')" = f ]; do sleep 0.02; done
    ask || { cat /tmp/why; exit 1; }
    pg_ctl stop -s -w -m immediate
    find "$PGDATA" -mindepth 1 -delete
    cp -a /tmp/kept/. "$PGDATA"
    rm -rf /tmp/kept
  else
    pg_ctl stop -s -w -m immediate
  fi
  cat /tmp/said
done
"""


@dataclass(frozen=True)
class Found:
    """What a restored server held."""

    rows: set[int]
    bulk: int


def recover(
    services: bed.Services, history: History, point: RecoveryPoint, steps: Sequence[Step]
) -> Iterator[Found]:
    """Of one base, each of the steps, which go forward in time."""
    service = services.container(bed.POSTGRES_IMAGE, ["sleep", "infinity"], start=False)
    driver = driver_of(service)
    archive, last = open_archive(history.repository, point), steps[-1]
    logs = read_logs(history.repository, last.logs)
    driver.load_to(archive, logs, last.replay_to, Engine().container(service.name))
    service.container.start()
    service.exec("install", "-d", "/rig")
    laid = DataHome("/var/lib/postgresql/data", "/var/lib/postgresql/data", 999, 999)
    confs = []
    for number, step in enumerate(steps):
        replayed = Replayed(step.replay_to)
        for _ in wal_files(read_logs(history.repository, step.logs), point, replayed):
            pass
        held = {"PG_VERSION": "16", "postgresql.auto.conf": ""}
        files = dict(last_files(point, laid, held, Target(step.replay_to), replayed))
        confs.append((f"{number:03d}.conf", files["postgresql.auto.conf"]))
    Engine().container(service.name).write("/rig", [*DataHome("/rig", "/rig", 999, 999).files(confs), END])
    said = service.exec("bash", "-c", SCRIPT, user="postgres")
    for part in said.split("at ")[1:]:
        bulk, *rows = part.splitlines()
        yield Found(set(map(int, rows)), int(bulk))


def restored(
    services: bed.Services, history: History, instants: Sequence[datetime]
) -> Iterator[tuple[datetime, Found]]:
    """Each instant as its plan has it."""
    by_point: dict[str, list[tuple[datetime, Step]]] = {}
    for at in sorted(instants):
        step = history.step(at)
        by_point.setdefault(step.point.id, []).append((at, step))
    for group in by_point.values():
        steps = [step for _, step in group]
        found = list(recover(services, history, steps[0].point, steps))
        yield from zip([at for at, _ in group], found, strict=True)


def compare(history: History, at: datetime, found: Found) -> None:
    expected = {n for n, committed in history.commits.items() if committed <= at}
    wrong = found.rows ^ expected
    assert all(abs(history.commits[n] - at) <= DOUBT for n in wrong), (at, len(wrong))
    acknowledged = {n for n, row in history.rows.items() if row.acknowledged and row.acknowledged <= at}
    assert acknowledged <= found.rows, at
    assert not {n for n in found.rows if history.rows[n].sent > at}, at
    if abs(history.bulk - at) > DOUBT:
        assert found.bulk == (BULK if history.bulk <= at else 0), at


def test_fifty_random_instants_bring_back_what_was_committed_by_then(
    history: History, services: bed.Services
) -> None:
    """Through two agents of which one was killed, a VACUUM FULL, a large transaction, a base backup, a crash of the
    server and its promotion; and at the very time of commits, and where nothing came after."""
    (window,) = windows(history.points, chains(*history.repository.logs("orders"))).values()
    ((first, last),) = window.bars  # nothing of it tore the log
    dice = random.Random(50)
    instants = [first + (last - first) * dice.random() for _ in range(INSTANTS)]
    inside = [at for at in history.commits.values() if first <= at <= last]
    special = [
        first,
        max(inside),
        last,
        history.bulk,
        history.bulk - timedelta(milliseconds=100),
        history.vacuumed,
    ]
    special += dice.sample(inside, 3)
    seen = dict(restored(services, history, [*instants, *special]))
    assert len(seen) == INSTANTS + len(special)
    for at, found in seen.items():
        compare(history, at, found)
    assert len({history.step(at).point.id for at in seen}) == 2
    timelines = {history.step(at).logs[-1].epoch[-2:] for at in seen}
    assert timelines == {"-1", "-2"}
    assert any(history.bulk_begun < at < history.bulk for at in seen)
