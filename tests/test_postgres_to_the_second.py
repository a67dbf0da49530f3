"""The story of `mode = "pitr"` as a user lives it: the agent records, is killed, goes on; any second comes back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import services as bed
from commands import Home, InsideHome, recording_config
from test_postgres_physical import connect, prepare

from backupd.drivers.postgres_client import InContainer
from backupd.sandbox.docker import Engine

CONFIG = recording_config("orders", "postgres", "postgresql://backup:secret@{host}:{port}/postgres")


@contextlib.contextmanager
def serving(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    with (home.path / "serve.log").open("ab") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "backupd", "serve"], cwd=home.path, env=home.environment(), stdout=log, stderr=log
        )  # fmt: skip
    try:
        yield agent
    finally:
        agent.kill()
        agent.wait()


def bars(home: Home, source: str) -> list[dict[str, str]]:
    """The stretches to any instant of which the source can be restored now. Tests ask again and again: without a
    process for each."""
    windows = InsideHome(home.path, home.env).ok("window", source, "--json").json
    found: list[dict[str, str]] = windows.get(source, {}).get("continuous", [])
    return found


def window_end(home: Home, source: str = "orders") -> datetime:
    """The newest instant that could be restored now."""
    found = bars(home, source)
    return datetime.fromisoformat(found[-1]["last"]) if found else datetime.min.replace(tzinfo=UTC)


def wait_for(home: Home, instant: datetime) -> None:
    bed.wait_until(lambda: window_end(home) >= instant, timeout=60, what=f"the log up to {instant}")


@pytest.fixture
def server(services: bed.Services) -> bed.Service:
    service = services.postgres(command=["postgres", "-c", "track_commit_timestamp=on"])
    prepare(service)
    with connect(service) as connection:
        connection.execute("CREATE TABLE t(id serial)")
    return service


def test_any_second_comes_back_also_where_the_agent_was_killed_meanwhile(
    server: bed.Service, tmp_path: Path
) -> None:
    """Rows restored are exactly those committed by then; what lies outside the window is refused with it. The base was
    made by hand before anything was recorded, and is continued: the agent makes no other."""
    home = Home(tmp_path)
    home.configure(CONFIG.format(host=server.host, port=server.port, free=bed.free_ports(1)[0]))
    home.ok("init")
    home.ok("check")
    assert home.run("backup").code == 3  # its log is not stored yet
    with serving(home):
        bed.wait_until(
            lambda: window_end(home) > datetime.min.replace(tzinfo=UTC), timeout=60, what="a window"
        )
        stop = threading.Event()

        def write() -> None:
            with connect(server) as connection:
                while not stop.is_set():
                    connection.execute("INSERT INTO t DEFAULT VALUES")
                    time.sleep(0.02)

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(2)
        first = datetime.now(UTC)
        time.sleep(1)
    second = datetime.now(UTC)  # nobody records now: the slot keeps it
    time.sleep(1)
    with serving(home) as agent:
        time.sleep(2)
        third = datetime.now(UTC)
        time.sleep(1)
        stop.set()
        writer.join()
        wait_for(home, third + timedelta(seconds=0.5))
        agent.terminate()
        assert agent.wait(timeout=60) == 0
    with connect(server) as connection:
        stamps = [
            row[0].astimezone(UTC)
            for row in connection.execute("SELECT pg_xact_commit_timestamp(xmin) FROM t ORDER BY 1")
        ]
    for number, at in enumerate((first, second, third)):
        name = f"e2e-{time.time_ns()}-{number}"
        try:
            said = home.ok("restore", "--at", at.isoformat(), "orders", "--name", name).out
            assert "last commit that is in it: 20" in said
            assert "first that is not: 20" in said
            restored = InContainer(Engine().container(f"backupd-{name}-orders"))
            counted = b"".join(restored.run("psql", "-AtXc", "SELECT count(*) FROM t", database="app"))
            doubt = sum(abs(stamp - at) < timedelta(milliseconds=3) for stamp in stamps)
            assert abs(int(counted) - sum(stamp <= at for stamp in stamps)) <= doubt
            assert int(counted) > 0
        finally:
            home.run("sandbox", "remove", name)
    assert (
        "in the future" in home.refused("restore", "--at", "2099-01-01T00:00:00Z", "orders", code=2).message
    )
    assert home.refused("plan", "--at", "2001-01-01T00:00:00Z", "orders", code=21).hint
    home.ok("verify")
    assert len(home.ok("list", "orders", "--json").json) == 1
    assert home.ok("status").out.count("orders") >= 1
