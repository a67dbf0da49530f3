"""Every version of PostgreSQL that is supported, for real: what was recorded comes back in a server of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import services as bed
from captured import take
from test_postgres_physical import (
    DOUBT,
    Log,
    Start,
    connect,
    driver_of,
    recording,
    sandbox,
    sql,
    start_server,
    wait_for_anchor,
)
from test_postgres_physical import restore as restore_with

from backupd.drivers.postgres_dump import OLDEST
from backupd.model import Container

__all__ = ["restore_with", "sandbox", "start_server"]

VERSIONS = ("13", "14", "15", "17", "18")
"""Beside the one of all other tests. `provision.sh postgres:13 ...` brings them; without its server a test fails."""


def test_no_supported_version_is_left_out() -> None:
    newest = max(map(int, VERSIONS))
    default = bed.POSTGRES_IMAGE.rpartition(":")[2]
    assert sorted({*VERSIONS, default}, key=int) == [str(major) for major in range(OLDEST, newest + 1)]


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
