"""What a ChromaDB directory holds, read from its files: collections, records, embeddings. Changes nothing.

Logical state = what the segments have applied + what still waits in `embeddings_queue` behind each segment's
`max_seq_id`: after a write is acknowledged its vector may be in the queue alone, and after the queue was purged
in the index alone. So the digests of a directory stay the same when a server replays its queue.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backupd.drivers.chroma_index import Index, TornIndex
from backupd.drivers.chroma_snapshot import DATABASE, LAST_WRITTEN
from backupd.model import Json

MEASURE_AT_MOST = 100_000
"""Records of one collection up to which digests are taken; above, they are only counted. Bounds memory."""
CHECK_AT_MOST = 64 << 20
"""Bytes of an index's metadata up to which it is read whole after a capture."""
_DOCUMENT = "chroma:document"
_ADD, _UPDATE, _UPSERT, _DELETE = range(4)


@dataclass(frozen=True, slots=True)
class Collection:
    """One collection and its two segments."""

    id: str
    name: str
    tenant: str
    database: str
    dimension: int | None
    space: str
    metadata_segment: str = ""
    vector_segment: str = ""

    @property
    def path(self) -> str:
        """Its full name."""
        return f"{self.tenant}/{self.database}/{self.name}"


@dataclass(slots=True)
class Record:
    """One record, without its embedding."""

    document: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def apply(self, changes: dict[str, Any]) -> None:
        """As ChromaDB applies an update: a null removes the key."""
        for key, value in changes.items():
            if key == _DOCUMENT:
                self.document = value
            elif value is None:
                self.metadata.pop(key, None)
            else:
                self.metadata[key] = value


@contextmanager
def opened(root: Path, *, still: bool) -> Iterator[sqlite3.Connection]:
    """The directory's database, for reading. `still`: nobody else has it open, and no file may appear beside it."""
    mode = "immutable=1" if still else "mode=ro"
    with closing(
        sqlite3.connect(f"file:{quote(str(root / DATABASE))}?{mode}", uri=True, timeout=60)
    ) as database:
        yield database


