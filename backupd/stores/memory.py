"""A store in memory: the reference for what a store does. It lives as long as the object does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backupd.errors import Locked, ObjectExists, ObjectMissing
from backupd.model import Bytes, Lease, ObjectInfo
from backupd.stores.names import check_key, check_prefix, check_range

if TYPE_CHECKING:
    from backupd.stores.leases import Record


class MemoryStore:
    """Objects in a dictionary. Safe for use by several threads."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.RLock()

    @property
    def location(self) -> str:
        return "memory:"

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        check_key(key)
        with self._lock:
            if key in self._objects and not overwrite:
                raise ObjectExists(f"{key} is already there")
            self._objects[key] = (bytes(data), datetime.now(UTC))

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(offset, length)
        data, _ = self._find(key)
        return data[offset:] if length is None else data[offset : offset + length]

    def stat(self, key: str) -> ObjectInfo:
        check_key(key)
        data, modified = self._find(key)
        return ObjectInfo(key, len(data), modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [(key, *value) for key, value in self._objects.items() if key.startswith(prefix)]
        return iter([ObjectInfo(key, len(data), modified) for key, data, modified in sorted(found)])

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._find(key)
            del self._objects[key]

    @contextmanager
    def lease(self, key: str, *, ttl: float = 60.0) -> Iterator[Lease]:
        from backupd.stores.leases import Record, held_by_another, owner_name

        check_key(key)
        with self._lock:
            before = Record.read(self._objects[key][0]) if key in self._objects else None
            if before is not None and before.owner is not None:
                raise held_by_another(key, before.owner)
            record = Record.after(before, owner=owner_name(), ttl=ttl)
            self.put(key, record.written(), overwrite=True)
        lease = MemoryLease(self, key, record)
        try:
            yield lease
        finally:
            with self._lock:
                if lease.held():
                    self.put(key, record.released().written(), overwrite=True)

    def _find(self, key: str) -> tuple[bytes, datetime]:
        with self._lock:
            try:
                return self._objects[key]
            except KeyError:
                raise ObjectMissing(f"there is no object {key}") from None


class MemoryLease:
    """Held until the end of its `with`, or until somebody removes its object."""

    def __init__(self, store: MemoryStore, key: str, record: Record) -> None:
        self._store, self._key, self._record = store, key, record

    @property
    def token(self) -> int:
        return self._record.token

    def held(self) -> bool:
        """True while the object is what this holder wrote."""
        try:
            return self._store.get(self._key) == self._record.written()
        except ObjectMissing:
            return False

    def check(self) -> None:
        if not self.held():
            raise Locked(f"the lease {self._key} was lost")
