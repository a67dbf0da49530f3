"""Redis and Valkey, mode pitr: a dump now and then, and every write between them; restored to any instant.

**Recording.** The agent joins the server's replication stream as a replica does (`redis_recorder`). It never writes to
the server, is never told of by a port and so never promoted, and no server waits for it. But it counts among
`connected_slaves`, for `WAIT` and `min-replicas-to-write`.
**Base.** A dump over a second connection; the server tells of which place in its history it is.
**Restore.** Dump and stream become an append-only file, which the server itself loads (`redis_aof`). It is then exactly
as it was at an anchor: a reading of the server's clock and place, taken ten times a second (one a second stays of those
that are older than an hour or so). What came after the last anchor before T is left out, never a part of it taken.

The rights (an ACL user sees all data by them, whatever its key patterns):
  ACL SETUSER backupd on >PASSWORD -@all +ping +time +info +config|get +psync +replconf +multi +exec
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from backupd.chain import need_of
from backupd.drivers._tarstream import first_file
from backupd.drivers.rdb import RdbCheck, RdbSummary, checked
from backupd.drivers.redis import MEMBER, RedisDriver, describe, failing_as, reading_dump
from backupd.drivers.redis_aof import REPORT, Course, Landing, Replay, bring_back_log, report
from backupd.drivers.redis_fit import format_of
from backupd.drivers.redis_home import DATA, reach
from backupd.drivers.redis_recorder import RedisRecorder
from backupd.drivers.redis_retained import SETTING, Limits, retained_by
from backupd.drivers.redis_stream import Answer
from backupd.drivers.redis_wire import Connection
from backupd.errors import BackupdError, CaptureFailed, RestoreFailed
from backupd.model import (
    Anchor,
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Facts,
    Json,
    LogSpan,
    Problem,
    RecoveryPoint,
    Stream,
    Streams,
)
from backupd.retained import Retained, worry

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from backupd.drivers.redis_live import RedisStanding

OLDEST = 6
"""Before, scripts were sent to replicas as they are, and ran there once more."""
BACKLOG = 64 << 20
"""Bytes of its history that a server should keep for an agent that was away."""


class RedisPitr:
    """Captures a Redis server, records its writes, and restores it to any instant between."""

    kind = "redis"

    def __init__(self, dumps: RedisDriver) -> None:
        self._dumps = dumps
        self._recorder: RedisRecorder | None = None

    # --- capture

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:  # noqa: ARG002  a dump stands alone
        """A dump and its place in the server's history. Raises CaptureFailed."""
        with failing_as(CaptureFailed), self._dumps.connect() as server, self._dumps.connect() as wire:
            answer, chunks = wire.dump()
            after = server.moment()
            _refuse_other(answer, after.epoch)
            capture = Capture(Streams(()), instant=after.at)
            capture.attributes.update(describe(server, self._dumps.container()))
            capture.attributes |= {
                "mode": "pitr", "epoch": answer.epoch, "start": answer.position,
                "end": max(after.position, answer.position),
            }  # fmt: skip
            capture.warnings += self._dumps.clock_warnings(server)
            whole: list[RdbSummary] = []
            with (
                closing(reading_dump(chunks)) as reading,
                closing(checked(reading, RdbCheck(), whole.append)) as passing,
            ):
                capture.content = Streams([Stream(MEMBER, passing)])
                yield capture
            if not whole:
                raise CaptureFailed("the dump was not read to its end", hint="back up again")
            _note(capture, whole[0], answer)

    # --- the log

    def recorder(self, *, interval: float) -> RedisRecorder:
        """What the server executes is stored after `interval` seconds, or 8 MiB."""
        self._recorder = RedisRecorder(self._dumps.connect, interval=interval)
        return self._recorder

    def retained(self, since: LogSpan | None = None) -> Retained | None:
        """What the backlog and the output buffer hold of what is not stored. Raises CaptureFailed."""
        with failing_as(CaptureFailed), self._dumps.connect() as server:
            return self._retained(server, server.info("replication"), since)

    def _retained(
        self, server: Connection, link: Mapping[str, str], since: LogSpan | None
    ) -> Retained | None:
        held = self._recorder.held() if self._recorder is not None else None
        limits = Limits.of_setting(server.config(SETTING).get(SETTING, ""))
        return retained_by(link, limits, since, held)

    # --- restore

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """The source's own image where it is known, else the newest of its major version."""
        return self._dumps.home(point)

    def load(self, archive: Archive, container: Container) -> None:
        """The dump alone: as of a moment before the point's instant."""
        self._dumps.load(archive, container)

    def load_to(
        self,
        archive: Archive,
        logs: Iterator[tuple[LogSpan, bytes]],
        at: datetime | None,
        container: Container,
        **target: str,
    ) -> None:
        """Lay the dump and its log into a container that was not started yet; it loads both when it starts.

        Raises RestoreFailed where the container holds data, the log does not reach, or the target lies before the
        base; Damaged.
        """
        point = archive.point
        if target:
            raise RestoreFailed(
                f"a log of Redis knows no {', '.join(sorted(target))}", hint="give a time: --at"
            )
        if at is not None and at < point.instant:
            raise RestoreFailed(
                f"{at:%Y-%m-%d %H:%M:%S} UTC lies before {point.instant:%Y-%m-%d %H:%M:%S} UTC, from when on this "
                "base is consistent",
                hint="restore from an earlier point",
            )
        size = next((m.size for m in archive.members() if m.name == MEMBER), None)
        if size is None:
            raise RestoreFailed("this recovery point holds no dump.rdb", hint="run backupd verify")
        with failing_as(RestoreFailed):
            base, replay = (size, archive.read(MEMBER)), Replay(point, at)
            directory, landing = bring_back_log(
                container, self._dumps.credentials(), base, replay, logs, keep=self._dumps.keeps
            )
            report(container, directory, _said(point, at, landing))

    def keeping(self) -> RedisPitr:
        """Implements `live.ExpiringDriver`."""
        return RedisPitr(self._dumps.keeping())

    def lands_at(self, point: RecoveryPoint, log: Iterable[LogSpan], at: datetime) -> datetime:
        """Implements `live.AnchoredDriver`."""
        need = need_of(point)
        course = Course(at, Anchor(point.instant, need.end if need else 0))
        for span in log:
            course.note(span.anchors)
        return course.landing().at or at

    def starting(self, container: Container) -> str:
        """Implements `waiting.StartingDriver`."""
        return self._dumps.starting(container)

    def recovered(self, container: Container) -> Mapping[str, Json]:
        """Where a restored, running server landed. Raises RestoreFailed where it has not loaded."""
        with failing_as(RestoreFailed), reach(container, self._dumps.credentials(), timeout=3600) as server:
            directory = server.config("dir").get("dir", DATA)
        with failing_as(RestoreFailed):
            try:
                return dict(json.loads(b"".join(first_file(container.read(f"{directory}/{REPORT}")))))
            except (FileNotFoundError, ValueError):
                return {}

    def facts(self, container: Container) -> Facts:
        """Counted on the restored server; a base carries none, as its instant is a moment after it."""
        return self._dumps.facts(container)

    @property
    def alone(self) -> RedisDriver:
        """Captures dumps without their place in the log."""
        return self._dumps

    def standing(self) -> AbstractContextManager[RedisStanding]:
        """The configured server, its clients' writes held. Raises RestoreFailed."""
        return self._dumps.standing()

    # --- check

    def check(self) -> Sequence[Problem]:
        """Reachable, of a supported version, and set up so that a log can be kept? Where the server has replicas or
        had, its stream is joined for a moment; no dump is asked for."""
        try:
            with self._dumps.connect() as server:
                found = list(self._dumps.whole_problems(server))
                link = server.info("replication")
                settings = server.config(SETTING, "min-replicas-to-write", "min-slaves-to-write")
                found += shortcomings(server.info("server"), link, settings)
                if told := worry(self._retained(server, link, None)):
                    hint = "does the repository take what `backupd serve` stores, and in time?"
                    found.append(Problem(told, hint, fatal=False))
                moment = server.moment()
                server.call("REPLCONF", "capa", "eof")
                if link.get("repl_backlog_active") == "1":
                    with self._dumps.connect() as wire:
                        wire.follow(moment.epoch, moment.position)
        except BackupdError as error:
            return [Problem(error.message, error.hint)]
        return found


