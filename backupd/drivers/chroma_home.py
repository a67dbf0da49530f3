"""Where a ChromaDB container keeps its data, and how a captured directory is put there."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from backupd.drivers import _tarstream
from backupd.drivers.chroma_served import Client
from backupd.drivers.chroma_snapshot import BESIDE, DATABASE
from backupd.errors import ContainerError, RestoreFailed
from backupd.model import Archive, Bytes, Container

DATA = "/data"
_PLACES = (DATA, "/chroma/chroma")  # since 1.0, before
_SETTINGS = ("CHROMA_PERSIST_PATH", "PERSIST_DIRECTORY")
_FRESH_AT_MOST = 4 << 20
"""A fresh database takes 200 KiB; a bigger one is not read to know that it holds something."""


def find_directory(container: Container) -> str:
    """The persistent directory inside; where nothing is there yet, the usual one. Raises ContainerError."""
    named = [container.env[name] for name in _SETTINGS if container.env.get(name)]
    for place in (*named, *_PLACES):
        mounted = container.mount(place)
        if mounted is not None and (mounted / DATABASE).is_file():
            return place
        if mounted is None and _there(container, f"{place}/{DATABASE}"):
            return place
    return named[0] if named else DATA


def _there(container: Container, path: str) -> bool:
    chunks = container.read(path)
    try:
        return bool(next(iter(chunks), b""))
    except ContainerError:
        return False
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


def bring_back(archive: Archive, container: Container, port: int) -> None:
    """Unpack the archive in the data directory. Raises RestoreFailed where it holds collections, ContainerError."""
    inside = find_directory(container)
    if not _there(container, f"{inside}/{DATABASE}"):
        inside = str(archive.point.attributes.get("dir") or inside)
    was_running = container.running
    _refuse_used(container, inside)
    if was_running:
        container.stop()
    container.write(inside, _with_nothing_beside(archive, _names(container, inside)))
    if was_running:
        container.start()
        Client(*container.address(port)).wait()


def _names(container: Container, inside: str) -> set[str]:
    try:
        with _tarstream.open_tar(container.read(inside)) as tar:
            return {entry.name.partition("/")[2] for entry in tar}
    except ContainerError:
        return set()


def _refuse_used(container: Container, inside: str) -> None:
    used = False
    try:
        with _tarstream.open_tar(container.read(inside)) as tar:
            for entry in tar:
                name = entry.name.partition("/")[2]
                content = tar.extractfile(entry) if name == DATABASE else None
                if content is not None:
                    used = entry.size > _FRESH_AT_MOST or _holds_collections(content.read())
                elif entry.isfile() and "/" in name and entry.size:
                    used = True  # an index
                if used:
                    break
    except ContainerError:
        return
    if used:
        raise RestoreFailed(
            f"{container.name} already holds collections",
            hint="restore into a container with an empty volume; nothing was changed",
        )


def _holds_collections(content: bytes) -> bool:
    with tempfile.TemporaryDirectory(prefix="backupd-chroma-look-") as folder:
        copy = Path(folder) / DATABASE
        copy.write_bytes(content)
        database = sqlite3.connect(copy)
        try:
            return bool(database.execute("SELECT count(*) FROM collections").fetchone()[0])
        except sqlite3.Error as error:
            return "no such table" not in str(error)  # what cannot be read is not nothing
        finally:
            database.close()


def _with_nothing_beside(archive: Archive, there: set[str]) -> Iterator[Bytes]:
    """The archive's tree; and empty files over what SQLite may have left of the fresh database: it would apply
    a left journal to ours."""
    ours = {member.name for member in archive.members()}
    for ending in BESIDE:
        if DATABASE + ending in there - ours:
            yield _tarstream.entry(DATABASE + ending)
    yield from archive.tar()
