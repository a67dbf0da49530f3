"""A base backup and its log laid into a fresh container, so that the server recovers to a target when it starts.

Everything stands in files of the data directory: a container somebody else made is given no command line. WAL goes
into `pg_wal` itself, which the server reads without a program for each segment. What says that there is a cluster
at all (PG_VERSION) is written last: a restore that was interrupted cannot be started by mistake.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from backupd.drivers._tarstream import END, entry, first_file, open_tar, padding
from backupd.drivers.postgres_base import TABLESPACES
from backupd.drivers.postgres_replication import position_of, position_text
from backupd.drivers.postgres_sql import number
from backupd.drivers.postgres_wal import (
    Ended,
    Segments,
    Transactions,
    epoch_parts,
    history,
    segment_position,
)
from backupd.errors import ContainerError, RestoreFailed
from backupd.model import Archive, Bytes, Container, Json, LogSpan, Member, RecoveryPoint

REPORT = "backupd_recovery.json"
"""What was asked of the recovery, in the restored data directory."""
_HBA = "backupd_hba.conf"
SPACES = "backupd_tablespaces"
_AUTO = "postgresql.auto.conf"
MAP = "tablespace_map"
WAL = "pg_wal"
_VERSION = "PG_VERSION"
_CONF = "postgresql.conf"
ANEW = frozenset({_VERSION, _AUTO, MAP, REPORT, _HBA, "recovery.signal", "standby.signal", "postmaster.pid"})
"""Files of a base that do not come back as they were."""
_ROOTS = ("/var/lib/postgresql/data", "/var/lib/postgresql")
"""Directories that the official images have before the first start."""
_SLACK = timedelta(seconds=5)

LET_IN = """\
# Written by backupd: how a restored server lets in, wherever it is. md5 takes scram-sha-256 passwords too.
local all all trust
host all all all md5
host replication all all md5
"""

SETTINGS: Mapping[str, str] = {
    # nothing of the old place is reached, run or waited for
    "archive_mode": "off", "primary_conninfo": "", "primary_slot_name": "", "recovery_min_apply_delay": "0",
    "recovery_end_command": "", "archive_cleanup_command": "", "synchronous_standby_names": "", "ssl": "off",
    "huge_pages": "try",
    # it answers, and says what it does where it is looked for
    "port": "5432", "listen_addresses": "*", "unix_socket_directories": "/var/run/postgresql",
    "logging_collector": "off", "log_destination": "stderr",
    # all WAL lies in pg_wal; nobody is let in before the recovery has ended
    "restore_command": "false", "hot_standby": "off", "recovery_target_action": "promote",
    "recovery_target_inclusive": "on", "update_process_title": "on",
}  # fmt: skip
TARGETS = (
    "recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time",
    "recovery_target_xid",
)  # fmt: skip


# --- the target --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """Where a recovery stops: at most one of its fields is set; none is the end of the log."""

    at: datetime | None = None
    lsn: str = ""
    xid: str = ""
    name: str = ""

    def refuse(self, point: RecoveryPoint) -> None:
        """Raises RestoreFailed where the base is not consistent yet. PostgreSQL itself would only say so where a
        commit lies between, and silently give a later state where none does."""
        if sum(map(bool, (self.at, self.lsn, self.xid, self.name))) > 1:
            raise RestoreFailed("a restore has one target", hint="give a time, an lsn, an xid or a name")
        if self.at is not None and self.at < point.instant:
            raise RestoreFailed(
                f"{self.at:%Y-%m-%d %H:%M:%S} UTC lies before {point.instant:%Y-%m-%d %H:%M:%S} UTC, from when on "
                "this base is consistent",
                hint="restore from an earlier point",
            )
        if self.xid and not self.xid.isdigit():
            raise RestoreFailed(f"{self.xid!r} is no transaction", hint="a number, as txid_current() gives")
        if self.lsn:
            self._position(point)

    def _position(self, point: RecoveryPoint) -> int:
        try:
            position = position_of(self.lsn)
        except ValueError:
            raise RestoreFailed(
                f"{self.lsn!r} is no position of a log", hint="write it as 16/B374D848"
            ) from None
        if position < number(point.attributes.get("end")):
            raise RestoreFailed(
                f"{self.lsn} lies before the end of the base", hint="restore from an earlier point"
            )
        return position

    def setting(self, point: RecoveryPoint, replayed: Replayed) -> dict[str, str]:
        """The one setting that says it. A recovery must find a record behind its target or fails, so a target at
        the end of the log is none."""
        if self.at is not None:
            return {"recovery_target_time": _time(self.at)} if replayed.stop else {}
        if self.lsn:
            position = self._position(point)
            if position > replayed.end:
                raise RestoreFailed(f"the log ends at {position_text(replayed.end)}, before {self.lsn}")
            return {"recovery_target_lsn": self.lsn} if position < replayed.end else {}
        if self.xid:
            return {"recovery_target_xid": self.xid}
        return {"recovery_target_name": self.name} if self.name else {}


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00")


def configuration(before: str, own: Mapping[str, str]) -> str:
    """The `postgresql.auto.conf` of a restored server. The last line of a name counts; the target that is set must
    come after those that are emptied, as PostgreSQL takes them one by one and allows only one."""
    chosen = {name: value for name, value in own.items() if name in TARGETS}
    lines = {**SETTINGS, **dict.fromkeys(TARGETS, ""), **own}
    ordered = {name: value for name, value in lines.items() if name not in chosen} | chosen
    written = "".join(
        f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in ordered.items()
    )
    return f"{before.rstrip()}\n# Written by backupd for this restore\n{written}".lstrip()


# --- what the log says -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Replayed:
    """What was seen of the log on its way."""

    at: datetime | None
    end: int = 0
    timeline: int = 0
    switches: list[tuple[int, int]] = field(default_factory=list)
    stop: Ended | None = None
    """The first transaction that ended after `at`: a recovery to that time stops there."""
    last: Ended | None = None
    left_out: Ended | None = None
    """The first commit after it."""

    def note(self, ended: Iterable[Ended]) -> None:
        for one in ended:
            if self.stop is None and self.at is not None and one.at > self.at:
                self.stop = one
            if one.committed and self.stop is None:
                self.last = one
            if one.committed and self.stop is not None and self.left_out is None:
                self.left_out = one

    def matters(self, span: LogSpan) -> bool:
        """False for a span that lies so far before the target that no transaction in it can be the stop."""
        return self.at is not None and (span.anchor is None or span.anchor.at >= self.at - _SLACK)


def wal_files(
    logs: Iterable[tuple[LogSpan, bytes]], point: RecoveryPoint, replayed: Replayed
) -> Iterator[tuple[str, bytes | bytearray]]:
    """Segment files and a history file, by name, each the caller's until the next is asked for.

    Raises RestoreFailed where the log does not reach from the base's start to its end, Damaged for a hole: recovery
    itself cannot tell a hole from the end.
    """
    of = point.attributes
    start, end = number(of.get("start")), number(of.get("end"))
    segments = Segments(number(of.get("wal_segment_size")) or 16 << 20, number(of.get("major")))
    transactions = Transactions()
    system = epoch_parts(str(of.get("epoch")))[0]
    for span, data in logs:
        if not data:
            continue  # an anchor alone; of a new timeline it is no WAL that a recovery could find
        if segments.position is None and (span.start > start or epoch_parts(span.epoch)[0] != system):
            break
        yield from segments.add(span.epoch, span.start, data)
        if replayed.matters(span):
            replayed.note(transactions.feed(span.start, data))
    replayed.end = segments.position or 0
    if replayed.end < end:
        reached = f"ends at {position_text(replayed.end)}" if replayed.end else "is not there"
        raise RestoreFailed(
            f"the log {reached}; this base needs it from {position_text(start)} to {position_text(end)}",
            hint="choose another point: backupd list",
        )
    yield from segments.finish()
    replayed.timeline, replayed.switches = segments.timeline, segments.switches
    if segments.switches:
        text = history(str(of.get("timeline_history") or ""), segments.switches)
        yield f"{segments.timeline:08X}.history", text.encode()


# --- files in the container ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Home:
    """Where a container's server will look for its data."""

    data: str
    root: str
    """Directory above or at `data` that is there already."""
    uid: int
    gid: int

    @property
    def inside(self) -> str:
        """`data` as seen from `root`, with a closing slash; empty where they are the same."""
        relative = PurePosixPath(self.data).relative_to(self.root)
        return "" if str(relative) == "." else f"{relative}/"

    def entry(self, name: str, *, size: int = 0, mode: int = 0o600) -> bytes:
        """A header of the server's own."""
        return entry(name, size=size, mode=mode, uid=self.uid, gid=self.gid)

    def files(self, files: Iterable[tuple[str, bytes | bytearray]], below: str = "") -> Iterator[Bytes]:
        """Entries of a tar, without its end."""
        for name, content in files:
            yield self.entry(below + name, size=len(content))
            yield memoryview(content)
            yield padding(len(content))


