"""A dump and the log that follows it laid into a fresh container as an append-only file, which the server loads.

While it loads one, also the dump at its front, nothing expires and nobody else is heard, and each command is executed
as a replica would: so the server comes to what its original held, keys included whose time has passed since. Then it is
a master: those keys go, as they would have gone there.

A server with `appendonly no` does not look at such a file. Then a second server in the same container, reached by
nobody, loads it and saves a dump, which the first finds when it starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import BinaryIO, cast

from backupd.drivers import _tarstream
from backupd.drivers.redis_home import Home, Replay, fresh_server, layout
from backupd.drivers.redis_stream import complete, select
from backupd.drivers.redis_wire import Connection, RedisAddress, RedisError
from backupd.errors import CommandFailed, ContainerError, Damaged, RestoreFailed
from backupd.model import Anchor, Container, LogSpan, RecoveryPoint

ASIDE = "backupd-restore"
"""Directory in the server's own where the second server works."""
REPORT = "backupd_recovery.json"
_CHUNK = 1 << 20

LOAD_AND_SAVE = """
cd "$1" || exit
"$2-server" --dir "$1" --port 0 --unixsocket "$1/socket" --save '' --databases "$3" --appendonly yes \
  >log 2>&1 &
server=$!
until answer=$("$2-cli" -s socket ping 2>&1) && [ "$answer" = PONG ]; do
  kill -0 $server 2>/dev/null || { tail -n 5 log >&2; exit 1; }
  sleep 0.1
done
answer=$("$2-cli" -s socket save)
"$2-cli" -s socket shutdown nosave
wait $server
[ "$answer" = OK ] || { echo "it could not save: $answer" >&2; tail -n 5 log >&2; exit 1; }
mv dump.rdb "../$4" && cd .. && rm -r "$1"
"""
"""The directory, `redis` or `valkey`, the number of databases, the dump's name."""


# --- how far the log is replayed ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Landing:
    """Where a replay ends."""

    position: int
    at: datetime | None
    """The server is as it was then, exactly; None: later than that, at the end of the log."""
    after: datetime | None = None
    """The next instant that is known, where more was executed by then."""
    until: datetime | None = None
    """Where `at` is None: all that was executed by then is in it."""


@dataclass(slots=True)
class Course:
    """Finds where a replay to an instant ends, from the anchors as they come. None: at the end of the log. Pure."""

    to: datetime | None
    last: Anchor
    """All that is known before the log is read: the point's own."""
    over: Anchor | None = None
    """The first behind the instant."""

    def note(self, anchors: Iterable[Anchor]) -> None:
        """In the order of the log."""
        for anchor in anchors:
            if anchor.position < self.last.position or self.over is not None:
                continue
            if self.to is None or anchor.at <= self.to:
                self.last = max(self.last, anchor, key=lambda one: (one.at, one.position))
            else:
                self.over = anchor

    def landing(self) -> Landing:
        """Where the server stood still between two anchors, it was the same at every instant between."""
        if self.to is not None and self.over is not None and self.over.position == self.last.position:
            return Landing(self.last.position, self.to)
        return Landing(self.last.position, self.last.at, self.over.at if self.over else None)


@dataclass(slots=True)
class Spool:
    """The log of a restore on this machine's disk: how much of it is replayed is known only when it was read."""

    file: BinaryIO
    start: int
    end: int
    landing: Landing = field(default_factory=lambda: Landing(0, None))

    def replay(self, database: int) -> Replay:
        """From its start to the landing, by a server that begins in database 0."""
        first = select(database)
        return Replay(len(first) + self.landing.position - self.start, self._chunks(first))

    def _chunks(self, first: bytes) -> Iterator[bytes]:
        yield first
        self.file.seek(0)
        left = self.landing.position - self.start
        while left and (chunk := self.file.read(min(left, _CHUNK))):
            left -= len(chunk)
            yield chunk


