"""A base and its log laid straight into a server's volume, where this process reaches it: through the engine they take
twice the processor time, as every byte goes over a socket and through an untar of its own.

Until all of the base is there it lies in a directory of its own. `PG_VERSION` is not laid with it, as it makes a
directory a cluster: it comes with the last files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from backupd.drivers.postgres_base import TABLESPACES
from backupd.drivers.postgres_recovery import ANEW, MAP, SPACES, Home, moved_map
from backupd.errors import RestoreFailed
from backupd.model import Archive, Container

STAGE = "backupd-restore"


def reached(container: Container, home: Home) -> Path | None:
    """The directory behind `home.root`. None where we are not root, and where the engine gives owners other numbers
    than the container sees (userns-remap): then no file could be given to the server."""
    if os.geteuid() != 0:
        return None
    place = container.mount(home.root, whole=True)
    return place if place is not None and place.stat().st_uid in (0, home.uid) else None


def lay_base(archive: Archive, home: Home, held: Mapping[str, str], place: Path) -> None:
    """As `data_tar` has it: the server's owner, tablespaces within the data directory. Raises RestoreFailed, Damaged;
    then nothing of it is there."""
    stage = place / STAGE
    try:
        archive.extract(stage)
        _arrange(stage, home, held)
        _give(stage, home)
        data = _made(place, home)
        for entry in sorted(stage.iterdir()):
            entry.rename(data / entry.name)
        stage.rmdir()
    except OSError as error:
        raise RestoreFailed(
            f"the base could not be laid into {place}: {error.strerror}",
            hint="mend the cause, and restore again",
        ) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def lay_files(files: Iterable[tuple[str, bytes | bytearray]], home: Home, place: Path) -> None:
    """What follows on a base, by its path in the data directory, in their order. A symlink in the base leads none of
    them anywhere. Raises RestoreFailed, and what `files` raises; then there is no PG_VERSION."""
    data = place / home.inside
    folders: dict[str, int] = {}
    try:
        for path, content in files:
            folder, _, name = path.rpartition("/")
            if folder not in folders:
                folders[folder] = _folder(data / folder, home)
            _lay(folders[folder], name, content, home)
    except OSError as error:
        raise RestoreFailed(
            f"what follows on the base could not be laid into {place}: {error.strerror}",
            hint="mend the cause, and restore again",
        ) from None
    finally:
        for handle in folders.values():
            os.close(handle)


def _folder(path: Path, home: Home) -> int:
    if not path.is_symlink() and not path.exists():
        path.mkdir(mode=0o700)
        os.chown(path, home.uid, home.gid)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lay(folder: int, name: str, content: bytes | bytearray, home: Home) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    fd = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
    )
    with open(fd, "wb", buffering=0) as file:
        os.fchown(fd, home.uid, home.gid)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]


def _arrange(stage: Path, home: Home, held: Mapping[str, str]) -> None:
    for name in ANEW:
        (stage / name).unlink(missing_ok=True)
    links = stage / TABLESPACES
    spaces = sorted(links.iterdir()) if links.is_dir() else []
    if spaces:
        (stage / SPACES).mkdir(mode=0o700)
    for space in spaces:
        space.rename(stage / SPACES / space.name)
    if MAP in held:
        (stage / MAP).write_text(moved_map(held[MAP], home.data))
        (stage / MAP).chmod(0o600)


def _give(stage: Path, home: Home) -> None:
    """To the server, all below; what lies in it was made by us alone."""
    for folder, _, files in os.walk(stage):
        os.chown(folder, home.uid, home.gid)
        for name in files:
            os.chown(Path(folder, name), home.uid, home.gid, follow_symlinks=False)


def _made(place: Path, home: Home) -> Path:
    """The data directory, of the server's own."""
    path = place
    for part in Path(home.inside).parts:
        path /= part
        path.mkdir(mode=0o700, exist_ok=True)
        os.chown(path, home.uid, home.gid)
    return path
