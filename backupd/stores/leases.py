"""Exclusive leases: the right to do what cannot be undone.

Two kinds. `HeartbeatLease` needs an object that can be replaced on condition (S3): its holder renews it, and
a holder that stops is taken over once its record stayed unchanged for one and a half times its time to live,
measured by the taker's own clock; clocks of hosts are never compared. `FlockLease` is a lock of the kernel
on a local file: let go when the process dies, however it dies.

Both keep a record under the lease's key (owner, token). The token grows with every holder and never starts
again: the record stays when the lease is released.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from backupd.errors import Locked, ObjectMissing, StoreError

_log = logging.getLogger(__name__)


def owner_name() -> str:
    """Who holds a lease, for people; unique, as two leases of one process are two holders."""
    return f"{os.uname().nodename}:{os.getpid()}:{os.urandom(4).hex()}"


def held_by_another(key: str, owner: str | None, *, ttl: float | None = None) -> Locked:
    """The error for a lease that somebody has."""
    patience = f"; a holder that died is given up after {ttl * 1.5:.0f} s" if ttl else ""
    return Locked(
        f"another agent ({owner or 'unknown'}) holds the lease {key}",
        hint=f"try again when it is done{patience}",
    )


class Record(NamedTuple):
    """What stands in a lease's object."""

    owner: str | None
    token: int
    ttl: float
    beat: int = 0
    """Grows with every renewal, so that every write of a holder differs from the one before."""

    @classmethod
    def read(cls, data: bytes) -> Record:
        """Raises StoreError where the object is no lease."""
        try:
            fields = json.loads(data)
            owner = fields["owner"]
            return cls(
                None if owner is None else str(owner),
                int(fields["token"]),
                float(fields["ttl"]),
                int(fields["beat"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            raise StoreError(
                "the lease's object holds no lease", hint="remove it if no agent is at work"
            ) from None

    @classmethod
    def after(cls, before: Record | None, *, owner: str, ttl: float) -> Record:
        """The record of the next holder. Tokens start at the clock's milliseconds, not at 1: they go on growing
        even when somebody removed the object."""
        return cls(owner, max(before.token + 1 if before else 1, int(time.time() * 1000)), ttl)

    def written(self) -> bytes:
        fields = {"owner": self.owner, "token": self.token, "ttl": self.ttl, "beat": self.beat}
        return json.dumps(fields).encode()

    def released(self) -> Record:
        return self._replace(owner=None)


# --- on conditional writes ---------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A register's content, and what it must be compared with when it is replaced."""

    data: bytes
    tag: str
    age: float | None = None
    """Seconds since it was written, by the server's clock alone; None where the server does not say."""


class Register(Protocol):
    """One small object that is replaced on condition."""

    def read(self) -> Reading | None:
        """None where there is none."""

    def write(self, data: bytes, expected: str | None) -> str | None:
        """Replace what has the tag `expected` (None: there is nothing). The new tag; None when refused."""


def clocks() -> tuple[float, float]:
    """Seconds since boot, and of the calendar.

    The first counts on while the machine sleeps (the monotonic clock does not: a laptop that woke up would go
    on deleting), the second while a virtual machine is frozen.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)), time.time()


class HeartbeatLease:
    """Renewed in the background until `close`. Raises Locked from the constructor when another holds it.

    A record younger than half its time to live is taken to be alive at once; an older one is watched until it
    changes (Locked) or not (taken over), so that the constructor can take 1.5 * ttl seconds.
    """

    def __init__(
        self,
        register: Register,
        key: str,
        *,
        ttl: float,
        now: Callable[[], tuple[float, float]] = clocks,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._register, self._key, self._ttl = register, key, ttl
        self._now, self._sleep = now, sleep
        self._since = now()
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._record, self._tag = self._acquire(owner_name())
        self._thread = threading.Thread(target=self._beat, name=f"lease {key}", daemon=True)
        self._thread.start()

    @property
    def token(self) -> int:
        return self._record.token

    def check(self) -> None:
        """No round trip: a lease not renewed for `ttl` seconds counts as lost, whatever the store holds."""
        if self._lost.is_set() or self._ran_out():
            self._lost.set()
            raise Locked(
                f"the lease {self._key} was lost",
                hint="the store was out of reach for too long, the machine slept, or the lease was removed",
            )

    def close(self) -> None:
        """Let go. A store that cannot be reached does not matter: the record then grows stale by itself."""
        self._stop.set()
        self._thread.join()
        if not self._lost.is_set() and not self._ran_out():
            with contextlib.suppress(StoreError):
                self._register.write(self._record.released().written(), self._tag)

    def _ran_out(self) -> bool:
        return any(now - since >= self._ttl for now, since in zip(self._now(), self._since, strict=True))

    def _acquire(self, owner: str) -> tuple[Record, str]:
        watched: str | None = None
        watched_since = 0.0
        for _ in range(10_000):
            self._since = self._now()
            reading = self._register.read()
            before = Record.read(reading.data) if reading else None
            if reading is not None and before is not None and before.owner is not None:
                now = self._now()[0]
                if watched is None:
                    watched, watched_since = reading.tag, now
                    alive = reading.age is not None and 0 <= reading.age < before.ttl / 2
                else:
                    alive = reading.tag != watched
                if alive:
                    raise held_by_another(self._key, before.owner, ttl=before.ttl)
                if now - watched_since < before.ttl * 1.5:
                    self._sleep(min(1.0, before.ttl / 10))
                    continue
                _log.warning("lease %s: %s has been silent too long, taking over", self._key, before.owner)
            record = Record.after(before, owner=owner, ttl=self._ttl)
            self._since = self._now()
            tag = self._write(record, reading.tag if reading else None)
            if tag is not None:
                return record, tag
            watched = None  # another was quicker: see who it is
        raise held_by_another(self._key, None)

    def _write(self, record: Record, expected: str | None) -> str | None:
        """A refusal may be of our own write sent twice, its first answer lost: look whose it is."""
        tag = self._register.write(record.written(), expected)
        if tag is None:
            reading = self._register.read()
            if reading is not None and reading.data == record.written():
                return reading.tag
        return tag

    def _beat(self) -> None:
        pause = self._ttl / 3
        while not self._stop.wait(pause):
            started = self._now()
            record = self._record._replace(beat=self._record.beat + 1)
            try:
                tag = self._write(record, self._tag)
            except StoreError as error:
                _log.warning("lease %s could not be renewed: %s", self._key, error)
                pause = self._ttl / 10
                continue
            if tag is None:
                self._lost.set()
                return
            self._record, self._tag, self._since = record, tag, started
            pause = self._ttl / 3


# --- on a lock of the kernel ------------------------------------------------------------------------------


class Records(Protocol):
    """Where a FlockLease keeps its record: the store it belongs to."""

    def put(self, key: str, data: bytes, *, overwrite: bool = False) -> None: ...
    def get(self, key: str) -> bytes: ...


_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FlockLease:
    """An exclusive flock on `path`, which is never removed: a lock on a removed file excludes nobody.

    Good between all processes of one host, containers included. Between hosts that mount one directory it is
    as good as the locks of that file system (NFS 4 and SMB pass them on, sshfs does not).
    """

    def __init__(self, path: Path, key: str, records: Records, *, ttl: float) -> None:
        self._path, self._key, self._records = path, key, records
        self._file = self._lock()
        try:
            self._record = Record.after(self._last(), owner=owner_name(), ttl=ttl)
            records.put(key, self._record.written(), overwrite=True)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def token(self) -> int:
        return self._record.token

    def check(self) -> None:
        """Raises Locked when the lock file or the record is no longer the one of this holder."""
        with contextlib.suppress(ObjectMissing, FileNotFoundError):
            same_file = os.path.samestat(os.fstat(self._file), self._path.stat())
            if same_file and self._records.get(self._key) == self._record.written():
                return
        raise Locked(f"the lease {self._key} was lost", hint="its file was removed or replaced")

    def close(self) -> None:
        try:
            with contextlib.suppress(Locked, StoreError, OSError):
                self.check()
                self._records.put(self._key, self._record.released().written(), overwrite=True)
        finally:
            os.close(self._file)

    def _lock(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._lock_once(file)
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
            except FileNotFoundError:
                pass  # removed between open and lock: once more, with a new one
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _lock_once(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise held_by_another(self._key, self._holder()) from None
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                raise self._no_locks() from None
            raise
        # A file system may say yes to everybody: our own second lock must be refused.
        second = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(second)
        raise self._no_locks()

    def _last(self) -> Record | None:
        try:
            return Record.read(self._records.get(self._key))
        except ObjectMissing:
            return None

    def _holder(self) -> str | None:
        try:
            last = self._last()
        except StoreError:
            return None
        return last.owner if last else None

    def _no_locks(self) -> StoreError:
        return StoreError(
            f"the file system of {self._path.parent} keeps no locks",
            hint="prune must not run there; mount it with locking, or keep the repository elsewhere",
        )


@contextlib.contextmanager
def holding(lease: HeartbeatLease | FlockLease) -> Iterator[HeartbeatLease | FlockLease]:
    """A lease as a `with` block."""
    try:
        yield lease
    finally:
        lease.close()
