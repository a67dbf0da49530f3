"""What happened here: one row a `Run`, in a sqlite file beside the agent.

The truth is in the repository. This file may be lost or damaged at any time: it is then put aside and begun
again, and `learn` fills it with what the repository can tell, so that nobody backs up twice for it.
Several processes write to it at once (a command while `serve` runs).
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

from backupd.errors import BackupdError, Interrupted, Locked, UsageError
from backupd.log import mask, run_context
from backupd.model import Clock, RecoveryPoint, Run, RunStatus

log = logging.getLogger(__name__)

T = TypeVar("T")

GOOD = (RunStatus.OK, RunStatus.WARNED)
"""The states of a run that did what it was for."""

_WAIT = 30.0  # seconds to wait for another process's write; each of ours takes milliseconds
_KEEP = timedelta(days=400)  # a year and a bit, so that last year's same day can still be compared
DIED = (
    "the agent ended in the middle of it; hint: what it stored is not a recovery point and does no harm, "
    "the next run takes its place"
)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_COLUMNS = (
    "id, job, source, status, started, finished, due, point, size, stored, message, warnings"  # of `Run`
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, job TEXT NOT NULL, source TEXT NOT NULL, status TEXT NOT NULL,
  started TEXT NOT NULL, finished TEXT, due TEXT, point TEXT NOT NULL,
  size INTEGER NOT NULL, stored INTEGER NOT NULL, message TEXT NOT NULL, warnings TEXT NOT NULL,
  agent TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS runs_by_source ON runs (job, source, started);
CREATE INDEX IF NOT EXISTS runs_by_time ON runs (started);
CREATE INDEX IF NOT EXISTS runs_by_point ON runs (point);
"""


def new_run_id(now: datetime) -> str:
    """A run's id: sorts by time, and no two are the same."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"


def default_path(env: Mapping[str, str]) -> Path:
    """Where the catalog lies: in the directory `$BACKUPD_STATE`; else for root in `/var/lib/backupd`, for
    others where the platform keeps the state of a user's programs."""
    if env.get("BACKUPD_STATE"):
        return Path(env["BACKUPD_STATE"]) / "catalog.sqlite"
    if os.geteuid() == 0:
        return Path("/var/lib/backupd/catalog.sqlite")
    from platformdirs import user_state_path

    return user_state_path("backupd") / "catalog.sqlite"


