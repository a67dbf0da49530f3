"""A dump and the log that follows it laid into a fresh container as an append-only file, which the server loads.

While it loads one, also the dump at its front, nothing expires and nobody else is heard, and each command is executed
as a replica would: so the server comes to what its original held, keys included whose time has passed since. Then it is
a master: those keys go, as they would have gone there, or a last command has given them new time (`redis_expiry`).

A server with `appendonly no` does not look at such a file. Then a second server in the same container, reached by
nobody, loads it and saves a dump, which the first finds when it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain

from backupd.chain import need_of
from backupd.drivers import _tarstream
from backupd.drivers.redis_expiry import keeping, refuse_old
from backupd.drivers.redis_home import Home, fresh_server, layout, reach
from backupd.drivers.redis_stream import complete, select
from backupd.drivers.redis_wire import Connection, RedisAddress, RedisError
from backupd.errors import CommandFailed, Damaged, RestoreFailed
from backupd.model import Anchor, Container, LogSpan, RecoveryPoint

ASIDE = "backupd-restore"
"""Directory in the server's own where the second server works."""
REPORT = "backupd_recovery.json"

LOAD_AND_SAVE = """
folder=$1 program=$2 databases=$3 dump=$4
shift 4
cd "$folder" || exit
"$program-server" --dir "$folder" --port 0 --unixsocket "$folder/socket" --save '' --databases "$databases" \
  --appendonly yes "$@" >log 2>&1 &
server=$!
until answer=$("$program-cli" -s socket ping 2>&1) && [ "$answer" = PONG ]; do
  kill -0 $server 2>/dev/null || { tail -n 5 log >&2; exit 1; }
  sleep 0.1
done
answer=$("$program-cli" -s socket save)
"$program-cli" -s socket shutdown nosave
wait $server
[ "$answer" = OK ] || { echo "it could not save: $answer" >&2; tail -n 5 log >&2; exit 1; }
mv dump.rdb "../$dump" && cd .. && rm -r "$folder"
"""
"""The directory, `redis` or `valkey`, the number of databases, the dump's name; options for the server."""
APPEND = 'exec cat >>"$1"'
PUT_IN_PLACE = """
cd "$1/.." && rm -rf "$2" && mv "$1/$2" "$2" && rmdir "$1"
"""
"""The directory, and what of it takes the place of the running, empty server's own, which is written no more."""


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

    @property
    def known(self) -> datetime | None:
        """The nearest instant that is known of it, at or before."""
        return self.at or self.until


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


class Replay:
    """The log of a restore on its way: from the base's start on, with where it is to be cut known at its end.
    `alone`: there is none, and the point is restored as it is."""

    def __init__(self, point: RecoveryPoint, at: datetime | None, *, alone: bool = False) -> None:
        self.point = point.attributes
        need, database = None if alone else need_of(point), point.attributes.get("stream_database")
        self.start, end = (need.start, need.end) if need else (0, 0)
        self.first = select(database if isinstance(database, int) else 0)
        """A server that loads a file begins in database 0."""
        self._at = at
        self._course = Course(at, Anchor(point.instant, end))
        self._reached = self.start
        self._before = b""  # the last two bytes
        self._seam = b""  # what lies around the last anchor
        self._tail = bytearray()  # what came behind it, where the restore is to the end

    def chunks(self, logs: Iterable[tuple[LogSpan, bytes]]) -> Iterator[bytes]:
        """As much of the log as is needed, and a little more.

        Raises RestoreFailed where it does not reach from the base's start to its end.
        """
        course = self._course
        for span, data in logs:
            if span.start > self._reached:
                break
            if self._reached == self.start and data[self.start - span.start :][:1] not in (b"", b"*"):
                raise self._torn(self.start)
            yield data[self._reached - span.start :]
            self._reached = max(self._reached, span.end)
            course.note(span.anchors)
            self._look(span, data)
            if course.over is not None and self._reached >= course.last.position:
                break
        if self._reached < course.last.position:
            raise RestoreFailed(
                f"the log ends at {self._reached}; this restore needs it from {self.start} to {course.last.position}",
                hint="choose another point: backupd list",
            )

    def _look(self, span: LogSpan, data: bytes) -> None:
        at = self._course.last.position - span.start
        if 0 <= at <= len(data):
            self._seam = (self._before + data[max(0, at - 2) : at])[-2:] + data[at : at + 1]
            self._tail.clear()
        if self._at is None:
            self._tail += data[max(0, at) :]
        self._before = (self._before + data[-2:])[-2:]

    def landing(self) -> Landing:
        """Once all was passed on. Raises Damaged where it lies within a command."""
        known = self._course.landing()
        if known.position > self.start and self._seam not in (b"\r\n", b"\r\n*"):
            raise self._torn(known.position)
        if self._at is not None:
            return known
        more = complete(self._tail)
        return Landing(known.position + more, None, until=known.at) if more else known

    def _torn(self, position: int) -> Damaged:
        return Damaged(
            f"no command begins at {position} of the log",
            hint="a fault of the recorder: report it, and restore to another instant",
        )


# --- into a container ----------------------------------------------------------------------------------------


