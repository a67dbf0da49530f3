"""A store in a local directory: an object is a file under its key.

An object is written beside its place under a name no key has, synced, and only then given its name, by a
call that refuses to replace. So a crash leaves nothing that `list` shows; the next lease sweeps what it left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat as modes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from backupd.errors import ObjectExists, ObjectMissing, RepositoryMissing, StoreError
from backupd.model import Bytes, Lease, ObjectInfo
from backupd.stores.names import OWN, check_key, check_prefix, check_range, is_key, is_part

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_STRAY_AFTER = 3600.0  # seconds; a writer also holds a lock on its file, which not every file system keeps

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """Objects are files below `root`. Safe for use by several threads and processes.

    `create` makes the directory where it is missing (for `init` only: a missing directory is most often a
    disk that is not mounted). Raises RepositoryMissing without it.
    """

    def __init__(self, root: str | os.PathLike[str], *, create: bool = False) -> None:
        self._root = Path(root).expanduser().absolute()
        with _explained(f"cannot open {self._root}"):
            if create:
                self._root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
                _sync_directory(self._root.parent)
            if not self._root.is_dir():
                raise RepositoryMissing(
                    f"there is no directory {self._root}",
                    hint="mount its disk, correct repository.location, or make one with `backupd init`",
                )
            self._identity, self._known = _identity(self._root), _names(self._root)

    @property
    def location(self) -> str:
        return str(self._root)

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        check_key(key)
        self._check_root()
        path = self._root / key
        with _explained(f"cannot write {path}"):
            if (
                not overwrite and path.exists()
            ):  # before writing 64 MiB in vain; the link below is what decides
                raise _already_there(path)
            temporary, file = self._open_temporary(path)
            try:
                try:
                    _write_all(file, data)
                    os.fsync(file)
                    _publish(temporary, path, overwrite=overwrite)
                finally:
                    with contextlib.suppress(OSError):
                        os.close(file)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            try:
                _sync_directory(path.parent)
            except FileNotFoundError:
                pass  # deleted already, by another
            except OSError:
                if not overwrite:
                    path.unlink()
                raise
        self._known.add(key.partition("/")[0])

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(offset, length)
        path = self._root / key
        with self._reading(key):
            # O_NONBLOCK: a FIFO that somebody put there must not hang us.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(file)
                if not modes.S_ISREG(status.st_mode):
                    raise IsADirectoryError
                rest = max(0, status.st_size - offset)
                return _read_all(file, offset, rest if length is None else min(length, rest))
            finally:
                os.close(file)

    def stat(self, key: str) -> ObjectInfo:
        check_key(key)
        with self._reading(key):
            status = (self._root / key).stat()
            if not modes.S_ISREG(status.st_mode):
                raise IsADirectoryError
            return _info(key, status)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        return self._list(prefix)

    def delete(self, key: str) -> None:
        """Directories that become empty go too."""
        check_key(key)
        self.stat(key)
        path = self._root / key
        with self._reading(key):
            path.unlink()
        for parent in path.parents:
            if parent == self._root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    @contextmanager
    def lease(self, key: str, *, ttl: float = 60.0) -> Iterator[Lease]:
        """An exclusive lock of the kernel, let go when the process dies; sweeps what killed writers left."""
        from backupd.stores.leases import FlockLease, holding

        check_key(key)
        self._check_root()
        folder, _, name = key.rpartition("/")
        path = self._root / folder / f"{OWN}lock-{name}"
        with _explained(f"cannot lock {path}"):
            self._make_parents(path)
            held = FlockLease(path, key, self, ttl=ttl)
        with holding(held) as lease:
            self.sweep()
            yield lease

    def sweep(self, *, older_than: float = _STRAY_AFTER) -> int:
        """Remove temporary files that no living process writes; how many. Never fails."""
        swept = 0
        with contextlib.suppress(OSError):
            for folder, _, names in os.walk(self._root):
                for name in names:
                    if name.startswith(f"{OWN}tmp-"):
                        swept += _remove_stray(Path(folder, name), older_than)
        return swept

    # --- within ------------------------------------------------------------------------------------------

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._check_root()
        with _explained(f"cannot list {self._root}"):
            yield from self._walk("", prefix)
        self._check_root()  # unmounted meanwhile: what was seen is not all there is

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below `folder` ("" or "a/b/"), in the order of whole keys: `a-b` comes before `a/b`."""
        entries = []
        for name in _listdir(self._root / folder):
            key = folder + name
            if not is_part(name) or not is_key(key):
                continue  # a stranger's, or our own temporary file
            if not (f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            status = _stat_entry(self._root / key)
            if status is not None:
                is_folder = modes.S_ISDIR(status.st_mode)
                entries.append((f"{key}/" if is_folder else key, status))
        for key, status in sorted(entries, key=lambda entry: entry[0]):
            if key.endswith("/"):
                yield from self._walk(key, prefix)
            elif modes.S_ISREG(status.st_mode) and key.startswith(prefix):
                yield _info(key, status)

    def _check_root(self) -> None:
        """Raises StoreError when the directory is not the one that was opened.

        An unmounted disk leaves an empty directory behind: its list would be empty, and backups would go to
        the disk beneath. The same content under another device number is a disk that was mounted again.
        """
        with _explained(f"cannot reach {self._root}"):
            now = _identity(self._root)
            if now == self._identity:
                return
            if not self._known & _names(self._root):
                raise StoreError(
                    f"{self._root} is not the directory it was: what it held is gone",
                    hint="was its disk unmounted? mount it again",
                )
            self._identity = now

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """Whatever is no file is no object; but on a disk that is gone, nothing can be said to be missing."""
        with _explained(f"cannot reach {self._root / key}"):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._check_root()
                raise ObjectMissing(f"there is no object {key} in {self._root}") from None

    def _open_temporary(self, path: Path) -> tuple[Path, int]:
        """In the directory of `path`, so that giving it its name never crosses file systems."""
        temporary = path.with_name(f"{OWN}tmp-{os.urandom(8).hex()}")
        for attempt in range(100):
            try:
                self._make_parents(path)
                file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
                break
            except FileNotFoundError:  # a delete took the directory, empty then, from under us
                self._check_root()
                if attempt == 99:
                    raise
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells sweep() that we live
        return temporary, file

    def _make_parents(self, path: Path) -> None:
        """Make what is missing between the root and `path`; never the root."""
        missing = []
        for parent in path.parents:
            if parent == self._root or parent.is_dir():
                break
            missing.append(parent)
        for parent in reversed(missing):
            try:
                parent.mkdir(mode=DIRECTORY_MODE)
            except FileExistsError:
                if not modes.S_ISDIR(
                    parent.stat().st_mode
                ):  # FileNotFoundError: gone again, the caller retries
                    raise NotADirectoryError(errno.ENOTDIR, "a file is in the way", str(parent)) from None
            _sync_directory(parent.parent)


# --- files -----------------------------------------------------------------------------------------------


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give a written file its name. Raises ObjectExists when the name is taken and must not be replaced."""
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _already_there(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_no_replace(temporary, path)


def _rename_no_replace(temporary: Path, path: Path) -> None:
    """For file systems without hard links (FAT, exFAT, SMB); the C library has it from glibc 2.28."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    failed = rename is None or rename(
        _AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), ctypes.c_uint(_RENAME_NOREPLACE)
    )
    if not failed:
        return
    code = errno.ENOSYS if rename is None else ctypes.get_errno()
    if code == errno.EEXIST:
        raise _already_there(path)
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise StoreError(
            f"the file system of {path.parent} can neither link files nor rename without replacing",
            hint="keep the repository on a local file system or on S3",
        )
    raise OSError(code, os.strerror(code), str(path))


