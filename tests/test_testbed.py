"""What tests and demo lean on in the official images, checked on whatever carries their names here.

A stand-in that keeps less than this would let a test pass that fails on a user's machine.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import time

import docker
import pytest
import services as bed
from docker.models.containers import Container

CLIENTS = [
    "pg_dump",
    "pg_dumpall",
    "pg_restore",
    "pg_basebackup",
    "pg_receivewal",
    "pg_verifybackup",
    "pg_waldump",
    "pg_controldata",
    "pg_rewind",
    "pg_amcheck",
    "psql",
    "pg_ctl",
    "initdb",
    "gosu",
]


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _wait_for_exit(container: Container) -> int:
    return int(container.wait(timeout=60)["StatusCode"])


def _psql(server: bed.Service, sql: str) -> str:
    """What a query prints, asked on the Unix socket."""
    return server.exec("psql", "-U", server.user, "-d", server.db, "-tAc", sql).strip()


def test_postgres_refuses_to_start_without_a_password(services: bed.Services) -> None:
    """The official image ends with 1 rather than leave a database open to all."""
    assert _wait_for_exit(services.container(bed.POSTGRES_IMAGE).container) == 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (bed.POSTGRES_IMAGE, ("docker-entrypoint.sh", "/var/lib/postgresql/data", "5432/tcp", "SIGINT")),
        (bed.REDIS_IMAGE, ("docker-entrypoint.sh", "/data", "6379/tcp", None)),
        (bed.CHROMA_IMAGE, (None, None, "8000/tcp", None)),
    ],
)
def test_images_are_configured_as_the_official_ones(
    docker_client: docker.DockerClient, image: str, expected: tuple[str | None, ...]
) -> None:
    """Entry point, volume, port and stop signal: what compose files and our discovery read."""
    found = docker_client.images.get(image).attrs["Config"]
    entry, volume, port, stop = expected
    assert entry is None or found["Entrypoint"] == [entry]
    assert volume is None or list(found["Volumes"]) == [volume]
    assert port in found["ExposedPorts"]
    assert found.get("StopSignal") == stop


def test_postgres_runs_what_lies_in_its_init_folder(services: bed.Services) -> None:
    """SQL, compressed SQL and shell, sourced or run, in the order of their names."""
    script = (
        b'#!/bin/bash\nset -e\npsql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -c "insert into a values (3)"\n'
    )
    files = {
        "1.sql": (b"create table a(i int); insert into a values (1);", 0o644),
        "2.sql.gz": (gzip.compress(b"insert into a values (2);"), 0o644),
        "3.sh": (script, 0o755),
        "4.sh": (script, 0o644),
    }
    made = services.container(
        bed.POSTGRES_IMAGE,
        ["-c", "wal_level=logical", "-c", "log_line_prefix=%m [%p] "],
        port=5432,
        env={
            "POSTGRES_USER": "us-er",
            "POSTGRES_DB": "my db",
            "POSTGRES_PASSWORD_FILE": "/docker-entrypoint-initdb.d/password",
            "POSTGRES_INITDB_ARGS": "--data-checksums",
        },
        start=False,
    )
    made.container.put_archive(
        "/docker-entrypoint-initdb.d", _tar({**files, "password": (b'fi le"s', 0o644)})
    )
    made.container.start()
    made.host, made.user, made.db, made.password = "127.0.0.1", "us-er", "my db", 'fi le"s'
    made.refresh_port(5432)
    bed.wait_until(lambda: bool(bed.postgres_version(made)), timeout=60, what="PostgreSQL")
    assert _psql(made, "select array_agg(i order by i) from a") == "{1,2,3,3}"
    assert _psql(made, "show wal_level") == "logical"
    assert _psql(made, "show data_checksums") == "on"
    made.password = "wrong"
    assert bed.postgres_version(made) == ""


def test_postgres_has_its_clients_its_locale_and_its_user(services: bed.Services) -> None:
    """What a driver runs in the server's container is there, and the server is not root."""
    server = services.postgres()
    server.exec("sh", "-c", " && ".join(f"command -v {client}" for client in CLIENTS))
    assert server.container.top(ps_args="-o pid,uid")["Processes"][0][1] == "999"
    assert server.exec("id", "-un", user="postgres").strip() == "postgres"
    collation = "select datcollate from pg_database where datname = 'app'"
    assert _psql(server, collation) == "en_US.utf8"
    berlin = "set timezone = 'Europe/Berlin'; select '2026-07-01 00:00+00'::timestamptz"
    assert _psql(server, berlin).splitlines()[-1] == "2026-07-01 02:00:00+02"
    over_socket = ("psql", "-h", "/var/run/postgresql", "-U", "postgres", "-tAc", "select 1")
    assert server.exec(*over_socket).strip() == "1"