def bring_back_log(
    container: Container,
    address: RedisAddress,
    base: tuple[int, Iterable[bytes]],
    replay: Replay,
    logs: Iterable[tuple[LogSpan, bytes]],
    *,
    keep: bool = False,
) -> tuple[str, Landing]:
    """Lay a dump, of known size, and the log that is replayed on it into a container that holds nothing. It is stopped
    then. `keep`: what has expired since is kept. Returns the server's directory, and where it will land.

    Raises RestoreFailed, with nothing changed, where it holds data already, cannot take the dump, or cannot keep what
    has expired.
    """
    with fresh_server(container, address, replay.point) as (server, home):
        if keep:
            refuse_old(server.info("server"))
        if not home.appendonly:
            _refuse_saving(server, container)
        folder = f"{home.directory.rstrip('/')}/{ASIDE}"
        names = Home() if not home.appendonly else home
        aside = replace(names, directory=folder, dbfilename="dump.rdb", appendonly=True, major=home.major,
                        uid=home.uid, gid=home.gid)  # fmt: skip
        entry = _tarstream.entry(f"{ASIDE}/", mode=0o755, uid=home.uid, gid=home.gid)
        container.write(home.directory, [entry, _tarstream.END])
        container.write(folder, layout(aside, *base, alone=False))
        landing = _append(container, aside, base[0], replay, logs)
        if keep:
            _keep(container, address, aside, landing)
        if home.appendonly:
            last = home.appenddirname if home.major >= 7 else home.appendfilename
            _put_in_place(container, home, folder, last)
        else:
            program = server.info("server").get("server_name", "redis")
            databases = server.config("databases").get("databases", "16")
            words = folder, program, databases, home.dbfilename, *loading_modules(server)
            _run(container, home, LOAD_AND_SAVE, *words)
    container.stop()
    return home.directory, landing


def loading_modules(server: Connection) -> list[str]:
    """The options by which another server loads the modules that this one has. Before version 7 none tells where they
    are."""
    listed = server.call("MODULE", "LIST")
    words: list[bytes] = []
    for module in listed if isinstance(listed, list) else []:
        flat = module if isinstance(module, list) else []
        told = {
            name: value for name, value in zip(flat[::2], flat[1::2], strict=False) if isinstance(name, bytes)
        }
        match told.get(b"path"), told.get(b"args"):
            case bytes(path), list(given) if path:
                words += [b"--loadmodule", path, *(word for word in given if isinstance(word, bytes))]
    return [word.decode(errors="surrogateescape") for word in words]


def _refuse_saving(server: Connection, container: Container) -> None:
    """It would overwrite the dump when it is stopped."""
    try:
        server.call("CONFIG", "SET", "save", "")
    except RedisError as error:
        raise RestoreFailed(
            f"{container.name} cannot be told not to save: {error.message}",
            hint="make the container with `--appendonly yes`",
        ) from error


def _append(
    container: Container, home: Home, size: int, replay: Replay, logs: Iterable[tuple[LogSpan, bytes]]
) -> Landing:
    """How much of the log is wanted is known when it was read: it is cut there then."""
    name, before = _log_of(home), 0 if home.major >= 7 else size
    _run(container, home, APPEND, name, stdin=chain([replay.first], replay.chunks(logs)))
    landing = replay.landing()
    whole = before + len(replay.first) + landing.position - replay.start
    _run(container, home, 'exec truncate -s "$2" "$1"', name, str(whole))
    return landing


def _keep(container: Container, address: RedisAddress, home: Home, landing: Landing) -> None:
    """As the last command, with the clock read when all before it is there. A connection of its own: the first one was
    silent for as long as that took."""
    assert landing.known is not None  # noqa: S101  every replay begins at an anchor
    with reach(container, address) as server:
        last = keeping(server, landing.known)
    _run(container, home, APPEND, _log_of(home), stdin=[last])


def _log_of(home: Home) -> str:
    """The file to which commands are appended; before version 7 the dump stands at its front."""
    if home.major >= 7:
        return f"{home.directory}/{home.appenddirname}/{home.appendfilename}.1.incr.aof"
    return f"{home.directory}/{home.appendfilename}"


def _put_in_place(container: Container, home: Home, folder: str, last: str) -> None:
    """As who owns the directory, whom a server that started as root becomes; where it stayed root (`sh -c`, a path in
    place of `redis-server`), what it made there is root's."""
    try:
        _run(container, home, PUT_IN_PLACE, folder, last)
    except RestoreFailed:
        _run(container, home, PUT_IN_PLACE, folder, last, own=False)


def _run(
    container: Container,
    home: Home,
    script: str,
    *words: str,
    stdin: Iterable[bytes] | None = None,
    own: bool = True,
) -> None:
    user = f"{home.uid}:{home.gid}" if own else None
    try:
        for _ in container.exec(("sh", "-c", script, "sh", *words), stdin=stdin, user=user):
            pass
    except CommandFailed as error:
        raise RestoreFailed(
            f"the log could not be loaded in {container.name}: {error.stderr.strip()[-500:] or error.message}",
            hint="is the container's version the source's own, its disk and memory large enough?",
        ) from error


def report(container: Container, directory: str, said: bytes) -> None:
    """Leave word of a restore beside the data."""
    head = _tarstream.entry(REPORT, size=len(said))
    container.write(directory, [head, said, _tarstream.padding(len(said)), _tarstream.END])
