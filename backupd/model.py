"""The nouns, one word a thing, and the seams between the rooms.

Nothing here does anything. Times are aware datetimes in UTC; sizes are bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, TypeAlias, runtime_checkable

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Facts: TypeAlias = Mapping[str, Json]
"""What was true of a source at capture (row counts, key counts, digests): equal again after a restore."""

Bytes: TypeAlias = "bytes | memoryview"
"""Data to store; a view is the caller's again when the call returns."""

Clock: TypeAlias = Callable[[], datetime]


# --- the store ---------------------------------------------------------------------------------------


class ObjectInfo(NamedTuple):
    """One object, as a listing tells it."""

    key: str
    size: int
    modified: datetime


class Store(Protocol):
    """Where objects live. Keys are made by `repository`: `/`-separated, parts of [A-Za-z0-9._-] that do not
    begin with a dot; no key is the directory of another (`a` and `a/b`).

    Every method may be called from several threads at once, and raises StoreError, of one line and a hint,
    `transient` where trying again may help. Other names than keys are refused, and never shown.
    """

    @property
    def location(self) -> str:
        """For people: `/srv/backups` or `s3://bucket/prefix`. Never holds a secret."""

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        """Store whole or not at all. Raises ObjectExists unless `overwrite`; of several at once one wins.

        After it returns, the object survives a crash and every later `get` and `list` sees it. One that
        failed leaves nothing that `list` shows, except that the whole object may be there when the answer of
        a distant store was lost for good.
        """

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes from `offset`, `length` of them or up to the end. Raises ObjectMissing.

        A range that reaches past the end is short; the caller knows how much there must be. An answer cut
        short raises; a bit flipped on the way here is not noticed, so the caller compares digests.
        """

    def stat(self, key: str) -> ObjectInfo:
        """Raises ObjectMissing."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, sorted by key. A failure raises; no list is ever short."""

    def delete(self, key: str) -> None:
        """Raises ObjectMissing where there is nothing."""

    def lease(self, key: str, *, ttl: float = 60.0) -> AbstractContextManager[Lease]:
        """Hold an exclusive lease, whose record stays under `key`: removing that breaks the lease.

        Raises Locked when another holds it, StoreError where the store cannot promise one. A holder that died
        is replaced, at the latest after waiting 1.5 * ttl seconds.
        """


class Lease(Protocol):
    """Exclusive right to do something irreversible."""

    @property
    def token(self) -> int:
        """Grows with every holder: a fencing token."""

    def check(self) -> None:
        """Call before every irreversible step. Raises Locked when the lease was lost."""


# --- recovery points -----------------------------------------------------------------------------------


class PointKind(StrEnum):
    FULL = "full"
    """Stands alone."""
    LOG = "log"
    """Continues one."""


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """A state of one source that can be restored."""

    id: str
    source: str
    driver: str
    kind: PointKind
    instant: datetime
    """The instant whose state a restore brings back."""
    started: datetime
    finished: datetime
    size: int
    """Bytes when restored."""
    stored: int
    """Bytes that the run added to the repository."""
    members: int
    warnings: tuple[str, ...] = ()
    facts: Facts = field(default_factory=dict)
    attributes: Mapping[str, Json] = field(default_factory=dict)
    """What a restore must know: server version, image, databases. Never a secret."""


# --- the log of a continuous source ---------------------------------------------------------------------

# Positions count bytes: a log's piece is as long as its positions say. A recovery point that a log continues has
# the attributes "epoch", "start" and "end": a restore of it needs the log from `start` at least up to `end`, is
# consistent there, and everything acknowledged before the point's instant lies at or before `end`.


class Anchor(NamedTuple):
    """All that was acknowledged before `at` lies at or before `position`."""

    at: datetime
    position: int


@dataclass(frozen=True, slots=True)
class LogSpan:
    """A stored piece of a source's log, [start, end) of an epoch. One with `start` = `end` only holds an anchor."""

    source: str
    epoch: str
    """Positions of two have nothing in common. PostgreSQL: "<system identifier>-<timeline>"; Redis: replication id."""
    start: int
    end: int
    anchor: Anchor | None
    """The newest that counts once this span is stored. Of a listing, its position is `end`: true, if less exact."""
    size: int
    """Bytes as stored."""
    anchors: tuple[Anchor, ...] = ()
    """Exact, oldest first: those at or before its end that no earlier piece had. Only of a piece that was read."""


class LogMark(NamedTuple):
    """What happened at a position of a log."""

    source: str
    epoch: str
    position: int
    after: str = ""
    """The epoch that this one continues here. Empty: a gap. No restore replays a log across one: what followed was
    lost, or its times cannot be trusted."""