def recover(root: Path) -> None:
    """Bring a copy that was taken of a paused server to rest: roll back what was under way, as it would itself."""
    (root / f"{DATABASE}-shm").unlink(missing_ok=True)  # rebuilt from the log
    with closing(sqlite3.connect(root / DATABASE, timeout=60)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()


def collections(database: sqlite3.Connection) -> list[Collection]:
    """All of them, in the order of their full names."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(collections)")}
    extra = [name if name in columns else "NULL" for name in ("schema_str", "config_json_str")]
    legacy = dict(
        database.execute("SELECT collection_id, str_value FROM collection_metadata WHERE key = 'hnsw:space'")
    )
    segments: dict[str, dict[str, str]] = {}
    for segment, scope, owner in database.execute("SELECT id, scope, collection FROM segments"):
        segments.setdefault(owner, {})[scope] = segment
    rows = database.execute(
        f"SELECT c.id, c.name, d.tenant_id, d.name, c.dimension, {', '.join(extra)} "  # noqa: S608  two fixed words
        "FROM collections c JOIN databases d ON d.id = c.database_id ORDER BY 3, 4, 2"
    )
    return [
        Collection(
            key,
            name,
            tenant,
            base,
            dimension,
            _space(schema, config) or legacy.get(key) or "l2",
            segments.get(key, {}).get("METADATA", ""),
            segments.get(key, {}).get("VECTOR", ""),
        )
        for key, name, tenant, base, dimension, schema, config in rows
    ]


def _space(schema: str | None, config: str | None) -> str:
    """How distances are measured, from the newest place that says it."""
    for text, ways in (
        (schema, (("keys", "#embedding"), ("defaults",))),
        (config, ((),)),
    ):
        found = json.loads(text) if text else {}
        for way in ways:
            tail = ("float_list", "vector_index", "config", "space") if text is schema else ("hnsw", "space")
            value: Any = found
            for step in (*way, *tail):
                value = value.get(step) if isinstance(value, dict) else None
            if isinstance(value, str):
                return value
    return ""


def _number(seq: object) -> int:
    return int.from_bytes(seq, "big") if isinstance(seq, bytes) else seq if isinstance(seq, int) else 0


class State:
    """One collection as it stands in the files. Close it."""

    def __init__(self, root: Path, database: sqlite3.Connection, collection: Collection) -> None:
        """Raises TornIndex, sqlite3.Error."""
        self.collection = collection
        self._database = database
        self._rows: dict[str, int] = dict(
            database.execute(
                "SELECT embedding_id, id FROM embeddings WHERE segment_id = ?", (collection.metadata_segment,)
            )
        )
        self._changed: dict[str, Record | None] = {}
        self._vectors: dict[str, bytes | None] = {}
        directory = root / collection.vector_segment
        has_index = bool(collection.vector_segment) and (directory / LAST_WRITTEN).exists()
        self._index = Index(directory) if has_index else None
        self._replay()

    def close(self) -> None:
        """Closing twice is fine."""
        if self._index is not None:
            self._index.close()

    def _queue(self, segment: str) -> Iterator[tuple[int, str, bytes | None, str | None, str | None]]:
        """What this segment has not applied yet, in order."""
        row = self._database.execute(
            "SELECT seq_id FROM max_seq_id WHERE segment_id = ?", (segment,)
        ).fetchone()
        yield from self._database.execute(
            "SELECT operation, id, vector, encoding, metadata FROM embeddings_queue "
            "WHERE seq_id > ? AND topic LIKE '%' || ? ORDER BY seq_id",
            (_number(row[0]) if row else 0, self.collection.id),
        )

    def _replay(self) -> None:
        for operation, key, _, _, text in self._queue(self.collection.metadata_segment):
            known = self.has(key)
            if operation == _DELETE:
                self._changed[key] = None
            elif (known and operation in (_UPDATE, _UPSERT)) or (not known and operation in (_ADD, _UPSERT)):
                record = self.record(key) if known else Record()
                record.apply(json.loads(text) if text else {})
                self._changed[key] = record
        for operation, key, vector, encoding, _ in self._queue(self.collection.vector_segment):
            known = self.vector(key) is not None
            if operation == _DELETE:
                self._vectors[key] = None
            elif vector is not None and (operation == _UPSERT or known == (operation == _UPDATE)):
                self._vectors[key] = self._stored(vector, encoding)

    def _stored(self, vector: bytes, encoding: str | None) -> bytes:
        if encoding not in (None, "FLOAT32"):
            raise TornIndex(f"a vector of {self.collection.path} is coded as {encoding}")
        return normalised(vector) if self.collection.space == "cosine" else vector

    def ids(self) -> list[str]:
        """Sorted."""
        changed = {key for key, record in self._changed.items() if record is not None}
        return sorted((self._rows.keys() | changed) - {k for k, r in self._changed.items() if r is None})

    def has(self, key: str) -> bool:
        """There is a record with this id."""
        return self._changed[key] is not None if key in self._changed else key in self._rows

    def record(self, key: str) -> Record:
        """Its document and metadata. Raises KeyError."""
        if key in self._changed:
            changed = self._changed[key]
            if changed is None:
                raise KeyError(key)
            return changed
        row, record = self._rows[key], Record()
        for name, *values in self._database.execute(
            "SELECT key, string_value, int_value, float_value, bool_value FROM embedding_metadata WHERE id = ?",
            (row,),
        ):
            record.apply({name: _value(values)})
        if self._has_arrays():
            for name, *values in self._database.execute(
                "SELECT key, string_value, int_value, float_value, bool_value FROM embedding_metadata_array "
                "WHERE id = ? ORDER BY rowid",
                (row,),
            ):
                record.metadata.setdefault(name, []).append(_value(values))
        return record

    def _has_arrays(self) -> bool:
        return bool(
            self._database.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'embedding_metadata_array'"
            ).fetchone()
        )

    def vector(self, key: str) -> bytes | None:
        """float32s; of length 1 where the space is cosine. None where there is none."""
        if key in self._vectors:
            return self._vectors[key]
        if self._index is None or key not in self._index.labels:
            return None
        return self._index.vector(key)


def _value(values: list[Any]) -> Any:
    text, whole, real, truth = values
    if text is not None:
        return text
    if truth is not None:
        return bool(truth)
    return whole if whole is not None else real


def normalised(vector: bytes) -> bytes:
    """The vector at length 1, to the last bit as ChromaDB's index stores it: each step rounded to float32."""
    numbers = struct.unpack(f"<{len(vector) // 4}f", vector)
    total = 0.0
    for number in numbers:
        total = _single(total + _single(number * number))
    scale = _single(1.0 / _single(_single(math.sqrt(total)) + 1e-30))
    return struct.pack(f"<{len(numbers)}f", *(number * scale for number in numbers))


_SINGLE = struct.Struct("<f")


def _single(number: float) -> float:
    rounded: float = _SINGLE.unpack(_SINGLE.pack(number))[0]
    return rounded


# --- measuring -----------------------------------------------------------------------------------------


def measure(root: Path, *, still: bool) -> tuple[dict[str, Json], list[str]]:
    """Facts of every collection by its full name, and what looks wrong. Raises TornIndex, sqlite3.Error."""
    found: dict[str, Json] = {}
    warnings: list[str] = []
    with opened(root, still=still) as database:
        for collection in collections(database):
            facts: dict[str, Json] = {"id": collection.id, "dimension": collection.dimension}
            if _rows(database, collection) > MEASURE_AT_MOST:
                facts["count"] = _rows(database, collection)
            else:
                with closing(State(root, database, collection)) as state:
                    facts.update(_digests(state))
                    if without := [key for key in state.ids() if state.vector(key) is None]:
                        warnings.append(
                            f"{collection.path}: {len(without)} records have no embedding, {without[0]!r} first"
                        )
            found[collection.path] = facts
    return found, warnings


def _rows(database: sqlite3.Connection, collection: Collection) -> int:
    query = "SELECT count(*) FROM embeddings WHERE segment_id = ?"
    return int(database.execute(query, (collection.metadata_segment,)).fetchone()[0])


def _digests(state: State) -> dict[str, Json]:
    records, embeddings = hashlib.sha256(), hashlib.sha256()
    ids = state.ids()
    for key in ids:
        record = state.record(key)
        line = json.dumps([key, record.document, record.metadata], sort_keys=True, ensure_ascii=True)
        records.update(line.encode() + b"\n")
        embeddings.update(json.dumps(key).encode() + (state.vector(key) or b"none") + b"\n")
    return {"count": len(ids), "records": records.hexdigest(), "embeddings": embeddings.hexdigest()}


def check_indexes(root: Path) -> None:
    """Every index of a copy that is small enough is whole. Raises TornIndex."""
    for marker in sorted(root.glob(f"*/{LAST_WRITTEN}")):
        if marker.stat().st_size <= CHECK_AT_MOST:
            Index(marker.parent).close()