def find_home(container: Container) -> Home:
    """Raises RestoreFailed where there is data already."""
    data = container.env.get("PGDATA") or _ROOTS[0]
    root = next((known for known in _ROOTS if PurePosixPath(data).is_relative_to(known)), data)
    _refuse_used(container, data)
    accounts = b"".join(first_file(container.read("/etc/passwd"))).decode(errors="replace")
    fields = next((line.split(":") for line in accounts.splitlines() if line.startswith("postgres:")), None)
    uid, gid = (int(fields[2]), int(fields[3])) if fields else (999, 999)
    return Home(data, root, uid, gid)


def _refuse_used(container: Container, data: str) -> None:
    try:
        with open_tar(container.read(data)) as tar:
            found = next((one.name for one in tar if not one.isdir()), "")
    except ContainerError:
        return  # the directory is not there yet
    if found:
        raise RestoreFailed(
            f"{container.name} already holds data: {data} is not empty",
            hint="restore into a container with an empty volume; nothing was changed",
        )


def held_in(archive: Archive) -> dict[str, str]:
    """What of a base decides on the files that are written anew, by name; a `postgresql.conf` stays as it is."""
    there = {member.name for member in archive.members()}
    held = {
        name: b"".join(archive.read(name)).decode(errors="surrogateescape")
        for name in (_VERSION, _AUTO, MAP)
        if name in there
    }
    return held | ({_CONF: ""} if _CONF in there else {})