class LogSink(Protocol):
    """Where a recorder puts what it reads."""

    def claim(self, server: str) -> None:
        """Before all else: which running server is recorded, by a name that no copy of it has. Raises Locked."""

    def begin(self, epoch: str, position: int) -> None:
        """What follows belongs to this epoch and begins there. Where the one before ended, without a gap between, it
        continues that. Raises StoreError where more of the epoch is stored already: its log was rewritten."""

    def piece(self, start: int, end: int, data: bytes) -> None:
        """Durable when it returns; only then may the source let it go. Each piece begins where the one before
        ended; the same again is no mistake. Raises StoreError."""

    def anchor(self, at: datetime, position: int) -> None:
        """As `Anchor`: the clock read first, then the position. Counts once so much is stored. Raises StoreError."""

    def last(self, belongs: Callable[[str], bool]) -> LogSpan | None:
        """Of epochs that belong, where the newest ends in what is stored."""

    def tail(self, epoch: str, size: int) -> bytes:
        """What is stored last of an epoch, at most `size` bytes: has the source the same there? Raises Damaged."""

    def gap(self, reason: str) -> None:
        """The window closes here; a new base is needed. Then `begin`, or an end. Raises StoreError."""


class Recorder(Protocol):
    """The continuous side of a source."""

    def record(self, since: LogSpan | None, sink: LogSink, stop: threading.Event) -> None:
        """Pieces, anchors and gaps, from the end of `since` on, until stopped. Raises what went wrong; begun again."""


# --- what a driver captures ----------------------------------------------------------------------------


class Tree(NamedTuple):
    """A directory, read by the archive engine itself: every kind of entry, with what each carries."""

    root: Path
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    paged: tuple[str, ...] = ()
    """Patterns of files that change in place in fixed pages (SQLite, PGDATA): cut at fixed offsets."""
    page_size: int = 16384
    one_file_system: bool = True


class Stream(NamedTuple):
    """Bytes of unknown length under a member name; `chunks` raises at its end if what made it ended badly."""

    name: str
    chunks: Iterator[bytes]
    paged: bool = False


class Streams(NamedTuple):
    """Streams, captured one after another; the iterator may start the next dump when it is asked for it."""

    streams: Iterable[Stream]


class TarStream(NamedTuple):
    """A tree that can only be had as a tar (GNU, pax) from elsewhere: a volume behind a helper container."""

    file: BinaryIO
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    paged: tuple[str, ...] = ()
    """Patterns of files that change in place in fixed pages."""
    page_size: int = 16384
    onto: bool = False
    """It continues the point before: a sparse file with the pax record `BACKUPD.onto` brings only pages that changed,
    and between them is what that point has."""


Content: TypeAlias = Tree | Streams | TarStream


@dataclass(slots=True)
class Capture:
    """What one capture yields. A driver may fill in `instant`, `facts`, `attributes` and `warnings` until its
    context ends; a context that ends with an exception makes no recovery point."""

    content: Content
    instant: datetime
    facts: dict[str, Json] = field(default_factory=dict)
    attributes: dict[str, Json] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


# --- what a restore hands to a driver --------------------------------------------------------------------


