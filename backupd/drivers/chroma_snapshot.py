"""Copy a live ChromaDB directory to another place, at one instant. A program of its own; standard library only.

How (each step is there because leaving it out broke restored copies):
1. SQLite's write lock (BEGIN IMMEDIATE). Every write of ChromaDB begins in SQLite, so none is accepted now.
2. Wait until no index directory is being written: ChromaDB writes its *.bin files in place, and
   index_metadata.pickle last. What was accepted before the lock may still be on its way there.
3. Copy the index directories. 4. Copy chroma.sqlite3 by SQLite's backup. 5. Let go of the lock.
To block writers as shortly as possible, files that have not changed for a while are copied before step 1, and
under the lock only compared by size and times.

Why a process of its own: POSIX locks belong to a process, and closing *any* descriptor of chroma.sqlite3
anywhere in it drops them without a word: another source that reads the same directory would unlock us.
The locks need one kernel: this does not work over NFS, nor across machines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DATABASE = "chroma.sqlite3"
BESIDE = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a database while it is in use."""
LAST_WRITTEN = "index_metadata.pickle"
LOCK_WITHIN = 120.0
"""Seconds to wait for the write lock; ChromaDB itself holds it for milliseconds."""
SETTLED_WITHIN = 60.0
QUIET = 10.0
"""Seconds without a change, under the lock, after which an index counts as settled whatever its times say."""
_OLD_ENOUGH = 2.0
"""A file younger than this may still change within one tick of its clock."""