def test_postgres_stops_cleanly_and_keeps_its_data(services: bed.Services) -> None:
    """SIGINT is a fast shutdown; a second start does not initialise again."""
    server = services.postgres(fast=False)
    _psql(server, "create table kept as select 1")
    server.container.stop(timeout=30)
    assert _wait_for_exit(server.container) == 0
    server.container.start()
    server.refresh_port(5432)
    bed.wait_until(lambda: bool(bed.postgres_version(server)), timeout=60, what="PostgreSQL")
    assert _psql(server, "select count(*) from kept") == "1"


def test_postgres_gives_a_physical_backup_that_verifies(services: bed.Services) -> None:
    """pg_basebackup and pg_verifybackup belong to one another and to the server."""
    server = services.postgres()
    copy = "pg_basebackup -U postgres -D /tmp/copy -c fast -Xs && pg_verifybackup /tmp/copy"
    server.exec("sh", "-c", copy, user="postgres")


def test_redis_takes_options_and_a_file_and_has_no_protected_mode(services: bed.Services) -> None:
    """Arguments become options of the server; a client of another container is let in."""
    with_options = services.redis("--save", "60 1", "--appendonly", "yes")
    assert with_options.exec("redis-cli", "config", "get", "save").split()[1:] == ["60", "1"]
    other = services.redis()
    assert other.exec("redis-cli", "-h", with_options.address, "ping").strip() == "PONG"
    from_file = services.container(bed.REDIS_IMAGE, ["/etc/redis.conf"], port=6380, start=False)
    from_file.container.put_archive("/etc", _tar({"redis.conf": (b"port 6380\nrequirepass zz\n", 0o644)}))
    from_file.container.start()
    from_file.host = "127.0.0.1"
    from_file.refresh_port(6380)
    bed.wait_until(lambda: bed.redis_answers(from_file), timeout=20, what="Redis")


def test_redis_saves_into_data_as_its_own_user(services: bed.Services) -> None:
    """dump.rdb lands in the volume, its checker accepts it, and it can be had over the wire."""
    server = services.redis("--repl-diskless-sync-delay", "0")
    server.exec("redis-cli", "set", "k", "v")
    server.exec("redis-cli", "save")
    assert server.exec("ls", "/data").split() == ["dump.rdb"]
    server.exec("redis-check-rdb", "/data/dump.rdb")
    assert server.container.top(ps_args="-o pid,uid")["Processes"][0][1] == "999"
    streamed = server.exec("sh", "-c", "redis-cli --rdb - 2>/dev/null | head -c 5")
    assert streamed == "REDIS"


def test_chroma_answers_as_the_official_image(services: bed.Services) -> None:
    """API version 2, data in /data, neither Python nor tools that a driver could lean on; quick to stop."""
    server = services.chroma()
    assert bed.http_get(server, "/api/v2/version") == b'"1.0.0"'
    found = server.exec("sh", "-c", "command -v python python3 curl wget; ls /data")
    assert found.split() == ["chroma.sqlite3"]
    started = time.monotonic()
    server.container.stop(timeout=10)
    assert time.monotonic() - started < 9
