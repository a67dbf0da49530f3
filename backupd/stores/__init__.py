"""Where objects live. `open_store` builds the store that a location names.

| location | store |
|---|---|
| `/srv/backups`, `./backups`, `~/backups`, `file:///srv/backups` | a local directory |
| `s3://bucket/prefix` | a bucket |

Another kind of store is a class with the methods of `model.Store`, a line in `STORES` and a line in the
conformance tests, which say what it must do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from backupd.errors import UsageError
from backupd.model import Store
from backupd.stores.local import LocalStore
from backupd.stores.memory import MemoryStore
from backupd.stores.names import check_prefix
from backupd.stores.retry import RetryStore

if TYPE_CHECKING:
    from backupd.stores.s3 import S3Options

__all__ = ["STORES", "LocalStore", "MemoryStore", "RetryStore", "open_store"]


def _local(location: str, _options: S3Options | None, create: bool) -> Store:
    path = unquote(urlsplit(location).path) if location.startswith("file://") else location
    return LocalStore(path, create=create)


def _s3(location: str, options: S3Options | None, _create: bool) -> Store:
    from backupd.stores.s3 import S3Store

    address = urlsplit(location)
    if "@" in address.netloc or address.query or address.fragment:
        raise UsageError(
            "repository.location holds more than a bucket and a prefix",
            hint="s3://bucket/prefix; keys and secrets go into access_key_id and secret_access_key",
        )
    if not address.netloc:
        raise UsageError("repository.location names no bucket", hint="s3://bucket/prefix")
    check_prefix(address.path.strip("/"))
    return S3Store(address.netloc, address.path, options)


STORES: Mapping[str, Callable[[str, S3Options | None, bool], Store]] = MappingProxyType(
    {"file": _local, "s3": _s3}
)
"""Scheme of a location -> what opens it."""


def open_store(
    location: str, options: S3Options | None = None, *, create: bool = False, patience: float = 300.0
) -> Store:
    """The store at `location`, which waits out transient trouble for `patience` seconds (0: not at all).

    `create` makes a missing directory (for `init`); a bucket is never made, nor asked before the first call.
    Raises UsageError for a location that means nothing, RepositoryMissing for a missing directory.
    """
    scheme, separator, _ = location.partition("://")
    kind = scheme if separator else "file"
    if not location or kind not in STORES:
        raise UsageError(
            f"repository.location begins with {kind}://, which is no store"
            if location
            else "repository.location is empty",
            hint=f"a directory, or one of {', '.join(f'{known}://' for known in sorted(STORES))}",
        )
    if patience <= 0 and kind == "s3":
        from backupd.stores.s3 import S3Options

        options = replace(options or S3Options(), attempts=1)
    store = STORES[kind](location, options, create)
    return RetryStore(store, patience=patience)
