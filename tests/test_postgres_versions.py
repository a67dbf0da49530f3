"""Every version of PostgreSQL that is supported, for real: what was recorded comes back in a server of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import services as bed
from captured import take
from test_postgres_physical import (
    DOUBT,
    Log,
    Start,
    connect,
    driver_of,
    one,
    recording,
    sandbox,
    sql,
    start_server,
    wait_for_anchor,
)
from test_postgres_physical import restore as restore_with

from backupd import backup
from backupd.archive import open_archive
from backupd.backup import back_up
from backupd.drivers.postgres_dump import OLDEST
from backupd.drivers.postgres_sql import number
from backupd.model import Container, RecoveryPoint, Silence
from backupd.repository import Repository
from backupd.stores import MemoryStore

__all__ = ["restore_with", "sandbox", "start_server"]

VERSIONS = ("13", "14", "15", "17", "18")
"""Beside the one of all other tests. `provision.sh postgres:13 ...` brings them; without its server a test fails."""


def test_no_supported_version_is_left_out() -> None:
    newest = max(map(int, VERSIONS))
    default = bed.POSTGRES_IMAGE.rpartition(":")[2]
    assert sorted({*VERSIONS, default}, key=int) == [str(major) for major in range(OLDEST, newest + 1)]


def lose_summaries(service: bed.Service) -> None:
    """Those of the log since the last base; the server makes none twice."""
    with connect(service) as connection:
        connection.execute("CREATE TABLE more AS SELECT 1 AS n")
        connection.execute("CHECKPOINT")
    done = "SELECT summarized_lsn >= redo_lsn FROM pg_get_wal_summarizer_state(), pg_control_checkpoint()"
    bed.wait_until(lambda: bool(one(service, done)), timeout=30, what="a summary")
    service.exec("sh", "-c", "rm $PGDATA/pg_wal/summaries/*")


@pytest.mark.parametrize("major", ["17", "18"])
def test_a_server_that_summarizes_its_log_sends_only_pages_that_changed(
    major: str, start_server: Start, restore_with: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onto the point before, and onto that again; each point stands alone, after the one it continued is gone. Where
    the summaries are gone, all is sent."""
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0)  # the log is held beside the repository
    service = start_server("summarize_wal=on", image=f"postgres:{major}")
    driver, log = driver_of(service, image=f"postgres:{major}"), Log()
    repository = Repository.create(MemoryStore(), clock=lambda: datetime.now(UTC))

    def back_up_now() -> RecoveryPoint:
        clock = partial(datetime.now, UTC)
        run = back_up("orders", driver, repository, clock=clock, progress=Silence(), stop=threading.Event())
        return repository.find(run.point)

    service.exec("sh", "-c", "install -d -o postgres /var/lib/postgresql/spaced")
    with connect(service) as connection:
        for text in (
            "CREATE EXTENSION amcheck",
            "CREATE TABLESPACE fast LOCATION '/var/lib/postgresql/spaced'",
            "CREATE TABLE t AS SELECT g AS n, md5(g::text) FROM generate_series(1, 200000) g",
            "CREATE INDEX ON t(n)",
            "CREATE TABLE cut AS SELECT * FROM t",
            "CREATE TABLE spaced(n int PRIMARY KEY) TABLESPACE fast",
            "INSERT INTO spaced SELECT generate_series(1, 60000)",
            "VACUUM FREEZE",
        ):
            connection.execute(text.encode())
    points = []
    with recording(driver, log):
        points.append(back_up_now())
        with connect(service) as connection:
            connection.execute("UPDATE t SET md5 = 'changed' WHERE n % 20000 = 0")
            connection.execute("DELETE FROM cut WHERE n > 1000")
            connection.execute("VACUUM cut")
            connection.execute("INSERT INTO spaced SELECT generate_series(60001, 60100)")
        points.append(back_up_now())
        with connect(service) as connection:
            connection.execute("UPDATE t SET md5 = 'again' WHERE n % 40000 = 0")
            connection.execute("CREATE TABLE young AS SELECT generate_series(1, 500000) n")
        points.append(back_up_now())
        lose_summaries(service)
        points.append(back_up_now())
        wait_for_anchor(log, datetime.now(UTC))
    sent = [number(point.attributes["sent"]) for point in points]
    assert sent[1] * 4 < sent[0]
    assert [point.attributes.get("changed_since") for point in points] == [
        None,
        points[0].id,
        points[1].id,
        None,
    ]
    assert sent[3] > sent[0]
    assert [point.warnings for point in points] == [()] * 4
    assert all(point.size > 30_000_000 for point in points)
    with repository.lease("orders") as lease:
        for old in points[:2]:
            repository.remove_point(old, lease)
    counted = "SELECT count(*), count(*) FILTER (WHERE md5 = 'changed'), count(*) FILTER (WHERE md5 = 'again') FROM t"
    container = restore_with(driver, open_archive(repository, points[2]), log, points[2].instant)
    assert sql(container, counted) == "200000|5|5"
    assert sql(container, "SELECT count(*), max(n) FROM cut") == "1000|1000"
    assert sql(container, "SELECT count(*) FROM spaced") == "60100"
    assert sql(container, "SELECT count(*) FROM young") == "500000"
    for index in ("t_n_idx", "spaced_pkey"):
        sql(container, f"SELECT bt_index_parent_check('{index}', true)")


@pytest.mark.parametrize("major", VERSIONS)
def test_a_server_of_this_version_comes_back_as_of_an_instant(
    major: str, start_server: Start, restore_with: Callable[..., Container]
) -> None:
    """Base and log over the network, with the documented role; the rows of the instant, neither more nor fewer."""
    image = f"postgres:{major}"
    # from 14 on by default, and what the documented line of pg_hba.conf asks for
    service = start_server(image=image, env={"POSTGRES_INITDB_ARGS": "--auth-host=scram-sha-256"})
    driver, log = driver_of(service, image=image), Log()
    assert [problem.message for problem in driver.check() if problem.fatal] == []
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(id serial, pad text)")
        connection.execute("INSERT INTO t(pad) SELECT repeat('x', 100) FROM generate_series(1, 1000)")
        with recording(driver, log):
            held = take(driver)
            for _ in range(60):
                connection.execute("INSERT INTO t(pad) VALUES ('later')")
                time.sleep(0.005)
            rows = connection.execute(
                "SELECT id, pg_xact_commit_timestamp(xmin) FROM t WHERE pad = 'later' ORDER BY id"
            ).fetchall()
            wait_for_anchor(log, datetime.now(UTC))
    assert (held.point.attributes["major"], held.point.warnings) == (int(major), ())
    commits = {number: at.astimezone(UTC) for number, at in rows}
    at = commits[1030] + timedelta(microseconds=1)
    container = restore_with(driver, held, log, at)
    assert sql(container, "SHOW server_version_num").startswith(major)
    assert sql(container, "SELECT count(*) FROM t WHERE pad <> 'later'") == "1000"
    found = {int(line) for line in sql(container, "SELECT id FROM t WHERE pad = 'later'").split()}
    wrong = found ^ {number for number, committed in commits.items() if committed <= at}
    assert all(abs(commits[number] - at) <= DOUBT for number in wrong)
    assert 1030 in found
    assert driver.recovered(container)["first_left_out"]
