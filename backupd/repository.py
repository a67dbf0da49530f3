"""Packs, manifests, leases and the format number on a store; the only room that makes a key.

Layout (FORMAT.md has every byte):

    backupd-repository.json                          format number, id, creation
    RECOVER.md, recover.py                           how to get everything back without backupd
    packs/<source>/<point-id>/<nnnn>.zst             rows of frames, each with its directory at its end
    points/<source>/<start-utc>-<point-id>.json.zst  manifests: stored last, the only commit
    logs/<source>/<epoch>/<start>-<end>-<anchor>.zst pieces of a continuous source's log, and marks
    leases/<name>.json                               who may delete
    leases/log/<source>.json                         whose log it is
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from backupd.codec import Codec, codec_named
from backupd.errors import Damaged, NoRecoveryPoint, ObjectMissing, RepositoryMissing, UsageError
from backupd.model import (
    Anchor,
    Bytes,
    Clock,
    Lease,
    LogMark,
    LogSpan,
    ObjectInfo,
    PointKind,
    RecoveryPoint,
    Store,
)

FORMAT = 1
HEAD_KEY = "backupd-repository.json"
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_POINT_KEY = re.compile(r"points/([^/]+)/(\d{8}T\d{6}Z)-([0-9a-f]{12})\.json\.zst")
_PACK_KEY = re.compile(r"packs/([^/]+)/([0-9a-f]{12}/\d{4,})\.zst")
_LOG_KEY = re.compile(
    r"logs/([^/]+)/([A-Za-z0-9-]+)/([0-9a-f]{16})-([0-9a-f]{16})-(\d{8}T\d{6}\.\d{6}Z|none|gap|after-[A-Za-z0-9-]+)\.zst"
)
_STAMP = "%Y%m%dT%H%M%SZ"
_ANCHOR = "%Y%m%dT%H%M%S.%fZ"
# A manifest is JSON of at most some hundred MB; its frame says its size, and we refuse to believe more.
_LARGEST_MANIFEST = 1 << 30
_READERS = 8


class PackRef(NamedTuple):
    """A pack that a point needs."""

    name: str
    """`<point-id>/<nnnn>`: of the run that wrote it."""
    size: int
    directory: int
    """Length of the pack's directory, which ends the pack."""
    digest: str
    """Of the directory, 32 hex digits. The directory holds the digests of everything else in the pack."""


class PageRef(NamedTuple):
    """One slice of a tree's index, and where it lies. There are thousands: a tuple is made in a fifth of the time that
    a frozen dataclass takes."""

    stat: str
    """Digest of the stat tuples it describes; empty where it can never be taken over unread."""
    pack: str
    offset: int
    length: int
    size: int
    """Bytes when decoded."""
    digest: str
    first: str
    """Sort key of its first entry."""
    packs: tuple[str, ...]
    """Names of the packs that its members' content lies in."""
    members: int
    bytes: int
    """Sum of its members' sizes."""


class Manifest(NamedTuple):
    """The written recovery point."""

    point: RecoveryPoint
    codec: str
    ordered: bool
    """Pages are sorted by `first`: a member is found by bisection."""
    pages: tuple[PageRef, ...]
    packs: tuple[PackRef, ...]
    replaced: tuple[tuple[str, datetime], ...] = ()
    """Packs that this manifest named until prune wrote their content anew, and when: who has read it before may
    still be reading them."""


def new_point_id() -> str:
    """Twelve hex digits."""
    return os.urandom(6).hex()