def data_tar(archive: Archive, home: Home, held: Mapping[str, str]) -> Iterator[Bytes]:
    """The base as it must lie in the container: the server's owner, tablespaces within the data directory, without
    what `last_files` writes. A tar without its end."""
    path = ""
    for part in PurePosixPath(home.inside).parts:
        path += f"{part}/"
        yield home.entry(path, mode=0o700)
    for folder in _space_folders(archive.members()):
        yield home.entry(f"{home.inside}{folder}/", mode=0o700)
    if MAP in held:
        text = moved_map(held[MAP], home.data).encode()
        yield home.entry(home.inside + MAP, size=len(text)) + text + padding(len(text))
    yield from archive.tar(lambda member: _placed(member, home), end=False)


def _space_folders(members: Iterable[Member]) -> list[str]:
    oids = dict.fromkeys(
        member.name.split("/")[1] for member in members if member.name.startswith(f"{TABLESPACES}/")
    )
    return [SPACES, *(f"{SPACES}/{oid}" for oid in oids)] if oids else []


def moved_map(text: str, data: str) -> str:
    """A tablespace map whose tablespaces lie within the data directory: the server makes the links from it."""
    oids = [line.split(" ", 1)[0] for line in text.splitlines() if line.strip()]
    return "".join(f"{oid} {data}/{SPACES}/{oid}\n" for oid in oids)


def _placed(member: Member, home: Home) -> Member | None:
    """None for what is left out or written anew."""
    name = member.name
    if name in ANEW:
        return None
    if name.startswith(f"{TABLESPACES}/"):
        name = SPACES + name.removeprefix(TABLESPACES)
    return member._replace(name=home.inside + name, uid=home.uid, gid=home.gid)


def last_files(
    point: RecoveryPoint,
    home: Home,
    held: Mapping[str, str],
    target: Target,
    replayed: Replayed,
    kernel: tuple[int, ...] = (),
) -> list[tuple[str, bytes]]:
    """What makes the container's data directory a cluster that recovers to the target; PG_VERSION at the end."""
    if _VERSION not in held:
        raise RestoreFailed("the archive holds no data directory of PostgreSQL", hint="run backupd verify")
    of = point.attributes
    kept = of.get("settings")
    own = {
        **({name: str(value) for name, value in kept.items()} if isinstance(kept, dict) else {}),
        **syncing(number(of.get("major")), kernel),
        "hba_file": f"{home.data}/{_HBA}",
        "recovery_target_timeline": str(replayed.timeline),  # the default, `latest`, may be another branch
        **target.setting(point, replayed),
    }
    files: dict[str, str] = {}
    if _CONF not in held:  # it lay outside the data directory
        files[_CONF] = "# Made by backupd: the server's own lay outside its data directory\n"
    files |= {
        _HBA: LET_IN,
        _AUTO: configuration(held.get(_AUTO, ""), own),
        REPORT: json.dumps(_report(point, target, replayed)) + "\n",  # a line: `STARTING` reads it so
        "recovery.signal": "",
        _VERSION: held[_VERSION],
    }
    return [(name, text.encode(errors="surrogateescape")) for name, text in files.items()]