class SnapshotError(Exception):
    """What happened, and what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


Stamp = tuple[int, int, int, int]


def stamp(info: os.stat_result) -> Stamp:
    """What changes when a file does."""
    return (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def files_of(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every regular file below, except the database and what SQLite keeps beside it."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if Path(folder) == root and name in (DATABASE, *(DATABASE + ending for ending in BESIDE)):
                continue
            with contextlib.suppress(FileNotFoundError):  # a deleted collection
                info = path.lstat()
                if stat.S_ISREG(info.st_mode):
                    yield path, info


def unsettled(root: Path) -> str:
    """Why an index below may be in the middle of a write; empty when none is."""
    for marker in sorted(root.glob(f"*/{LAST_WRITTEN}")):
        try:
            last = marker.stat()
            newest = max(entry.stat().st_mtime_ns for entry in os.scandir(marker.parent))
            if last.st_mtime_ns < newest:
                return f"{marker.parent.name} has files newer than its {LAST_WRITTEN}"
            with marker.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b".":  # a pickle ends with STOP
                    return f"{LAST_WRITTEN} of {marker.parent.name} is cut off"
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EINVAL:  # an empty file has no last byte
                raise
            return f"{LAST_WRITTEN} of {marker.parent.name} is empty"
    return ""


def copy_file(source: Path, target: Path) -> None:
    """Content, owner, mode and times. By reference where the file system can (btrfs, xfs)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        info = os.fstat(read.fileno())
        try:
            while os.copy_file_range(read.fileno(), written.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                raise
            read.seek(0)
            written.seek(0)
            written.truncate()
            shutil.copyfileobj(read, written, 1 << 20)
    copy_look(info, target)


def copy_look(info: os.stat_result, target: Path) -> None:
    """Owner where this process may give it away, mode and times."""
    with contextlib.suppress(PermissionError):
        os.chown(target, info.st_uid, info.st_gid)
    target.chmod(stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def copy_early(root: Path, into: Path) -> dict[Path, Stamp]:
    """Copy what has been quiet for a while; what was copied, as it looked before it was read."""
    done: dict[Path, Stamp] = {}
    for path, info in files_of(root):
        if time.time() - max(info.st_mtime, info.st_ctime) > _OLD_ENOUGH:
            with contextlib.suppress(FileNotFoundError):
                copy_file(path, into / path.relative_to(root))
                done[path] = stamp(info)
    return done


def copy_rest(root: Path, into: Path, known: dict[Path, Stamp]) -> dict[Path, Stamp]:
    """Make `into` equal to what is there now; what is there now."""
    now = {path: stamp(info) for path, info in files_of(root)}
    for path in known.keys() - now.keys():
        (into / path.relative_to(root)).unlink(missing_ok=True)
    for path, seen in now.items():
        if known.get(path) != seen:
            with contextlib.suppress(FileNotFoundError):  # the caller looks again
                copy_file(path, into / path.relative_to(root))
    for folder, folders, _ in os.walk(root):
        for name in folders:
            place = Path(folder) / name
            target = into / place.relative_to(root)
            target.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                copy_look(place.lstat(), target)
    return now


def copy_database(root: Path, into: Path) -> None:
    """By SQLite's own backup, in one step: with what a write-ahead log holds, and none of a lost transaction."""
    target = into / DATABASE
    target.unlink(missing_ok=True)
    with (
        contextlib.closing(_open(root / DATABASE, "ro")) as live,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy, pages=-1)
    copy_look((root / DATABASE).stat(), target)


def _open(path: Path, mode: str, timeout: float = LOCK_WITHIN) -> sqlite3.Connection:
    from urllib.parse import quote

    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=timeout, isolation_level=None
    )


def _settle(root: Path) -> str:
    """Wait for what was accepted before the lock. A warning, where it is settled by quiet alone."""
    begun = quiet_since = time.monotonic()
    before: dict[Path, Stamp] = {}
    while reason := unsettled(root):
        now = {path: stamp(info) for path, info in files_of(root)}
        if now != before:
            before, quiet_since = now, time.monotonic()
        elif time.monotonic() - quiet_since > QUIET:
            # a copy made by hand does not keep the order of times; nothing is being written
            return f"{reason}, but nothing has changed for {QUIET:.0f} s"
        if time.monotonic() - begun > SETTLED_WITHIN:
            raise SnapshotError(
                f"an index is written without end: {reason}",
                "try again at a quieter time, or quiesce = 'pause'",
            )
        time.sleep(0.01)
    return ""


def snapshot(root: Path, into: Path) -> dict[str, object]:
    """Copy `root` to `into`, an empty directory. The instant (seconds since 1970), seconds that writers were
    blocked, warnings. Raises SnapshotError, sqlite3.Error, OSError."""
    known = copy_early(root, into)
    warnings: list[str] = []
    with contextlib.closing(_open(root / DATABASE, "rw")) as lock:
        lock.execute("BEGIN IMMEDIATE")
        locked, instant = time.monotonic(), time.time()
        try:
            warning = _settle(root)
            if warning:
                warnings.append(warning)
            _copy_locked(root, into, known)
        finally:
            lock.execute("ROLLBACK")
    return {"instant": instant, "blocked": time.monotonic() - locked, "warnings": warnings}


def _copy_locked(root: Path, into: Path, known: dict[Path, Stamp]) -> None:
    for _ in range(3):  # the directory of a collection that was just deleted may still be going
        known = copy_rest(root, into, known)
        copy_database(root, into)
        if {path: stamp(info) for path, info in files_of(root)} == known:
            return
    raise SnapshotError(
        "index files changed although ChromaDB was locked",
        "is the directory on NFS, or written by another machine? take quiesce = 'pause'",
    )


def main(root: str, into: str) -> int:
    """Print the outcome as JSON, also when it is a failure."""
    hint = ""
    try:
        print(json.dumps(snapshot(Path(root), Path(into))))
        return 0
    except SnapshotError as error:
        message, hint = str(error), error.hint
    except sqlite3.Error as error:
        message = f"SQLite cannot lock or copy {DATABASE}: {error}"
        hint = "the agent needs to read and write the directory; quiesce = 'pause' needs no write access"
    except OSError as error:
        message = f"cannot copy {error.filename or root}: {error.strerror}"
        hint = "is there room where the copy is made (staging), and may the agent read the directory?"
    print(json.dumps({"error": message, "hint": hint}))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
