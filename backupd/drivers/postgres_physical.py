"""PostgreSQL, mode pitr: base backups of the whole cluster and its continuous log, over the network alone.

**Base.** `BASE_BACKUP` with a fast checkpoint and the server's own checksum verification, as one tar of the data
directory with tablespaces below `pg_tblspc/<oid>/`; relation files are cut at their pages of 8 KiB.

**Only what changed.** A server that summarizes its log (`summarize_wal`, from 17 on) is given the manifest of the point
before, and sends the pages that changed since; they are laid onto that point, so every point stands for itself and no
pg_combinebackup is needed. Its `backup_manifest` lists what was sent: the next base continues it, and pg_verifybackup
cannot use it. Where the server refuses, it sends all.

**Instant.** After the base the server's clock is read, then its position. That position is the point's `end`: the
base is consistent from there on, and all that was acknowledged before the instant lies at or before it.

**Log.** A physical slot (`postgres_slot`, `postgres_recorder`). A base is worth nothing without the log from its
`start` to its `end`, so a capture makes the slot where there is none.

**Rights.** A role that may replicate; it reads no table:

    CREATE ROLE backup LOGIN REPLICATION PASSWORD 'secret';

and in pg_hba.conf, since `all` does not cover replication:

    host replication backup all scram-sha-256
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from backupd.drivers.postgres_apart import BaseApart
from backupd.drivers.postgres_base import PAGE_SIZE, PAGED
from backupd.drivers.postgres_client import InContainer, ask_server, failing_as
from backupd.drivers.postgres_dump import OLDEST, Source
from backupd.drivers.postgres_logical import PostgresLogical
from backupd.drivers.postgres_place import lay_base, lay_files, reached
from backupd.drivers.postgres_recorder import ANCHOR, PostgresRecorder
from backupd.drivers.postgres_recovery import (
    STARTING,
    Replayed,
    Target,
    closing_files,
    find_home,
    held_in,
    read_report,
    replaying,
    whole_tar,
)
from backupd.drivers.postgres_replication import (
    MANIFEST,
    Server,
    System,
    position_of,
    server_from_url,
    talking,
)
from backupd.drivers.postgres_slot import (
    SLOT,
    ask_to_store,
    ensure_slot,
    is_recorded,
    retained_by,
    slot_name,
)
from backupd.drivers.postgres_sql import hint_for, instant
from backupd.errors import BackupdError, CaptureFailed, ContainerError, NoRecoveryPoint, RestoreFailed
from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Facts,
    Json,
    LogSpan,
    Problem,
    RecoveryPoint,
    TarStream,
)
from backupd.retained import Retained, worry

if TYPE_CHECKING:
    from psycopg import Connection

    from backupd.config.models import PostgresSource
    from backupd.sandbox.docker import Engine

log = logging.getLogger(__name__)

ABOUT = """
SELECT jsonb_build_object('version', current_setting('server_version_num')::int,
  'server_version', current_setting('server_version'),
  'bootstrap', (SELECT rolname FROM pg_roles WHERE oid = 10),
  'replicates', (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user),
  'user', current_user,
  'checksums', current_setting('data_checksums') = 'on',
  'wal_level', current_setting('wal_level'),
  'senders', current_setting('max_wal_senders')::int,
  'keep', (SELECT setting::bigint FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
  'synchronous', current_setting('synchronous_standby_names'),
  'block', current_setting('block_size')::int,
  'summarizes', coalesce(current_setting('summarize_wal', true) = 'on', false),
  'segment', (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
  'tablespaces', (SELECT coalesce(jsonb_object_agg(oid::text, spcname), '{}') FROM pg_tablespace
    WHERE spcname NOT IN ('pg_default', 'pg_global')),
  'settings', (SELECT jsonb_object_agg(name, setting) FROM pg_settings WHERE name IN ('max_connections',
    'max_prepared_transactions', 'max_locks_per_transaction', 'max_worker_processes', 'max_wal_senders',
    'shared_preload_libraries')))
"""
"""Settings a recovery cannot do without, and which may stand on the server's command line. Not everybody is told of
the libraries."""
RECOVERED = """
SELECT jsonb_build_object('in_recovery', pg_is_in_recovery(),
  'last_commit', extract(epoch FROM pg_last_xact_replay_timestamp())::text);
"""


MAX_RATE = 256_000_000
"""Bytes a second, where nobody says otherwise. Without a limit a base backup takes all that disk and network give, and
clients wait: of 500 transactions a second the slowest hundredth took 283 ms instead of 32 (at 80 MB/s 70). Yet it must
not take longer than pgBackRest's by its own defaults: one process and gzip, which does 75 MB in a second."""


_BUFFER = 1 << 16  # bytes: larger pieces go past it
CATCH_UP = 4
"""A log that fell behind is caught up at this part of `max_rate`: it is read from the disk that commits wait for, and
no backup window waits for it."""


def from_config(source: PostgresSource, engine: Engine) -> PostgresPhysical:
    """The driver for a source of the configuration."""
    password = source.password.get_secret_value() if source.password else None
    name, url, user = source.container, source.url, source.user

    def server() -> Server:
        if name is None:
            return server_from_url(url or "", user=user, password=password)
        container = engine.container(name)
        host, port = container.address(5432)
        given = InContainer(container, user=user, password=password).credentials()
        return Server({"host": host, "port": str(port), **given})

    def image() -> str:
        return engine.container(name).image if name is not None else ""

    verify = source.verify is not False
    rate = MAX_RATE if source.max_rate is None else source.max_rate
    return PostgresPhysical(PhysicalSource(source.name, server, image, verify=verify, max_rate=rate))


@dataclass(frozen=True, slots=True)
class PhysicalSource:
    """What is captured, and how to get there."""

    name: str
    server: Callable[[], Server]
    """May raise ContainerError or UsageError."""
    image: Callable[[], str] = str
    """The image of the server's container; empty where it is reached by URL."""
    verify: bool = True
    """The server verifies its data checksums while it sends."""
    max_rate: int = 0
    """Bytes a second of a base backup; 0 is as fast as it goes. A log is caught up at a quarter of it."""

    @property
    def slot(self) -> str:
        return slot_name(self.name)


class PostgresPhysical:
    """Captures a PostgreSQL cluster whole, records its log, and restores it to any instant between."""

    kind = "postgres"

    def __init__(self, source: PhysicalSource) -> None:
        self._source = source
        self._logical = PostgresLogical(Source(_no_client))

    # --- capture -------------------------------------------------------------------------------------

    def capture(self, since: RecoveryPoint | None) -> AbstractContextManager[Capture]:  # noqa: ARG002
        """Raises CaptureFailed with the server's reason and a hint."""
        return self._capture(None)

    def capture_onto(self, earlier: Archive) -> AbstractContextManager[Capture]:
        """Where the server summarizes its log, it sends only the pages that changed since that point."""
        return self._capture(earlier)

    @contextlib.contextmanager
    def _capture(self, earlier: Archive | None) -> Iterator[Capture]:
        source = self._source
        with contextlib.ExitStack() as held, failing_as(CaptureFailed, "PostgreSQL cannot be captured"):
            base = held.enter_context(contextlib.closing(BaseApart()))
            with talking():
                server = source.server()
                sql = held.enter_context(contextlib.closing(server.connect()))
                about = _ask(sql, ABOUT)
                recorded = is_recorded(sql, source.slot)
                ensure_slot(server, source.slot)
                with server.replicate() as wire:
                    system = wire.identify()
                    history = wire.timeline_history(system.timeline)
                base.begin(
                    server, manifest=manifest_of(earlier, about, system),
                    more={f"pg_wal/{system.timeline:08X}.history": history}, label=_label(source.name),
                    verify=source.verify, max_rate=source.max_rate,
                )  # fmt: skip
            if base.reason:
                log.info("%s: all is captured this time, not only what changed: %s", source.name, base.reason)
            if base.timeline != system.timeline:
                raise CaptureFailed("the server changed its timeline just now", hint="run the backup again")
            file = cast("BinaryIO", io.BufferedReader(base, _BUFFER))
            capture = Capture(
                TarStream(file, paged=PAGED, page_size=PAGE_SIZE, onto=base.onto),
                instant=datetime.now(UTC),
                attributes=_attributes(about, system, base.start, history, source.image()),
            )
            capture.attributes["recorded"] = recorded
            if not recorded:
                capture.warnings.append(
                    "nothing records the log of this source now: it cannot be restored until `backupd serve` has"
                )
            if base.onto and earlier is not None:
                capture.attributes["changed_since"] = earlier.point.id
            yield capture
            end = _finish(capture, base, sql)
            ask_to_store(sql, source.slot, end)

    # --- the log -------------------------------------------------------------------------------------

    def recorder(self, *, interval: float) -> PostgresRecorder:
        """What the server writes is stored after `interval` seconds, or 8 MiB."""
        source = self._source
        return PostgresRecorder(
            source.server, source.slot, interval=interval, catch_up=source.max_rate / CATCH_UP
        )

    def retained(self, since: LogSpan | None = None) -> Retained | None:  # noqa: ARG002  the slot knows
        """What the slot holds back on the server. Raises CaptureFailed."""
        with failing_as(CaptureFailed, "PostgreSQL does not tell what it keeps"):
            return retained_by(self._source.server(), self._source.slot)

    # --- restore -------------------------------------------------------------------------------------

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """The image of the server's own major version; it is ready when the recovery has ended, promoted."""
        return replace(self._logical.home(point), load_while="stopped")

    def load(self, archive: Archive, container: Container) -> None:
        """A base alone is not consistent. Raises RestoreFailed."""
        self.load_to(archive, iter(()), None, container)

    def load_to(
        self,
        archive: Archive,
        logs: Iterator[tuple[LogSpan, bytes]],
        at: datetime | None,
        container: Container,
        **target: str,
    ) -> None:
        """Lay the base and its log into a container that was not started yet; it recovers when it starts.

        Raises RestoreFailed where the container holds data, the log does not reach from the base's start to its
        end, or the target lies before that; Damaged for a hole in the log.
        """
        point = archive.point
        with failing_as(RestoreFailed, f"PostgreSQL in {container.name} cannot be restored"):
            wanted = _target(at, target)
            wanted.refuse(point)
            home = find_home(container)
            held, replayed = held_in(archive), Replayed(at)
            closing = closing_files(point, logs, home, held, wanted, replayed, container.kernel)
            if place := reached(container, home):
                lay_base(archive, home, held, place)
                lay_files(closing, home, place)
            else:
                container.write(home.root, whole_tar(archive, home, held, closing))

    def starting(self, container: Container) -> str:
        """How much of the log a restored server has replayed; empty before and after."""
        with contextlib.suppress(BackupdError):
            said = b"".join(container.exec(("sh", "-c", STARTING)))
            return replaying(said.decode(errors="replace"))
        return ""

    def recovered(self, container: Container) -> Mapping[str, Json]:
        """How the recovery of a restored, running container ended: `last_commit` is in it, `first_left_out` is not.

        Raises RestoreFailed where it has not ended.
        """
        with failing_as(RestoreFailed, f"PostgreSQL in {container.name} does not answer"):
            said, _ = ask_server(InContainer(container), RECOVERED)
        if said["in_recovery"]:
            raise RestoreFailed(
                f"PostgreSQL in {container.name} is still in recovery", hint=f"docker logs {container.name}"
            )
        last = instant(said["last_commit"]).isoformat() if said["last_commit"] else None
        return {**read_report(container), "last_commit": last}

    def facts(self, container: Container) -> Facts:
        """Counted on the restored server; a base itself carries none, as it is no state of its own."""
        return self._logical.facts(container)

    # --- check ---------------------------------------------------------------------------------------

    def check(self) -> Sequence[Problem]:
        """Reached for SQL and for replication, and set up so that a log can be kept. Makes no slot."""
        try:
            server = self._source.server()
            with talking(), contextlib.closing(server.connect()) as sql:
                about = _ask(sql, ABOUT)
                slot = sql.execute(SLOT, [self._source.slot]).fetchone()
            found = shortcomings(about, self._source.slot, slot)
            kept = self.retained()
            if kept is not None and not kept.lost and (told := worry(kept)):
                hint = "is `backupd serve` at work, and does its repository take what it stores?"
                found.append(Problem(told, hint, fatal=False))
            if about["replicates"]:
                with talking(), server.replicate() as wire:
                    wire.identify()
        except BackupdError as error:
            return [Problem(error.message, error.hint or hint_for(error.message))]
        return found


# --- parts -------------------------------------------------------------------------------------------------


def manifest_of(earlier: Archive | None, about: Mapping[str, Any], system: System) -> bytes:
    """Of the base that a server may be asked to continue; empty where it has to send all. Raises Damaged."""
    if earlier is None or not about["summarizes"] or about["block"] != PAGE_SIZE:
        return b""
    if earlier.point.attributes.get("system_identifier") != system.identifier:
        return b""
    with contextlib.suppress(NoRecoveryPoint):
        return b"".join(earlier.read(MANIFEST))
    return b""


def _label(name: str) -> str:
    return f"backupd {name}"[:60].replace("'", "")


def shortcomings(about: Mapping[str, Any], name: str, slot: Sequence[Any] | None) -> list[Problem]:
    """What a server that was reached lacks. Pure."""
    found = []
    if about["version"] < OLDEST * 10000:
        found.append(
            Problem(f"PostgreSQL {about['server_version']} is too old", f"{OLDEST} and later are supported")
        )
    if about["wal_level"] == "minimal":
        found.append(
            Problem("wal_level is minimal: no log can be kept", "wal_level = replica, and a restart")
        )
    if about["senders"] < 2:
        found.append(
            Problem(
                f"max_wal_senders is {about['senders']}; a base backup and the log need one each",
                "set it to 10",
            )
        )
    if not about["replicates"]:
        user = about["user"]
        found.append(Problem(f"the role {user} may not replicate", f"ALTER ROLE {user} REPLICATION"))
    if about["keep"] < 0:
        found.append(
            Problem(
                "max_slot_wal_keep_size is not set: while backupd is away, the log fills the server's disk",
                "set it to what the disk can spare; a log that was given up needs a new base backup",
                fatal=False,
            )
        )
    standbys = about["synchronous"]
    if "*" in standbys or "backupd" in standbys:
        found.append(
            Problem(
                f"synchronous_standby_names is {standbys!r}: commits would wait until backupd has stored them",
                "name the standbys, without *",
                fatal=False,
            )
        )
    if slot is not None and slot[2]:
        found.append(
            Problem(
                f"the slot {name} was given up: the server removed log that was not stored",
                "back up now: backupd backup",
                fatal=False,
            )
        )
    return found


def _attributes(
    about: Mapping[str, Any], system: System, start: int, history: str, image: str
) -> dict[str, Json]:
    return {
        "mode": "pitr",
        "server_version": about["server_version"],
        "major": about["version"] // 10000,
        "image": image,
        "superuser": about["bootstrap"],
        "system_identifier": system.identifier,
        "timeline": system.timeline,
        "timeline_history": history,
        "tablespaces": about["tablespaces"],
        "checksums": about["checksums"],
        "settings": about["settings"],
        "wal_segment_size": about["segment"],
        "epoch": system.epoch,
        "start": start,
    }


def _finish(capture: Capture, base: BaseApart, sql: Connection[tuple[Any, ...]]) -> int:
    """The instant and the end, which is returned, once every byte was read. Raises CaptureFailed where one was not."""
    if base.end is None:
        raise CaptureFailed("the base backup was not read to its end")
    with talking():
        row = sql.execute(ANCHOR).fetchone()
    if row is None or row[0] is None or row[1] is None:
        raise CaptureFailed(
            "the server does not tell how far it is",
            hint="a standby that has replayed nothing: wait, or use the primary",
        )
    capture.instant = row[0].astimezone(UTC)
    capture.attributes["sent"] = base.sent
    capture.attributes["end"] = end = max(base.end, position_of(row[1]))
    return end


def _ask(sql: Connection[tuple[Any, ...]], question: str) -> dict[str, Any]:
    row = sql.execute(question).fetchone()
    return dict(row[0]) if row else {}


def _target(at: datetime | None, target: Mapping[str, str]) -> Target:
    unknown = set(target) - {"lsn", "xid", "name"}
    if unknown:
        raise RestoreFailed(f"there is no target {', '.join(sorted(unknown))}", hint="lsn, xid or name")
    return Target(at, **target)


def _no_client() -> InContainer:
    raise ContainerError("a base backup needs no client programs")