def _write_all(file: int, data: Bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read_all(file: int, offset: int, length: int) -> bytes:
    first = os.pread(file, length, offset)
    if len(first) == length:
        return first  # the common case, without a copy; one read gives at most 2 GiB
    pieces, got = [first], len(first)
    while got < length and (piece := os.pread(file, length - got, offset + got)):
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)


def _sync_directory(path: Path) -> None:
    """Names are data of the directory: without this a crash may lose the new one."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.EBADF,
        ):  # some network file systems have no such call
            raise
    finally:
        os.close(file)


def _listdir(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return []  # became empty and was removed while we listed


def _stat_entry(path: Path) -> os.stat_result | None:
    """None when it was deleted meanwhile. A link that leads nowhere raises: a disk that is not there."""
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return None


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _identity(root: Path) -> tuple[int, int]:
    status = root.stat()
    return status.st_dev, status.st_ino


def _names(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if is_part(entry.name)}


def _remove_stray(path: Path, older_than: float) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        if time.time() - os.fstat(file).st_mtime < older_than:
            return 0
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return 0
    finally:
        os.close(file)
    return 1


# --- errors ----------------------------------------------------------------------------------------------


def _already_there(path: Path) -> StoreError:
    if path.is_dir():
        return StoreError(f"cannot write {path}: a directory is in the way")
    return ObjectExists(f"{path} is already there")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)
_PASSING = (errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the operating system says into one line and what to do."""
    try:
        yield
    except OSError as error:
        code, said = error.errno or 0, (error.strerror or str(error)).lower()
        if code in _FULL:
            said = "disk full" if code == errno.ENOSPC else "disk quota used up"
            hint = "free space, or `backupd prune`, which removes what the retention does not keep"
        elif code in _DENIED:
            hint = f"give user {os.geteuid()} the right to read and write it"
        elif code == errno.EROFS:
            hint = "mount it writable"
        elif code == errno.EIO:
            hint = "the disk is failing, or its connection is: see the kernel's log"
        elif code in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ELOOP):
            hint = "is its disk mounted?"
        else:
            hint = ""
        raise StoreError(f"{what}: {said}", hint=hint, transient=code in _PASSING) from error