# --- parts -------------------------------------------------------------------------------------------------


def shortcomings(
    about: Mapping[str, str], link: Mapping[str, str], settings: Mapping[str, str]
) -> list[Problem]:
    """What a server that was reached lacks. Pure."""
    found = []
    version = about.get("redis_version", "")
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < OLDEST:
        found.append(
            Problem(f"Redis {version} is too old for its log to be kept", f"{OLDEST}.0 or newer is needed")
        )
    backlog = int(link.get("repl_backlog_size", "0"))
    if backlog < BACKLOG:
        found.append(
            Problem(
                f"repl-backlog-size is {backlog >> 10} KiB: what is written while backupd is away for longer than it "
                "takes to write that is lost to the log",
                "CONFIG SET repl-backlog-size 64mb, and repl-backlog-ttl 0, and the same in redis.conf",
                fatal=False,
            )
        )
    if link.get("role") == "slave":
        found.append(
            Problem(
                "this is a replica: its log is as late as its own link to the master",
                "for restores exact to the instant, record the master",
                fatal=False,
            )
        )
    limits = Limits.of_setting(settings.get(SETTING, ""))
    if limits is not None and 0 < limits.hard < BACKLOG:
        found.append(
            Problem(
                f"client-output-buffer-limit lets a replica be {limits.hard >> 10} KiB behind at most",
                "CONFIG SET client-output-buffer-limit 'replica 256mb 64mb 60', and the same in redis.conf",
                fatal=False,
            )
        )
    least = settings.get("min-replicas-to-write", settings.get("min-slaves-to-write", "0"))
    if least not in ("", "0"):
        found.append(
            Problem(
                f"min-replicas-to-write is {least}, and backupd counts as a replica",
                f"set it to {int(least) + 1}, so that as many others are asked for as before",
                fatal=False,
            )
        )
    return found


