"""Incremental base backups: what a server sends, what becomes of it, and what is done where it cannot be."""

from __future__ import annotations

import io
import struct
import tarfile
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

import pytest
import services as bed
from engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from test_postgres_physical import (
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
from test_postgres_wal import cut, server_tar

from backupd import backup
from backupd.archive import open_archive
from backupd.backup import back_up
from backupd.drivers.postgres_base import PAGE_SIZE, PAGED, one_tar
from backupd.drivers.postgres_sql import number
from backupd.errors import CaptureFailed
from backupd.model import Container, RecoveryPoint, Silence, TarStream
from backupd.repository import Repository
from backupd.stores import MemoryStore

__all__ = ["restore_with", "sandbox", "start_server"]


# --- what a server sends ------------------------------------------------------------------------------------


def incremental(changed: dict[int, bytes], kept: int) -> bytes:
    """`INCREMENTAL.<name>` as the server writes it."""
    numbers = sorted(changed)
    head = struct.pack(f"<III{len(numbers)}I", 0xD3AE1F0D, len(numbers), kept, *numbers)
    return head + bytes(-len(head) % 8192 if numbers else 0) + b"".join(changed[n] for n in numbers)


def laid_on(old: Sequence[bytes], changed: dict[int, bytes], kept: int) -> bytes:
    """As pg_combinebackup makes the file of it."""
    size = max([kept, *(number + 1 for number in changed)])
    before = dict(enumerate(old))
    return b"".join(changed.get(n) or before.get(n) or bytes(8192) for n in range(size))


def page(number: int, turn: int) -> bytes:
    return struct.pack("<II", number, turn) * 1024


files = st.tuples(
    st.integers(0, 300),  # pages before
    st.integers(0, 300),  # pages not cut off
    st.sets(st.integers(0, 300), max_size=30),
)


@settings(max_examples=50)
@given(files, files, st.lists(st.integers(20, 20000), min_size=1, max_size=4))
def test_what_changed_is_laid_onto_the_point_before(
    first: tuple[int, int, set[int]], second: tuple[int, int, set[int]], sizes: list[int]
) -> None:
    """However its bytes come, in the data directory and in a tablespace; the point restores as a full one."""
    engine = Engine()
    label = (
        b"START WAL LOCATION: 0/2000028\nINCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 1\nEND: x\n"
    )
    names = {"": "base/5/1", "16400": "PG_17_1/5/2"}
    given_files = dict(zip(names, (first, second), strict=True))

    def stored(parts: dict[str, dict[str, bytes]], *, onto: bool) -> RecoveryPoint:
        whole = {part: server_tar(files, ended=True) for part, files in parts.items()}
        messages = [(part, data) for part, tar in whole.items() for _, data in cut(tar, sizes)]
        made = io.BytesIO(b"".join(one_tar([*messages, ("backup_manifest", b"{}")], {}, onto=onto)))
        return engine.write(TarStream(made, paged=PAGED, page_size=PAGE_SIZE, onto=onto))

    old = {part: [page(n, 1) for n in range(before)] for part, (before, _, _) in given_files.items()}
    stored({part: {name: b"".join(old[part])} for part, name in names.items()}, onto=False)
    parts, expected = {}, {}
    for part, name in names.items():
        _, kept, numbers = given_files[part]
        changed = {n: page(n, 2) for n in numbers}
        folder, _, last = name.rpartition("/")
        parts[part] = {f"{folder}/INCREMENTAL.{last}": incremental(changed, kept)}
        expected[f"pg_tblspc/{part}/{name}" if part else name] = laid_on(old[part], changed, kept)
    parts[""] |= {"backup_label": label, "global/pg_control": b"c" * 8192}
    point = stored(parts, onto=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(engine.archive(point).tar()))) as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert found.pop("backup_label") == b"START WAL LOCATION: 0/2000028\nEND: x\n"
    assert found == {**expected, "global/pg_control": b"c" * 8192, "backup_manifest": b"{}"}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<III", 1, 0, 5),
        struct.pack("<III", 0xD3AE1F0D, 1, 5),
        incremental({1: page(1, 1)}, 5)[:-512],
        incremental({1: page(1, 1), 2: page(2, 1)}, 5).replace(
            struct.pack("<II", 1, 2), struct.pack("<II", 2, 1), 1
        ),
        b"short",
    ],
)
def test_a_form_that_is_not_known_makes_no_base(content: bytes) -> None:
    tar = server_tar({"base/5/INCREMENTAL.1": content}, ended=True)
    with pytest.raises(CaptureFailed):
        list(one_tar([("", tar)], {}, onto=True))


# --- on real servers ----------------------------------------------------------------------------------------


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
