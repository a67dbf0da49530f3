"""The history of runs: kept across processes, honest about a killed agent, and never in the way."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd import log
from backupd.catalog import Catalog, carry_out, default_path, new_run_id
from backupd.errors import CaptureFailed, Interrupted, Locked, UsageError
from backupd.model import PointKind, RecoveryPoint, Run, RunStatus

T0 = datetime(2026, 5, 1, 2, 0, tzinfo=UTC)


def run(number: int, status: RunStatus = RunStatus.OK, source: str = "orders", job: str = "backup") -> Run:
    started = T0 + timedelta(hours=number)
    return Run(f"r{number:03}", job, source, status, started, started + timedelta(minutes=1))


def point(ident: str, source: str = "orders", warnings: tuple[str, ...] = ()) -> RecoveryPoint:
    return RecoveryPoint(
        ident, source, "volume", PointKind.FULL, T0, T0, T0 + timedelta(seconds=5), 10, 4, 1, warnings
    )


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "state" / "catalog.sqlite")
    yield catalog
    catalog.close()


texts = st.text(st.characters(codec="utf-8"), max_size=20)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


@given(
    st.builds(
        Run,
        id=texts,
        job=texts,
        source=texts,
        status=st.sampled_from(RunStatus),
        started=moments,
        finished=st.none() | moments,
        due=st.none() | moments,
        point=texts,
        size=st.integers(0, 2**62),
        stored=st.integers(0, 2**62),
        message=texts,
        warnings=st.lists(texts, max_size=3).map(tuple),
    )
)
def test_a_run_comes_back_as_it_was_recorded(original: Run) -> None:
    with tempfile.TemporaryDirectory() as directory:
        catalog = Catalog(Path(directory) / "c.sqlite")
        catalog.record(original)
        assert catalog.runs() == [original]
        catalog.close()


def test_a_run_recorded_again_under_its_id_replaces_the_first(catalog: Catalog) -> None:
    catalog.record(Run("r1", "backup", "orders", RunStatus.RUNNING, T0))
    catalog.record(Run("r1", "backup", "orders", RunStatus.OK, T0, T0 + timedelta(seconds=9), point="p1"))
    assert [(r.id, r.status, r.point) for r in catalog.runs()] == [("r1", RunStatus.OK, "p1")]


def test_runs_come_newest_first_and_can_be_narrowed(catalog: Catalog) -> None:
    for n in (2, 0, 1):
        catalog.record(run(n))
    catalog.record(run(5, source="vectors"))
    catalog.record(run(6, job="prune"))
    assert [r.id for r in catalog.runs()] == ["r006", "r005", "r002", "r001", "r000"]
    assert [r.id for r in catalog.runs(source="orders", job="backup")] == ["r002", "r001", "r000"]
    assert [r.id for r in catalog.runs(limit=1)] == ["r006"]


def test_the_last_good_run_is_the_newest_that_ended_well(catalog: Catalog) -> None:
    assert catalog.last("backup", "orders") is None
    assert catalog.last_ok("backup", "orders") is None
    catalog.record(run(1, RunStatus.OK))
    catalog.record(run(2, RunStatus.WARNED))
    for n, status in enumerate(set(RunStatus) - {RunStatus.OK, RunStatus.WARNED}, start=3):
        catalog.record(run(n, status))
    catalog.record(run(90, source="vectors"))
    last_ok = catalog.last_ok("backup", "orders")
    last = catalog.last("backup", "orders")
    assert last_ok is not None and last_ok.id == "r002"
    assert last is not None and last.started == T0 + timedelta(hours=7)


AGENT = """
import sys, time
from datetime import UTC, datetime
from pathlib import Path
from backupd.catalog import Catalog
from backupd.model import Run, RunStatus
catalog = Catalog(Path(sys.argv[1]))
catalog.record(Run(sys.argv[2], "backup", "orders", RunStatus.RUNNING, datetime(2026, 5, 1, tzinfo=UTC)))
print("running", flush=True)
time.sleep(60)
"""


def start_agent(path: Path, run_id: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(path), run_id], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


def test_the_run_of_a_killed_agent_is_abandoned_and_that_of_a_living_one_is_not(catalog: Catalog) -> None:
    """Whoever was killed by SIGKILL could not say so: the next agent says it."""
    killed, alive = start_agent(catalog.path, "killed"), start_agent(catalog.path, "alive")
    try:
        catalog.record(Run("mine", "backup", "vectors", RunStatus.RUNNING, T0))
        assert catalog.abandon_stale(T0) == []
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        now = T0 + timedelta(hours=3)
        assert [(r.id, r.status, r.finished) for r in catalog.abandon_stale(now)] == [
            ("killed", RunStatus.ABANDONED, now)
        ]
        assert {r.id for r in catalog.running()} == {"mine", "alive"}
        assert catalog.abandon_stale(now) == []
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    assert [r.id for r in catalog.abandon_stale(T0)] == ["alive"]
    catalog.close()
    assert list(catalog.path.parent.glob("*.alive-*")) == []  # nothing is left beside the file


def test_a_process_number_given_to_somebody_else_does_not_keep_a_dead_run_alive(catalog: Catalog) -> None:
    """In a container every agent is process 1: the number proves nothing, the lock does."""
    agent = start_agent(catalog.path, "first")
    agent.kill()
    agent.wait()
    again = Catalog(catalog.path)  # a new agent at work, perhaps under the same number
    again.record(Run("second", "backup", "orders", RunStatus.RUNNING, T0))
    assert [r.id for r in again.abandon_stale(T0)] == ["first"]
    again.close()
    assert agent.stdout is not None
    agent.stdout.close()


@pytest.mark.parametrize(
    "damage", [b"", b"this is not a database " * 400, None], ids=["empty", "text", "middle"]
)
def test_a_damaged_file_is_put_aside_with_a_warning_and_begun_again(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "catalog.sqlite"
    first = Catalog(path)
    for n in range(200):
        first.record(run(n))
    first.close()
    if damage is None:  # the header is whole, the pages are not
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(3 * 4096))
    else:
        path.write_bytes(damage)
    second = Catalog(path)
    assert second.runs() == []
    second.record(run(1))
    assert [r.id for r in second.runs()] == ["r001"]
    second.close()
    if damage != b"":  # an empty file is a new database for sqlite: nothing is there to be kept
        assert len(list(tmp_path.glob("catalog.sqlite.damaged-????????"))) == 1
        assert "begun again" in caplog.text


def test_damage_that_comes_while_the_catalog_is_open_stops_nobody(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.sqlite")
    catalog.record(run(1))
    (tmp_path / "catalog.sqlite").unlink()
    catalog.record(run(2))
    assert [r.id for r in catalog.runs()] == ["r002"]
    other = Catalog(tmp_path / "catalog.sqlite")  # and it is the same file that others see
    assert [r.id for r in other.runs()] == ["r002"]
    catalog.close()
    other.close()


def test_a_lost_history_is_learned_from_the_recovery_points(catalog: Catalog) -> None:
    """Otherwise every source would be backed up at once after the loss of a small file."""
    catalog.record(Run("r1", "backup", "orders", RunStatus.OK, T0, T0, point="p1"))
    assert catalog.learn([point("p1"), point("p2", "vectors", ("one file vanished",))]) == 1
    assert catalog.learn([point("p1"), point("p2", "vectors")]) == 0
    learned = catalog.last_ok("backup", "vectors")
    assert learned is not None
    assert (learned.point, learned.status, learned.started, learned.size) == ("p2", RunStatus.WARNED, T0, 10)
    assert len(catalog.runs()) == 2


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    script = (
        "import sys; from pathlib import Path; from tests.test_catalog import *\n"
        "c = Catalog(Path(sys.argv[1]))\n"
        "for n in range(60): c.record(Run(f'{sys.argv[2]}-{n}', 'backup', 'orders', RunStatus.OK, T0))\n"
    )
    root = Path(__file__).parent.parent
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(k)], cwd=root) for k in range(3)
    ]
    assert [process.wait() for process in writers] == [0, 0, 0]
    catalog = Catalog(path)
    assert len(catalog.runs(limit=1000)) == 180
    catalog.close()


def test_threads_share_one_catalog(catalog: Catalog) -> None:
    def record_many(numbers: range) -> None:
        for number in numbers:
            catalog.record(run(number))

    threads = [threading.Thread(target=record_many, args=(range(100 * k, 100 * k + 30),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.runs(limit=1000)) == 120


def test_what_is_very_old_is_forgotten_but_never_the_last_good_run(catalog: Catalog) -> None:
    catalog.record(run(0))
    catalog.record(run(1, RunStatus.FAILED))
    catalog.record(run(2, source="vectors"))
    catalog.record(run(3, source="vectors"))
    assert catalog.forget(T0 + timedelta(days=300)) == 0
    assert catalog.forget(T0 + timedelta(days=401)) == 2
    assert {r.id for r in catalog.runs()} == {"r000", "r003"}


def test_a_directory_that_cannot_be_written_is_told_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as raised:
        Catalog(tmp_path / "file" / "catalog.sqlite")
    assert "BACKUPD_STATE" in raised.value.hint


def test_a_newer_file_with_foreign_columns_is_not_taken_for_damage(tmp_path: Path) -> None:
    """Only what sqlite itself calls damaged is put aside."""
    path = tmp_path / "catalog.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE runs (something TEXT)")
    db.close()
    with pytest.raises(UsageError):
        Catalog(path)
    assert [p.name for p in tmp_path.glob("*damaged*")] == []


def test_no_secret_is_kept(catalog: Catalog) -> None:
    log.hide("hunter2-in-the-history")
    catalog.record(
        Run("r1", "backup", "orders", RunStatus.FAILED, T0, message="no: hunter2-in-the-history",
            warnings=("hunter2-in-the-history?",))
    )  # fmt: skip
    assert catalog.runs()[0].message == "no: ***"
    assert catalog.runs()[0].warnings == ("***?",)


def test_run_ids_sort_by_time_and_differ() -> None:
    early, late = new_run_id(T0), new_run_id(T0 + timedelta(seconds=1))
    assert early < late
    assert new_run_id(T0) != new_run_id(T0)


def test_the_state_lies_where_the_environment_says() -> None:
    assert default_path({"BACKUPD_STATE": "/state"}) == Path("/state/catalog.sqlite")
    assert default_path({}).name == "catalog.sqlite"


# --- carry_out ---------------------------------------------------------------------------------------------


def test_work_is_on_record_while_it_is_done_and_after(catalog: Catalog) -> None:
    seen: list[RunStatus] = []

    def work() -> Run:
        seen.extend(r.status for r in catalog.runs())
        return Run("its-own-id", "backup", "orders", RunStatus.WARNED, T0, point="p9", warnings=("hm",))

    done = carry_out(catalog, "backup", "orders", work, clock=lambda: T0, due=T0)
    assert seen == [RunStatus.RUNNING]
    assert catalog.runs() == [done]
    assert (done.status, done.point, done.due, done.finished, done.warnings) == (
        RunStatus.WARNED, "p9", T0, T0, ("hm",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CaptureFailed("pg_dump ended with 1", hint="look at its last line"), RunStatus.FAILED,
         "pg_dump ended with 1; hint: look at its last line"),
        (Locked("another is at work"), RunStatus.REFUSED, "another is at work"),
        (Interrupted("told to stop"), RunStatus.ABANDONED, "told to stop"),
        (KeyboardInterrupt(), RunStatus.ABANDONED, "interrupted"),
        (ZeroDivisionError("oops"), RunStatus.FAILED, "ZeroDivisionError: oops"),
        (SystemExit(3), RunStatus.FAILED, "SystemExit: 3"),
    ],
)  # fmt: skip
def test_what_work_raises_is_recorded_and_raised_again(
    catalog: Catalog, error: BaseException, status: RunStatus, message: str
) -> None:
    def work() -> Run:
        raise error

    with pytest.raises(type(error)):
        carry_out(catalog, "backup", "orders", work, clock=lambda: T0)
    assert [(r.status, r.message, r.finished) for r in catalog.runs()] == [(status, message, T0)]


def test_a_history_that_cannot_be_written_does_not_stop_a_backup(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> Run:
        catalog.close()
        catalog.path = Path("/proc/no/catalog.sqlite")  # from here on nothing can be written
        return Run("x", "backup", "orders", RunStatus.OK, T0)

    done = carry_out(catalog, "backup", "orders", work, clock=lambda: T0)
    assert done.status is RunStatus.OK
    assert "was not recorded" in caplog.text