def closing_files(
    point: RecoveryPoint,
    logs: Iterable[tuple[LogSpan, bytes]],
    home: Home,
    held: Mapping[str, str],
    wanted: Target,
    replayed: Replayed,
    kernel: tuple[int, ...],
) -> Iterator[tuple[str, bytes | bytearray]]:
    """The log, and what makes it a cluster: what follows on a base, by its path in the data directory, each the
    caller's until the next is asked for."""
    for name, content in wal_files(logs, point, replayed):
        yield f"{WAL}/{name}", content
    yield from last_files(point, home, held, wanted, replayed, kernel)


def whole_tar(
    archive: Archive, home: Home, held: Mapping[str, str], closing: Iterable[tuple[str, bytes | bytearray]]
) -> Iterator[Bytes]:
    """A base and what follows on it in one tar, as each costs the engine a program of its own. Where anything fails
    before its end, the engine never sees that."""
    yield from data_tar(archive, home, held)
    yield from home.files(closing, below=home.inside)
    yield END


def syncing(major: int, kernel: tuple[int, ...]) -> dict[str, str]:
    """How the server makes its files durable before it replays: file by file, a millisecond each where a disk's cache
    is flushed for every one, or all at once. Before Linux 5.8 the latter does not tell of failures. Pure."""
    return {"recovery_init_sync_method": "syncfs"} if major >= 14 and kernel >= (5, 8) else {}


def _report(point: RecoveryPoint, target: Target, replayed: Replayed) -> dict[str, Json]:
    asked = {"at": target.at.isoformat() if target.at else "", "lsn": target.lsn, "xid": target.xid}
    return {
        "point": point.id,
        "asked": {key: value for key, value in {**asked, "name": target.name}.items() if value},
        "log_start": position_text(number(point.attributes.get("start"))),
        "log_end": position_text(replayed.end),
        "segment": number(point.attributes.get("wal_segment_size")),
        "timeline": replayed.timeline,
        "first_left_out": replayed.left_out.at.isoformat() if replayed.left_out else None,
    }


# --- while it recovers -----------------------------------------------------------------------------------------

STARTING = r"""
for p in /proc/[0-9]*; do
  { t=$(tr '\0' ' ' <"$p/cmdline"); } 2>/dev/null
  case $t in postgres:*startup*) echo "$(cut -d' ' -f14,15 "$p/stat") $t" ;; esac
done
cat "${PGDATA:-/var/lib/postgresql/data}/%s"
""".replace("%s", REPORT)
"""Prints the processor time and the title of the process that replays, then the report. Nobody may connect meanwhile,
and the log of a server before version 15 says nothing of how far it is."""
_TICKS = 100  # a second: the kernel's, as /proc counts


def replaying(said: str) -> str:
    """What STARTING printed, for people: how much of the log is replayed, and at what cost. It changes with every
    segment, and with every second of work on one; empty where nothing is replayed. Pure."""
    line, _, report = said.partition("\n")
    found = re.match(r"(\d+) (\d+) postgres:.*?startup(?:\s+recovering\s+([0-9A-F]{24}))?", line)
    if found is None:
        return ""
    cost = f"{(int(found[1]) + int(found[2])) // _TICKS} s of processor time"
    try:
        told = json.loads(report)
        start, end = position_of(told["log_start"]), position_of(told["log_end"])
        done = min(max(segment_position(found[3] or "", told["segment"]) - start, 0), end - start)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return f"starting, {cost}"  # it makes its files durable before it replays
    return f"replayed {done / 1e6:,.0f} of {(end - start) / 1e6:,.0f} MB of the log, {cost}"


def read_report(container: Container) -> dict[str, Json]:
    """What `last_files` wrote into it; empty where that is not there."""
    data = container.env.get("PGDATA") or _ROOTS[0]
    with contextlib.suppress(ContainerError, FileNotFoundError, ValueError):
        found = json.loads(b"".join(first_file(container.read(f"{data}/{REPORT}"))))
        return dict(found)
    return {}