class MemberType(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"
    FIFO = "fifo"
    CHARACTER_DEVICE = "character-device"
    BLOCK_DEVICE = "block-device"


class Member(NamedTuple):
    """One entry of an archive. `name` is relative, `/`-separated, undecodable bytes as surrogate escapes."""

    name: str
    type: MemberType
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    link: str = ""
    """Where a symlink points; for a hard link, the name of the member it is another name of."""


class Archive(Protocol):
    """The bytes of one recovery point. Every byte handed out was compared with its digest first."""

    @property
    def point(self) -> RecoveryPoint: ...

    def members(self) -> Iterator[Member]:
        """In the order of the tree; a directory before what it holds."""

    def read(self, name: str) -> Iterator[bytes]:
        """The content of one file or stream. Raises NoRecoveryPoint when there is none of that name, Damaged."""

    def tar(
        self, change: Callable[[Member], Member | None] | None = None, *, end: bool = True
    ) -> Iterator[Bytes]:
        """The whole tree as a pax tar with xattrs, ACLs and nanosecond times, made on the fly. `change` says how a
        member stands in it, under which name, owner, mode and time; None leaves it out, and its content is not read.
        Without its `end` for who has more entries to put behind."""

    def extract(self, into: Path) -> Sequence[str]:
        """Write the tree under `into`, which must be empty or absent. Returns what the target could not take: an
        owner without being root, an attribute its file system has no room for. Raises RestoreFailed, Damaged."""


class Container(Protocol):
    """One container, running or not."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def env(self) -> Mapping[str, str]: ...
    @property
    def running(self) -> bool: ...
    @property
    def kernel(self) -> tuple[int, ...]:
        """The version of the Linux it runs on; empty where the engine does not tell."""

    def mount(self, destination: str, *, whole: bool = False) -> Path | None:
        """The host directory behind a mount at `destination`, when this process can reach it; `whole`: and sees there
        all that the container does."""

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: Iterable[Bytes] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Iterator[bytes]:
        """Run a program in it; stdout in chunks. Raises CommandFailed at the end when it ended badly. Secrets go
        into `env`, never into `argv`."""

    def read(self, path: str) -> Iterator[bytes]:
        """A tar of `path`, made by the engine; works on a stopped container. No xattrs, whole seconds."""

    def write(self, path: str, tar: Iterable[Bytes]) -> None:
        """Unpack a tar at `path`; works on a stopped container."""

    def start(self) -> None: ...
    def stop(self, *, timeout: int = 30) -> None: ...
    def pause(self) -> None: ...
    def unpause(self) -> None: ...

    def address(self, port: int) -> tuple[str, int]:
        """Where this process reaches a port of it."""

    def logs(self, lines: int = 20) -> str: ...


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What a fresh home for a source needs."""

    image: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()
    """Where a fresh volume each is mounted."""
    port: int | None = None
    ready: tuple[str, ...] = ()
    """A program that, run in the container, exits with 0 once the service answers. The container has a shell."""
    load_while: str = "running"
    """`running`: load() is called when the service is ready. `stopped`: before its first start."""
    service: bool = True
    """False: nothing runs; the container only holds the volume (a volume source)."""


class Sandbox(Protocol):
    """Fresh containers on a private network for one restore."""

    @property
    def name(self) -> str: ...

    def create(self, source: str, spec: ContainerSpec) -> Container:
        """Made, not started; on the private network its host name is `source`."""

    def wait_ready(
        self, container: Container, spec: ContainerSpec, *, moving: Callable[[], str] = str
    ) -> None:
        """`moving` tells how far it is: while that changes, it is waited for. What it raises ends the wait.

        Raises RestoreFailed with the container's last lines when it has ended, or stands still and is not ready."""

    def destroy(self) -> None:
        """Containers, volumes and network: all that this sandbox made, and nothing else."""


# --- drivers -------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Something `check` found, and how to mend it."""

    message: str
    hint: str = ""
    fatal: bool = True


class Driver(Protocol):
    """How one kind of source is captured, restored, checked."""

    @property
    def kind(self) -> str: ...

    def capture(self, since: RecoveryPoint | None) -> AbstractContextManager[Capture]:
        """Capture now. Raises CaptureFailed with a hint."""

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """What a fresh container for this point must be."""

    def load(self, archive: Archive, container: Container) -> None:
        """Bring the point back into a fresh container, in the state `home().load_while` names.
        Raises RestoreFailed where the container already holds data, or the load does not end well."""

    def facts(self, container: Container) -> Facts:
        """The same measurement as at capture, on a restored, running container."""

    def check(self) -> Sequence[Problem]:
        """Is the source reachable, readable, of a supported version? Touches nothing."""


@runtime_checkable
class RecordingDriver(Protocol):
    """A power that some drivers have besides: the log between two recovery points."""

    def recorder(self, *, interval: float) -> Recorder:
        """`interval`: seconds after which what came is stored."""

    def load_to(
        self, archive: Archive, logs: Iterator[tuple[LogSpan, bytes]], at: datetime | None, container: Container,
        **target: str,
    ) -> None:  # fmt: skip
        """As `load`, then replay the logs up to `at` (None: to their end). Pieces in order, each beginning where the
        one before ended, the first at or before the point's `start`. `target` instead of `at`: lsn, xid or name."""

    def recovered(self, container: Container) -> Facts:
        """How that ended, in a running container: `last_commit` is in it, `first_left_out` is not, or None. Where a
        log has no times of its own: it is exactly `as_of` and more had been done by `more_by`, or holds all that was
        done by `holds_until`. Raises RestoreFailed where it has not ended."""


# --- runs ----------------------------------------------------------------------------------------------


class RunStatus(StrEnum):
    OK = "ok"
    WARNED = "warned"
    FAILED = "failed"
    ABANDONED = "abandoned"
    """Told to stop, or the agent died."""
    REFUSED = "refused"
    """The one before it was still at work."""
    MISSED = "missed"
    """The agent was not there when it was due."""
    RUNNING = "running"


class Run(NamedTuple):
    """One doing of a job: backup, restore, prune, verify; also one that should have happened and did not."""

    id: str
    job: str
    """`backup`, `compact`, `restore`, `prune`, `verify`."""
    source: str
    """Source or stack; empty for work on the whole repository."""
    status: RunStatus
    started: datetime
    finished: datetime | None = None
    due: datetime | None = None
    """When the schedule wanted it; None when a person did."""
    point: str = ""
    size: int = 0
    stored: int = 0
    message: str = ""
    """What failed, and what to do; empty when all is well."""
    warnings: tuple[str, ...] = ()


class Progress(Protocol):
    """Told of work as it goes; drawn by `cli`, ignored by tests."""

    def stage(self, text: str) -> None: ...
    def advance(self, size: int = 0, members: int = 0) -> None: ...


class Silence:
    """A Progress that says nothing."""

    def stage(self, text: str) -> None: ...
    def advance(self, size: int = 0, members: int = 0) -> None: ...
