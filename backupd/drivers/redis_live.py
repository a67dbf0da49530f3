"""A recovery point of Redis brought into a running server: what `redis_in_place` is handed, and what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from backupd.drivers.redis_aof import Landing, Replay
from backupd.drivers.redis_expiry import keeping
from backupd.drivers.redis_in_place import Standing, Wanted
from backupd.drivers.redis_master import Feed
from backupd.drivers.redis_wire import Connection, RedisError
from backupd.errors import RestoreFailed
from backupd.live import Replaced, Way
from backupd.model import Archive, Facts, Json, LogSpan

if TYPE_CHECKING:
    from backupd.model import Progress

MEMBER = "dump.rdb"

Logs = Callable[[], Iterator[tuple[LogSpan, bytes]]]


class RedisStanding:
    """A running server whose clients' writes are held."""

    def __init__(
        self,
        server: Standing,
        connect: Callable[[], Connection],
        measure: Callable[[Connection], Facts],
        *,
        keep: bool,
    ) -> None:
        self._server, self._connect, self._measure, self._keep = server, connect, measure, keep

    @property
    def unfinished(self) -> str | None:
        """The safety copy of a restore before this one that did not end."""
        return self._server.unfinished

    def replace(
        self, archive: Archive, logs: Logs, at: datetime | None, way: Way, progress: Progress
    ) -> Replaced:
        """Make the server hold the point, and what its log holds up to `at`. Raises RestoreFailed."""
        try:
            return self._replace(archive, logs, at, way, progress)
        except RedisError as error:
            raise RestoreFailed(error.message, hint=error.hint) from error

    def _replace(
        self, archive: Archive, logs: Logs, at: datetime | None, way: Way, progress: Progress
    ) -> Replaced:
        point = archive.point
        size = next((m.size for m in archive.members() if m.name == MEMBER), None)
        if size is None:
            raise RestoreFailed("this recovery point holds no dump.rdb", hint="run backupd verify")
        recorded = "start" in point.attributes
        landing = find_landing(archive, logs, at) if recorded else Landing(0, point.instant)
        last = b""
        if self._keep:
            with self._connect() as server:
                last = keeping(server, landing.known or point.instant)

        def stream() -> Iterator[bytes]:
            if recorded:
                yield from up_to(landing.position, Replay(point, at), logs)
            yield last

        feed = Feed(lambda: archive.read(MEMBER), size, stream, landing.position)
        outcome = self._server.replace(
            Wanted(feed, point.attributes, way.safety, way.listen, stage=progress.stage)
        )
        with self._connect() as server:
            facts = self._measure(server)
        return Replaced(facts, tuple(outcome.warnings), _told(landing, outcome.expired, kept=self._keep))


def _told(landing: Landing, expired: int | None, *, kept: bool) -> Facts:
    known = {"as_of": landing.at, "more_by": landing.after}
    told: dict[str, Json] = {name: instant.isoformat() for name, instant in known.items() if instant}
    if not kept:
        told["expired"] = expired if expired is not None else "not counted: there are too many keys"
    return told


def find_landing(archive: Archive, logs: Logs, at: datetime | None) -> Landing:
    """Where the replay ends: known when the log was read, and every byte of it compared, before anything is changed."""
    if at is not None and at < archive.point.instant:
        raise RestoreFailed(
            f"{at:%Y-%m-%d %H:%M:%S} UTC lies before this base is consistent", hint="take an earlier point"
        )
    replay = Replay(archive.point, at)
    for _ in replay.chunks(logs()):
        pass
    return replay.landing()


def up_to(position: int, replay: Replay, logs: Logs) -> Iterator[bytes]:
    """The commands from the base to a position."""
    yield replay.first
    left = position - replay.start
    for chunk in replay.chunks(logs()):
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


@contextmanager
def standing(
    connect: Callable[[], Connection], measure: Callable[[Connection], Facts], *, keep: bool = False
) -> Iterator[RedisStanding]:
    """Writes are held inside. `keep`: what has expired since the restored instant. Raises RestoreFailed."""
    try:
        server = Standing(connect)
    except RedisError as error:
        raise RestoreFailed(error.message, hint=error.hint) from error
    with server:
        yield RedisStanding(server, connect, measure, keep=keep)