class Repository:
    """What the verbs work on. Safe to use from several threads."""

    def __init__(self, store: Store, head: Mapping[str, Any]) -> None:
        self.store = store
        self._head = head
        self.id: str = head["id"]
        self.codec: Codec = codec_named(head["codec"])

    @property
    def distant(self) -> bool:
        """Whether each request waits for an answer from afar: then many are made at once."""
        return "://" in self.store.location

    @classmethod
    def create(cls, store: Store, *, clock: Clock) -> Repository:
        """Make a new repository. Raises UsageError where one exists already."""
        try:
            store.stat(HEAD_KEY)
        except ObjectMissing:
            pass
        else:
            raise UsageError(f"there is a repository at {store.location} already", hint="use it as it is")
        head = {
            "format": FORMAT,
            "id": os.urandom(16).hex(),
            "created": clock().astimezone(UTC).isoformat(),
            "codec": "zstd",
        }
        from importlib import resources

        for name in ("RECOVER.md", "recover.py"):
            text = resources.files("backupd").joinpath("recovery", name).read_bytes()
            store.put(name, text, overwrite=True)
        store.put(HEAD_KEY, json.dumps(head, indent=2).encode() + b"\n")
        return cls(store, head)

    @classmethod
    def open(cls, store: Store) -> Repository:
        """Raises RepositoryMissing, Damaged, and UsageError for a format this version cannot read."""
        try:
            raw = store.get(HEAD_KEY)
        except ObjectMissing:
            raise RepositoryMissing(
                f"there is no repository at {store.location}",
                hint="check the location (is the disk mounted?), or make one with `backupd init`",
            ) from None
        try:
            head = json.loads(raw)
            number = head["format"]
            if not isinstance(head["id"], str) or not isinstance(head["codec"], str):
                raise ValueError("id and codec are not text")
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"{HEAD_KEY} at {store.location} cannot be read") from None
        if number != FORMAT:
            raise UsageError(
                f"the repository at {store.location} has format {number}; this version reads format {FORMAT}",
                hint="use a newer backupd, or the recover.py that lies in the repository",
            )
        return cls(store, head)

    def on(self, store: Store) -> Repository:
        """The same repository by another way to its store: one with more patience."""
        return Repository(store, self._head)

    # --- recovery points ------------------------------------------------------------------------------

    def sources(self) -> list[str]:
        """Every source that has a recovery point, sorted."""
        return sorted({_parse_point_key(info.key)[0] for info in self._point_objects(None)})

    def points(self, source: str | None = None) -> list[RecoveryPoint]:
        """Sorted by source, then instant."""
        found = [manifest.point for manifest in self._manifests(source)]
        return sorted(found, key=lambda point: (point.source, point.instant, point.id))

    def manifests(self, source: str) -> list[Manifest]:
        """Of one source, oldest instant first."""
        return sorted(
            self._manifests(source), key=lambda manifest: (manifest.point.instant, manifest.point.id)
        )

    def _manifests(self, source: str | None) -> Iterator[Manifest]:
        """Of a distant store several at once: a year of days, one after another, would be seconds of waiting."""
        keys = [info.key for info in self._point_objects(source)]
        if not self.distant or len(keys) < 2:
            yield from map(self.manifest_at, keys)
            return
        from concurrent.futures import ThreadPoolExecutor  # 10 ms to import

        with ThreadPoolExecutor(_READERS, thread_name_prefix="manifest") as readers:
            yield from readers.map(self.manifest_at, keys)

    def find(self, point_id: str) -> RecoveryPoint:
        """By id or unique prefix of it. Raises NoRecoveryPoint, UsageError when several match."""
        keys = [
            info.key
            for info in self._point_objects(None)
            if _parse_point_key(info.key)[2].startswith(point_id)
        ]
        if not keys or not point_id:
            raise NoRecoveryPoint(f"there is no recovery point '{point_id}'", hint="see `backupd list`")
        if len(keys) > 1:
            raise UsageError(
                f"'{point_id}' begins {len(keys)} recovery points", hint="give more of its digits"
            )
        return self.manifest_at(keys[0]).point

    def manifest(self, point: RecoveryPoint) -> Manifest:
        return self.manifest_at(point_key(point))

    def manifest_at(self, key: str) -> Manifest:
        """Raises ObjectMissing, Damaged."""
        stored = self.store.get(key)
        try:
            plain = self.codec.decode_unsized(stored, limit=_LARGEST_MANIFEST)
            return decode_manifest(json.loads(plain))
        except (Damaged, ValueError, KeyError, TypeError, IndexError) as error:
            raise Damaged(
                f"the manifest {key} cannot be read: {error}",
                hint="`backupd verify` names everything that is damaged; copy that object from another copy",
            ) from None

    def commit(self, manifest: Manifest) -> None:
        """Make a recovery point exist. Everything it names must be stored already."""
        self.store.put(point_key(manifest.point), self._encoded(manifest))

    def replace(self, manifest: Manifest, lease: Lease) -> int:
        """Put a manifest in the place of the one its point had, in one step; its stored length. What either names
        must be stored, and what it describes must be the same."""
        data = self._encoded(manifest)
        lease.check()
        self.store.put(point_key(manifest.point), data, overwrite=True)
        return len(data)

    def _encoded(self, manifest: Manifest) -> bytes:
        return self.codec.encode(json.dumps(encode_manifest(manifest), separators=(",", ":")).encode())

    def point_ids(self, source: str) -> set[str]:
        """Of every point of a source, readable or not: the first part of the names of the packs its run wrote."""
        return {_parse_point_key(info.key)[2] for info in self._point_objects(source)}

    def point_sizes(self, source: str) -> dict[str, int]:
        """Of the manifests of a source as stored, by point id."""
        return {_parse_point_key(info.key)[2]: info.size for info in self._point_objects(source)}

    def point_keys(self, source: str) -> list[str]:
        """Of every manifest of a source, oldest start first, readable or not."""
        return [info.key for info in self._point_objects(source)]

    def remove_point(self, point: RecoveryPoint, lease: Lease) -> None:
        lease.check()
        self.store.delete(point_key(point))

    def _point_objects(self, source: str | None) -> Iterator[ObjectInfo]:
        prefix = "points/" if source is None else f"points/{check_source(source)}/"
        for info in self.store.list(prefix):
            if _POINT_KEY.fullmatch(info.key):  # what is not ours is not read, and never touched
                yield info

    # --- packs ----------------------------------------------------------------------------------------

    def put_pack(self, source: str, name: str, data: Bytes) -> None:
        self.store.put(pack_key(source, name), data)

    def read_pack(self, source: str, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises Damaged when the pack is missing or too short."""
        key = pack_key(source, name)
        try:
            data = self.store.get(key, offset=offset, length=length)
        except ObjectMissing:
            raise Damaged(
                f"the pack {key} is missing", hint="`backupd verify` names every point that needs it"
            ) from None
        if len(data) != length:
            raise Damaged(f"the pack {key} is shorter than its manifest says")
        return data

    def pack_file(self, source: str, name: str) -> str:
        """Where a pack lies on a local store, for a process that reads it there; empty on any other."""
        location = self.store.location
        return f"{location}/{pack_key(source, name)}" if location.startswith("/") else ""

    def packs(self, source: str) -> Iterator[tuple[str, ObjectInfo]]:
        """Name and object of every pack of a source, whether a manifest names it or not."""
        for info in self.store.list(f"packs/{check_source(source)}/"):
            match = _PACK_KEY.fullmatch(info.key)
            if match:
                yield match[2], info

    def pack_sources(self) -> list[str]:
        """Every source that has packs, also where no point of it was ever finished."""
        found = (_PACK_KEY.fullmatch(info.key) for info in self.store.list("packs/"))
        return sorted({match[1] for match in found if match})

    def remove_pack(self, source: str, name: str, lease: Lease) -> None:
        lease.check()
        self.store.delete(pack_key(source, name))

    # --- logs -----------------------------------------------------------------------------------------

    def put_log(self, span: LogSpan | LogMark, data: Bytes) -> None:
        """Raises ObjectExists where there is one of the same positions and anchor."""
        self.store.put(log_key(span), data)

    def logs(self, source: str) -> tuple[list[LogSpan], list[LogMark]]:
        """Everything of a source's log, by a listing alone; sorted by epoch, then start."""
        spans: list[LogSpan] = []
        marks: list[LogMark] = []
        for info in self.store.list(f"logs/{check_source(source)}/"):
            found = _parse_log_key(info)
            if isinstance(found, LogSpan):
                spans.append(found)
            elif found is not None:
                marks.append(found)
        return spans, marks

    def read_log(self, span: LogSpan | LogMark, *, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes as stored, or all. Raises ObjectMissing: compaction or prune may have been by."""
        return self.store.get(log_key(span), offset=offset, length=length)

    def remove_log(self, span: LogSpan | LogMark, lease: Lease) -> None:
        lease.check()
        self.store.delete(log_key(span))

    # --- leases -----------------------------------------------------------------------------------------

    def lease(self, source: str) -> AbstractContextManager[Lease]:
        """The exclusive right to change what exists of a source. Raises Locked."""
        return self.store.lease(f"leases/{check_source(source)}.json")

    def claim(self, source: str) -> bytes:
        """What stands there of whose log it is. Raises ObjectMissing."""
        return self.store.get(_claim_key(source))

    def put_claim(self, source: str, data: bytes, *, new: bool) -> None:
        """Raises ObjectExists where `new` and there is one."""
        self.store.put(_claim_key(source), data, overwrite=not new)


def check_source(name: str) -> str:
    """A source's name is part of keys. Raises UsageError."""
    if not _SOURCE.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a source's name",
            hint="letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 100",
        )
    return name


def point_key(point: RecoveryPoint) -> str:
    stamp = point.started.astimezone(UTC).strftime(_STAMP)
    return f"points/{check_source(point.source)}/{stamp}-{point.id}.json.zst"


def pack_key(source: str, name: str) -> str:
    return f"packs/{check_source(source)}/{name}.zst"


def _claim_key(source: str) -> str:
    return f"leases/log/{check_source(source)}.json"


def log_key(log: LogSpan | LogMark) -> str:
    """Raises UsageError where the epoch cannot be part of a key."""
    if isinstance(log, LogMark):
        start = end = log.position
        anchor = f"after-{log.after}" if log.after else "gap"
    else:
        start, end = log.start, log.end
        anchor = log.anchor.at.astimezone(UTC).strftime(_ANCHOR) if log.anchor else "none"
    key = f"logs/{check_source(log.source)}/{log.epoch}/{start:016x}-{end:016x}-{anchor}.zst"
    if start > end or not _LOG_KEY.fullmatch(key):
        raise UsageError(f"{key} cannot be the key of a log", hint="epochs are letters, digits and dashes")
    return key


def _parse_log_key(info: ObjectInfo) -> LogSpan | LogMark | None:
    """None for what is not ours."""
    match = _LOG_KEY.fullmatch(info.key)
    if match is None:
        return None
    source, epoch, start, end, text = match[1], match[2], int(match[3], 16), int(match[4], 16), match[5]
    if text == "gap" or text.startswith("after-"):
        return LogMark(source, epoch, start, text.removeprefix("after-") if text != "gap" else "")
    anchor = None
    if text != "none":
        try:
            anchor = Anchor(datetime.strptime(text, _ANCHOR).replace(tzinfo=UTC), end)
        except ValueError:
            return None
    return LogSpan(source, epoch, start, end, anchor, info.size) if start <= end else None


def _parse_point_key(key: str) -> tuple[str, str, str]:
    match = _POINT_KEY.fullmatch(key)
    if match is None:
        raise Damaged(f"{key} is not the key of a recovery point")
    return match[1], match[2], match[3]


# --- manifests as JSON ------------------------------------------------------------------------------------

_TIMES = ("instant", "started", "finished")


def encode_manifest(manifest: Manifest) -> dict[str, Any]:
    """JSON. Packs are named once and numbered where pages refer to them."""
    point: dict[str, Any] = {f.name: getattr(manifest.point, f.name) for f in fields(RecoveryPoint)}
    for name in _TIMES:
        point[name] = point[name].astimezone(UTC).isoformat()
    number = {pack.name: index for index, pack in enumerate(manifest.packs)}
    replaced = [[name, at.astimezone(UTC).isoformat()] for name, at in manifest.replaced]
    return {
        "format": FORMAT,
        "codec": manifest.codec,
        "point": point,
        "ordered": manifest.ordered,
        "packs": [[p.name, p.size, p.directory, p.digest] for p in manifest.packs],
        "pages": [
            [p.stat, number[p.pack], p.offset, p.length, p.size, p.digest, p.first,
             [number[name] for name in p.packs], p.members, p.bytes]
            for p in manifest.pages
        ],
        **({"replaced": replaced} if replaced else {}),
    }  # fmt: skip


def decode_manifest(data: Mapping[str, Any]) -> Manifest:
    """Raises ValueError, KeyError, TypeError, IndexError where the data is not a manifest."""
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}")
    packs = tuple(PackRef(str(n), int(s), int(d), str(h)) for n, s, d, h in data["packs"])
    names = [pack.name for pack in packs]
    pages = tuple(
        PageRef(
            stat,
            names[pack],
            offset,
            length,
            size,
            digest,
            first,
            tuple(names[i] for i in used),
            members,
            total,
        )
        for stat, pack, offset, length, size, digest, first, used, members, total in data["pages"]
    )
    point = dict(data["point"])
    for name in _TIMES:
        point[name] = _time(point[name])
    point["kind"] = PointKind(point["kind"])
    point["warnings"] = tuple(point["warnings"])
    known = {f.name for f in fields(RecoveryPoint)}
    return Manifest(
        RecoveryPoint(**{key: value for key, value in point.items() if key in known}),
        str(data["codec"]), bool(data["ordered"]), pages, packs,
        tuple((str(name), _time(at)) for name, at in data.get("replaced", ())),
    )  # fmt: skip


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return time