def _refuse_other(answer: Answer, epoch: str) -> None:
    if answer.continues or answer.epoch != epoch:
        raise CaptureFailed("the server took another history just now", hint="run the backup again")


def _note(capture: Capture, summary: RdbSummary, answer: Answer) -> None:
    """What the dump says of itself. Raises CaptureFailed where it is not of the place the server named."""
    offset = summary.aux.get("repl-offset", "")
    if offset and offset != str(answer.position):
        raise CaptureFailed(
            f"the dump is of {offset} instead of {answer.position}", hint="run the backup again; report it"
        )
    if not summary.checksum:
        capture.warnings.append("the dump has no checksum (rdbchecksum no): damage in it would go unseen")
    database = summary.aux.get("repl-stream-db", "")
    capture.attributes["stream_database"] = int(database) if database.isdigit() else 0
    capture.attributes |= format_of(summary)


def _said(point: RecoveryPoint, at: datetime | None, landing: Landing) -> bytes:
    known = {"as_of": landing.at, "more_by": landing.after, "holds_until": landing.until}
    said: dict[str, Json] = {
        "point": point.id,
        "asked": at.isoformat() if at else "latest",
        "offset": landing.position,
        **{name: instant.isoformat() for name, instant in known.items() if instant},
    }
    return json.dumps(said, indent=1).encode() + b"\n"