class Catalog:
    """The runs known here. Safe for several threads and several processes.

    Raises UsageError where the file cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._agent = uuid.uuid4().hex
        self._alive: IO[bytes] | None = None
        self._inode = -1
        self._db: sqlite3.Connection | None = None
        self._do(lambda db: db.total_changes)  # opens it: a directory that cannot be written is told now

    def __repr__(self) -> str:
        return f"Catalog({str(self.path)!r})"

    def close(self) -> None:
        """Runs of this process that are still RUNNING are abandoned from here on."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._alive is not None:
                # Unlinked first: once the lock is gone, another process may call this agent dead, rightly.
                with suppress(OSError):
                    self._alive_path(self._agent).unlink()
                self._alive.close()
                self._alive = None
                atexit.unregister(self.close)

    # --- writing ---------------------------------------------------------------------------------------

    def record(self, run: Run) -> None:
        """Insert the run, or replace what is known under its id. Secrets in its texts are masked."""
        agent = ""
        if run.status is RunStatus.RUNNING:
            self._show_alive()
            agent = self._agent
        row = (*_row(run), agent)
        marks = ", ".join("?" * len(row))
        self._do(
            lambda db: db.execute(f"INSERT OR REPLACE INTO runs ({_COLUMNS}, agent) VALUES ({marks})", row)  # noqa: S608
        )

    def abandon_stale(self, now: datetime) -> list[Run]:
        """Runs still RUNNING whose process is dead become ABANDONED; they are returned.

        Dead is: the file that a process keeps locked while it lives is not locked. The kernel lets go of it
        however the process ends, and it holds across containers that share the directory and after a reboot,
        where a process number would mean somebody else.
        """
        running = (RunStatus.RUNNING.value,)
        agents = self._do(
            lambda db: db.execute("SELECT DISTINCT agent FROM runs WHERE status = ?", running).fetchall()
        )
        stale = []
        for (agent,) in agents:
            if agent == self._agent or not self._is_dead(agent):
                continue
            # read only now: up to its death the agent may have ended its runs itself
            for run in self._select("WHERE status = ? AND agent = ?", (*running, agent)):
                ended = run._replace(status=RunStatus.ABANDONED, finished=now, message=DIED)
                self.record(ended)
                stale.append(ended)
        for path in self.path.parent.glob(
            f"{self.path.name}.alive-*"
        ):  # also of agents that left no run open
            if path != self._alive_path(self._agent):
                self._is_dead(path.name.rpartition("-")[2])
        return sorted(stale, key=lambda run: run.started)

    def learn(self, points: Iterable[RecoveryPoint]) -> int:
        """Add a good backup run for each recovery point that no run speaks of; how many were added.

        After the file was lost, and where the repository was filled from elsewhere.
        """
        rows = [
            (*_row(Run(f"point-{p.id}", "backup", p.source, RunStatus.WARNED if p.warnings else RunStatus.OK,
                       p.started, p.finished, None, p.id, p.size, p.stored, "", p.warnings)), p.id)
            for p in points
        ]  # fmt: skip
        marks = ", ".join("?" * 12)

        def insert(db: sqlite3.Connection) -> int:
            db.execute("BEGIN IMMEDIATE")
            with db:
                return db.executemany(
                    f"INSERT OR IGNORE INTO runs ({_COLUMNS}) SELECT {marks} "  # noqa: S608
                    "WHERE NOT EXISTS (SELECT 1 FROM runs WHERE point = ?)",
                    rows,
                ).rowcount

        return self._do(insert) if rows else 0

    def forget(self, now: datetime) -> int:
        """Drop runs older than 400 days, but never the newest good one of a job and source; how many went."""
        return self._do(
            lambda db: (
                db.execute(
                    "DELETE FROM runs WHERE started < ? AND id NOT IN (SELECT id FROM"
                    " (SELECT id, max(started) FROM runs WHERE status IN (?, ?) GROUP BY job, source))",
                    (_text(now - _KEEP), *GOOD),
                ).rowcount
            )
        )

    # --- reading ---------------------------------------------------------------------------------------

    def runs(self, source: str | None = None, job: str | None = None, limit: int = 100) -> list[Run]:
        """The newest `limit` runs, newest first."""
        where = [f"{column} = ?" for column, value in (("source", source), ("job", job)) if value is not None]
        values = [value for value in (source, job) if value is not None]
        clause = "WHERE " + " AND ".join(where) if where else ""
        return self._select(f"{clause} ORDER BY started DESC, id DESC LIMIT ?", (*values, limit))

    def last(self, job: str, source: str, *statuses: RunStatus) -> Run | None:
        """The run that started last, of those `statuses` if any are given."""
        clause = f" AND status IN ({', '.join('?' * len(statuses))})" if statuses else ""
        rows = self._select(
            f"WHERE job = ? AND source = ?{clause} ORDER BY started DESC, id DESC LIMIT 1",
            (job, source, *statuses),
        )
        return rows[0] if rows else None

    def last_ok(self, job: str, source: str) -> Run | None:
        """The run that started last of those that ended well, with or without warnings."""
        return self.last(job, source, *GOOD)

    def began(self) -> datetime | None:
        """When the oldest run that is known here started."""
        rows = self._select("ORDER BY started LIMIT 1", ())
        return rows[0].started if rows else None

    def running(self) -> list[Run]:
        """Runs at work now, here or in another process; call `abandon_stale` first to be sure of it."""
        return self._select("WHERE status = ? ORDER BY started", (RunStatus.RUNNING.value,))

    # --- sqlite ----------------------------------------------------------------------------------------

    def _select(self, clause: str, values: Sequence[object]) -> list[Run]:
        rows: list[tuple[Any, ...]] = self._do(
            lambda db: db.execute(f"SELECT {_COLUMNS} FROM runs {clause}", tuple(values)).fetchall()  # noqa: S608
        )
        return [_run(row) for row in rows]

    def _do(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Carry out on an open, sound file; a damaged one is put aside and begun again once."""
        with self._lock:
            try:
                try:
                    return action(self._connection())
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._put_aside(str(error))
                    return action(self._connection())
            except (sqlite3.Error, OSError) as error:
                raise UsageError(
                    f"the catalog {self.path} cannot be used: {error}",
                    hint="set BACKUPD_STATE to a directory that this user may write, with room on its disk",
                ) from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None:
            # The file may have been deleted or put aside by another process: what is open is then nobody's.
            with suppress(OSError):
                if self.path.stat().st_ino == self._inode:
                    return self._db
            self._db.close()
            self._db = None
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # autocommit; `_lock` serialises the threads, so that one connection may serve them all
        db = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            with suppress(
                sqlite3.OperationalError
            ):  # a file system without shared memory keeps the old journal
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_SCHEMA)
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise _damaged(verdict)
            self._inode = self.path.stat().st_ino
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _put_aside(self, why: str) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        with _locked(self.path.with_name(self.path.name + ".repair")):
            try:  # another process may have done it while this one waited
                self._connection()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
            else:
                return
            aside = self.path.with_name(f"{self.path.name}.damaged-{uuid.uuid4().hex[:8]}")
            self.path.rename(aside)
            for suffix in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + suffix).rename(aside.with_name(aside.name + suffix))
        log.warning(
            "the catalog %s was damaged (%s); it was put aside as %s and begun again: "
            "only the history of runs is lost, no recovery point",
            self.path,
            why,
            aside.name,
        )

    # --- who is alive ----------------------------------------------------------------------------------

    def _alive_path(self, agent: str) -> Path:
        return self.path.with_name(f"{self.path.name}.alive-{agent}")

    def _show_alive(self) -> None:
        with self._lock:
            while self._alive is None:
                path = self._alive_path(self._agent)
                try:
                    file = path.open("wb")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    # another process may have swept the file away before it was locked
                    with suppress(FileNotFoundError):
                        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                            self._alive = file
                            atexit.register(self.close)  # leave no file behind
                            return
                    file.close()
                except OSError as error:
                    raise UsageError(
                        f"cannot write beside the catalog {self.path}: {error}",
                        hint="set BACKUPD_STATE to a directory that this user may write",
                    ) from error

    def _is_dead(self, agent: str) -> bool:
        """Whether its process has ended; its file is then removed."""
        path = self._alive_path(agent)
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)  # while locked: see `_show_alive`
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True


def carry_out(
    catalog: Catalog,
    job: str,
    source: str,
    work: Callable[[], Run],
    *,
    clock: Clock,
    due: datetime | None = None,
    run_id: str = "",
) -> Run:
    """Do the work and keep its record: RUNNING from now, then what it came to.

    The run that `work` returns is recorded under this record's own id, job, source, start and due time. What
    it raises is recorded (Interrupted as ABANDONED, Locked as REFUSED, everything else as FAILED with message
    and hint) and raised again. A record that cannot be written is logged and stops nothing: a backup matters
    more than its history.
    """
    started = clock()
    run = Run(run_id or new_run_id(started), job, source, RunStatus.RUNNING, started, due=due)
    record_or_log(catalog, run)
    with run_context(run=run.id, job=job, source=source):
        try:
            done = work()
        except BaseException as error:
            status = RunStatus.FAILED
            if isinstance(error, Interrupted | KeyboardInterrupt):
                status = RunStatus.ABANDONED
            elif isinstance(error, Locked):
                status = RunStatus.REFUSED
            record_or_log(catalog, run._replace(status=status, finished=clock(), message=explain(error)))
            raise
        done = done._replace(
            id=run.id,
            job=job,
            source=source,
            started=started,
            due=due,
            finished=done.finished or clock(),
        )
        record_or_log(catalog, done)
        return done


def explain(error: BaseException) -> str:
    """An error as the message of a run: what happened; then what to do, where that is known."""
    if isinstance(error, BackupdError):
        return mask(f"{error.message}; hint: {error.hint}" if error.hint else error.message)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return mask(f"{type(error).__name__}: {error}")


def record_or_log(catalog: Catalog, run: Run) -> None:
    """Record a run; where that is not possible, say so and go on."""
    try:
        catalog.record(run)
    except BackupdError as error:
        log.error("run %s (%s) was not recorded: %s", run.id, run.status.value, explain(error))


# --- rows ------------------------------------------------------------------------------------------------


def _text(instant: datetime) -> str:
    """Fixed width, so that texts sort as their instants do."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds")


def _row(run: Run) -> tuple[object, ...]:
    return (
        run.id,
        run.job,
        run.source,
        run.status.value,
        _text(run.started),
        _text(run.finished) if run.finished else None,
        _text(run.due) if run.due else None,
        run.point,
        run.size,
        run.stored,
        mask(run.message),
        json.dumps([mask(warning) for warning in run.warnings]),
    )


def _run(row: Sequence[Any]) -> Run:
    return Run(
        id=row[0],
        job=row[1],
        source=row[2],
        status=RunStatus(row[3]),
        started=datetime.fromisoformat(row[4]),
        finished=datetime.fromisoformat(row[5]) if row[5] else None,
        due=datetime.fromisoformat(row[6]) if row[6] else None,
        point=row[7],
        size=row[8],
        stored=row[9],
        message=row[10],
        warnings=tuple(json.loads(row[11])),
    )


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)  # absent on errors that Python itself raises
    return code is not None and code & 0xFF in _DAMAGE


def _damaged(text: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(text)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
