"""What the tests of directories and of Docker volumes share."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

from backupd.archive import PointArchive, open_archive
from backupd.backup import back_up
from backupd.drivers.volume import VolumeDriver, VolumeSettings
from backupd.model import Run, Silence
from backupd.repository import Repository
from backupd.sandbox.docker import Engine


def now() -> datetime:
    return datetime.now(UTC)


def of_path(path: Path, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> VolumeDriver:
    return VolumeDriver(VolumeSettings(path=path, include=include, exclude=exclude), Engine())


def backed_up(driver: VolumeDriver, repository: Repository) -> Run:
    return back_up(
        "data", driver, repository, clock=now, progress=Silence(), stop=threading.Event(), allow_shrink=True
    )


def point_of(run: Run, repository: Repository) -> PointArchive:
    return open_archive(repository, repository.find(run.point))


def names_in(archive: PointArchive) -> set[str]:
    return {member.name for member in archive.members()} - {""}
