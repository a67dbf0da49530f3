"""A base backup that a process of its own receives: the same bytes, and no process that stays or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import services as bed
from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers import postgres_receive
from backupd.drivers.postgres_apart import BaseApart
from backupd.drivers.postgres_place import lay_files
from backupd.drivers.postgres_receive import SLOT, SLOTS, Slots
from backupd.drivers.postgres_recovery import Home
from backupd.drivers.postgres_replication import Server, ServerRefused
from backupd.errors import CaptureFailed, RestoreFailed

SLOW = 1_000_000
"""Bytes a second: a base of a new cluster takes half a minute."""


@pytest.fixture(scope="module")
def server(module_services: bed.Services) -> Server:
    service = module_services.postgres()
    service.exec("sh", "-c", "echo 'host replication all all scram-sha-256' >> $PGDATA/pg_hba.conf")
    given = {
        "host": service.host,
        "port": str(service.port),
        "user": service.user,
        "password": service.password,
    }
    with psycopg.connect(**given, dbname="app", autocommit=True) as connection:  # type: ignore[arg-type]
        connection.execute("SELECT pg_reload_conf()")
    return Server(given)


def begun(server: Server, *, rate: int = 0) -> BaseApart:
    """A base that the server has begun to send."""
    base = BaseApart()
    base.begin(server, manifest=b"", more={}, label="test", verify=True, max_rate=rate)
    return base


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def senders(server: Server) -> int:
    """Base backups that the server is sending."""
    with psycopg.connect(**server.parameters, dbname="app") as connection:  # type: ignore[arg-type]
        row = connection.execute("SELECT count(*) FROM pg_stat_progress_basebackup").fetchone()
    assert row is not None
    return int(row[0])


# --- what comes ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3 * SLOT), max_size=8))
def test_what_is_put_into_the_slots_comes_out_of_them(chunks: list[int]) -> None:
    """Whatever the sizes of the pieces: in order, each byte once, and no slot before it was given back."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, SLOT * SLOTS)
    back, given_back = os.pipe()
    full: list[int] = []
    came = threading.Semaphore(0)

    def filled(size: int) -> None:
        full.append(size)
        assert size <= SLOT
        came.release()

    data = [os.urandom(1 << 12) * (size >> 12) + b"x" * (size & 0xFFF) for size in chunks]

    def fill() -> None:
        slots = Slots(memory, back, filled)
        for chunk in data:
            slots.put(chunk)
        slots.flush()
        came.release()

    thread = threading.Thread(target=fill)
    thread.start()
    seen, number = bytearray(), 0
    while True:
        came.acquire()
        if number == len(full):
            break
        seen += os.pread(memory, full[number], number % SLOTS * SLOT)
        number += 1
        os.write(given_back, b"\0")
    thread.join()
    for handle in (memory, back, given_back):
        os.close(handle)
    assert seen == b"".join(data)


def test_a_base_ends_with_what_it_needs_of_the_log(server: Server) -> None:
    """Read to its end it tells how much came, and where the log must reach; then its process is gone."""
    with contextlib.closing(begun(server)) as base:
        size = 0
        while got := base.readinto(bytearray(1 << 16)):
            assert base.end is None
            size += got
        assert size >= base.sent > 20_000_000
        assert base.end is not None
        assert base.end >= base.start > 0
        assert base.readinto(bytearray(1)) == 0
    assert is_gone(base.pid)


# --- what goes wrong ------------------------------------------------------------------------------------------


def test_a_receiver_that_is_killed_ends_the_capture(server: Server) -> None:
    with contextlib.closing(begun(server, rate=SLOW)) as base:
        assert base.readinto(bytearray(1 << 16))
        os.kill(base.pid, signal.SIGKILL)
        with pytest.raises(CaptureFailed, match="was killed") as failure:
            while base.readinto(bytearray(1 << 20)):
                pass
    assert "back up again" in failure.value.hint


