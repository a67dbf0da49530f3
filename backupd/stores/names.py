"""What a key may be. Checked on the way in and on the way out, by every store: no crap in, no crap out.

A store keeps things of its own (temporary files, locks, probes) under names with a `+`, which no key has;
so `list` never shows them, on any store, nor what strangers put there (`lost+found`, `.DS_Store`, `.nfs...`).
"""

from __future__ import annotations

import re

from backupd.errors import StoreError

# No leading dot: NFS and FUSE park deleted files as `.nfs...` and `.fuse_hidden...` beside ours.
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_KEY = re.compile(rf"{_PART}(?:/{_PART})*")
_PREFIX = re.compile(rf"(?:{_PART}/)*(?:{_PART})?")
_LONGEST = 800  # S3 allows 1,024 bytes, of which a prefix inside the bucket takes some

OWN = "+"
"""Names of a store's own begin with this."""


def is_key(text: str) -> bool:
    """True when `text` may be the name of an object."""
    return len(text) <= _LONGEST and _KEY.fullmatch(text) is not None


def is_part(text: str) -> bool:
    """True when `text` may be one part of a key, between two slashes."""
    return "/" not in text and is_key(text)


def check_key(key: str) -> None:
    """Raises StoreError when `key` cannot be the name of an object."""
    if not is_key(key):
        raise StoreError(
            f"{key[:100]!r} cannot be the name of an object",
            hint="names are parts of A-Z a-z 0-9 . _ - joined by /, and no part begins with a dot",
        )


def check_prefix(prefix: str) -> None:
    """Raises StoreError when no key can begin with `prefix`."""
    if len(prefix) > _LONGEST or _PREFIX.fullmatch(prefix) is None:
        raise StoreError(f"no object's name can begin with {prefix[:100]!r}")


def check_range(offset: int, length: int | None) -> None:
    """Raises StoreError for a range that no object has."""
    if offset < 0 or (length is not None and length < 0):
        raise StoreError(f"there is no range of {length} bytes at {offset}")