def spool(logs: Iterable[tuple[LogSpan, bytes]], point: RecoveryPoint, at: datetime | None) -> Spool:
    """Read the log as far as it is needed. The spool's file is gone when it is closed.

    Raises RestoreFailed where the log does not reach from the base's start to its end, Damaged where it is no stream of
    commands.
    """
    start, end = (cast("int", point.attributes[name]) for name in ("start", "end"))
    course = Course(at, Anchor(point.instant, end))
    file = cast("BinaryIO", tempfile.TemporaryFile(prefix="backupd-log-"))  # noqa: SIM115  handed out
    try:
        reached = start
        for span, data in logs:
            if span.start > reached:
                break
            file.write(data[reached - span.start :])
            reached = max(reached, span.end)
            course.note(span.anchors)
            if course.over is not None and reached >= course.last.position:
                break
        if reached < course.last.position:
            raise RestoreFailed(
                f"the log ends at {reached}; this restore needs it from {start} to {course.last.position}",
                hint="choose another point: backupd list",
            )
        found = Spool(file, start, reached, course.landing())
        if at is None:
            found.landing = _to_the_end(found)
        _refuse_torn(found)
    except BaseException:
        file.close()
        raise
    return found


def _to_the_end(found: Spool) -> Landing:
    """The last whole command of all; what is behind the last anchor is searched for it."""
    import mmap

    known = found.landing
    found.file.flush()
    if found.end == known.position:
        return known
    with closing(mmap.mmap(found.file.fileno(), 0, access=mmap.ACCESS_READ)) as log:
        position = found.start + complete(log, known.position - found.start)
    return known if position == known.position else Landing(position, None, until=known.at)


def _refuse_torn(found: Spool) -> None:
    """Both ends of what is replayed lie between two commands."""
    size = found.landing.position - found.start
    if not size:
        return
    found.file.seek(0)
    first = found.file.read(1)
    found.file.seek(size - 2)
    around = found.file.read(3)
    if first != b"*" or around[:2] != b"\r\n" or around[2:] not in (b"", b"*"):
        raise Damaged(
            f"the log from {found.start} to {found.landing.position} is no row of whole commands",
            hint="a fault of the recorder: report it, and restore to another instant",
        )


# --- into a container ----------------------------------------------------------------------------------------


def bring_back_log(
    container: Container,
    address: RedisAddress,
    size: int,
    dump: Iterable[bytes],
    replay: Replay,
    report: bytes,
) -> None:
    """Lay a dump, and what is replayed on it, into a container that holds nothing. It is stopped then.

    Raises RestoreFailed, with nothing changed, where it holds data already.
    """
    with fresh_server(container, address) as (server, home):
        if not home.appendonly:
            try:
                server.call(
                    "CONFIG", "SET", "save", ""
                )  # for certain: else it overwrites the dump when it is stopped
            except RedisError as error:
                raise RestoreFailed(
                    f"{container.name} cannot be told not to save: {error.message}",
                    hint="make the container with `--appendonly yes`",
                ) from error
            _load_aside(container, home, server.info("server"), size, dump, replay, _databases(server))
    container.stop()
    if home.appendonly:
        container.write(home.directory, layout(home, size, dump, replay))
    entry = _tarstream.entry(REPORT, size=len(report), uid=home.uid, gid=home.gid)
    container.write(home.directory, [entry, report, _tarstream.padding(len(report)), _tarstream.END])


def _databases(server: Connection) -> int:
    found = server.config("databases").get("databases", "")
    return int(found) if found.isdigit() else 16


def _load_aside(
    container: Container,
    home: Home,
    about: dict[str, str],
    size: int,
    dump: Iterable[bytes],
    replay: Replay,
    databases: int,
) -> None:
    directory = f"{home.directory.rstrip('/')}/{ASIDE}"
    aside = replace(home, directory=directory, dbfilename="dump.rdb", appendonly=True,
                    appenddirname=Home.appenddirname, appendfilename=Home.appendfilename)  # fmt: skip
    folder = _tarstream.entry(f"{ASIDE}/", mode=0o755, uid=home.uid, gid=home.gid)
    container.write(home.directory, [folder, _tarstream.END])
    container.write(directory, layout(aside, size, dump, replay))
    program = about.get("server_name", "redis")
    argv = ("sh", "-c", LOAD_AND_SAVE, "sh", directory, program, str(databases), home.dbfilename)
    try:
        for _ in container.exec(argv, user=f"{home.uid}:{home.gid}"):
            pass
    except (CommandFailed, ContainerError) as error:
        said = getattr(error, "stderr", "").strip()[-500:]
        raise RestoreFailed(
            f"a server in {container.name} could not load the log: {said or error.message}",
            hint=error.hint
            or "is the container's version the source's own, its disk and memory large enough?",
        ) from error