def test_a_base_that_nobody_wants_any_more_ends_on_the_server_too(server: Server) -> None:
    base = begun(server, rate=SLOW)
    bed.wait_until(lambda: senders(server) == 1, timeout=30, what="the only one")
    base.close()
    base.close()
    assert is_gone(base.pid)
    bed.wait_until(lambda: senders(server) == 0, timeout=30, what="the server")


def test_a_receiver_does_not_outlive_the_agent(server: Server) -> None:
    """Nor one that waits for it to read on."""
    program = (
        "import json, sys, time\nfrom backupd.drivers.postgres_apart import BaseApart\n"
        "from backupd.drivers.postgres_replication import Server\nbase = BaseApart()\n"
        "server = Server(json.loads(sys.stdin.readline()))\n"
        "base.begin(server, manifest=b'', more={}, label='x', verify=True, max_rate=0)\n"
        "print(base.pid, flush=True)\ntime.sleep(600)\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    agent.stdin.write(json.dumps(dict(server.parameters)) + "\n")
    agent.stdin.flush()
    receiver = int(agent.stdout.readline())
    assert not is_gone(receiver)
    agent.kill()
    agent.communicate()
    bed.wait_until(lambda: is_gone(receiver), timeout=30, what="the receiver")


def test_what_the_server_says_comes_as_it_was_said(server: Server) -> None:
    with (
        contextlib.closing(BaseApart()) as base,
        pytest.raises(ServerRefused, match="password authentication"),
    ):
        wrong = Server({**server.parameters, "password": "wrong"})
        base.begin(wrong, manifest=b"", more={}, label="x", verify=True, max_rate=0)


def test_a_fault_of_its_own_is_told(server: Server) -> None:
    with contextlib.closing(BaseApart()) as base, pytest.raises(CaptureFailed, match="TypeError") as failure:
        base.begin(server, manifest=b"", more={}, nonsense=1)
    assert "report it" in failure.value.hint


def test_a_connection_that_breaks_fails_the_capture(server: Server) -> None:
    with contextlib.closing(begun(server, rate=SLOW)) as base:
        with psycopg.connect(**server.parameters, dbname="app") as connection:  # type: ignore[arg-type]
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_progress_basebackup")
        with pytest.raises(CaptureFailed, match=r"the base backup failed: .*terminat"):
            while base.readinto(bytearray(1 << 20)):
                pass


def test_a_password_stands_on_no_command_line(server: Server) -> None:
    with contextlib.closing(begun(server, rate=SLOW)) as base:
        seen = Path(f"/proc/{base.pid}/cmdline").read_bytes() + Path(f"/proc/{base.pid}/environ").read_bytes()
    assert str(postgres_receive.__file__).encode() in seen
    assert str(server.parameters["password"]).encode() not in seen


# --- a log that is laid behind it -----------------------------------------------------------------------------


def test_a_symlink_in_a_base_leads_the_log_nowhere(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "volume", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    (place / "pg_wal").symlink_to(elsewhere)
    (elsewhere / "kept").write_text("as it was")
    (place / "PG_VERSION").symlink_to(elsewhere / "kept")
    home = Home("/pg", "/pg", os.geteuid(), os.getegid())
    with pytest.raises(RestoreFailed, match="could not be laid"):
        lay_files([("pg_wal/000000010000000000000001", b"log")], home, place)
    lay_files([("PG_VERSION", b"16\n")], home, place)
    assert (place / "PG_VERSION").read_text() == "16\n"
    assert [path.read_text() for path in elsewhere.iterdir()] == ["as it was"]


def test_what_ends_early_is_no_cluster(tmp_path: Path) -> None:
    """PG_VERSION comes last: without it no server starts on what is there."""

    def files() -> Iterator[tuple[str, bytes]]:
        yield "pg_wal/000000010000000000000001", b"log"
        raise CaptureFailed("the log has a hole")

    home = Home("/pg", "/pg", os.geteuid(), os.getegid())
    with pytest.raises(CaptureFailed):
        lay_files(files(), home, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pg_wal"]
