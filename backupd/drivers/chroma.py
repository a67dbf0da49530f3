"""ChromaDB: its persistent directory, copied hot at one instant.

Two ways to make it hold still:
  lock    SQLite's write lock, held for as long as the index files are compared and the database is copied;
          reads go on, writes wait. Needs the directory on this machine, writable. Not over NFS.
  pause   the container stands still for as long as the copy takes. Needs the engine only; used by itself where
          the directory of a container cannot be reached from here.
Tested with ChromaDB 1.5.9.

Facts are taken from the copy, so they are those of the captured instant: per collection its id, dimension,
number of records, digests of records and of embeddings. After a restore they are taken again from the files,
and what the server serves is compared with them, neighbours included.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from backupd.drivers import chroma_snapshot
from backupd.drivers._pause import LIMIT, default_notes, paused, release, release_left
from backupd.drivers._process import run
from backupd.drivers._tarstream import open_tar
from backupd.drivers.chroma_home import DATA, bring_back, find_directory
from backupd.drivers.chroma_index import TornIndex
from backupd.drivers.chroma_served import AS_CAPTURED, Client, compare
from backupd.drivers.chroma_snapshot import (
    BESIDE,
    DATABASE,
    LAST_WRITTEN,
    copy_early,
    copy_file,
    copy_rest,
    files_of,
    unsettled,
)
from backupd.drivers.chroma_state import check_indexes, measure, recover
from backupd.errors import BackupdError, CaptureFailed, CommandFailed, ContainerError, RestoreFailed
from backupd.model import (
    Archive,
    Capture,
    Clock,
    Container,
    ContainerSpec,
    Facts,
    Json,
    Problem,
    RecoveryPoint,
    Tree,
)

if TYPE_CHECKING:
    from backupd.config.models import ChromaSource
    from backupd.sandbox.docker import Engine

IMAGE = "chromadb/chroma:1.5.9"
"""For a source whose own image is not known."""
PORT = 8000
_TRIES = 5
_STAGING = "backupd-chroma-"
_READY = (
    "bash",  # the image has neither curl nor python
    "-c",
    'exec 3<>/dev/tcp/127.0.0.1/8000 && printf "GET /api/v2/heartbeat HTTP/1.0\\r\\n\\r\\n" >&3 && '
    'grep -q "nanosecond heartbeat" <&3',
)


@dataclass(frozen=True, slots=True)
class ChromaSettings:
    """Where the directory is, as this process sees it (None: inside the container), and how it is held still."""

    path: Path | None = None
    quiesce: str = "lock"
    staging: Path | None = None
    url: str = ""
    facts: bool = True


@dataclass(slots=True)
class _Taken:
    """How one copy went."""

    instant: datetime
    blocked: float
    quiesce: str
    warnings: list[str] = field(default_factory=list)


def from_config(source: ChromaSource, engine: Engine) -> ChromaDriver:
    """The driver for a source of the configuration."""
    settings = ChromaSettings(source.path, source.quiesce, source.staging, source.url or "", source.facts)
    name = source.container
    return ChromaDriver(settings, container=(lambda: engine.container(name)) if name else None)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ChromaDriver:
    """Captures and restores one persistent directory."""

    kind = "chroma"

    def __init__(
        self,
        settings: ChromaSettings,
        *,
        container: Callable[[], Container] | None = None,
        clock: Clock = _utc_now,
        notes: Path | None = None,
        pause_limit: float = LIMIT,
    ) -> None:
        """`notes`: where pauses are noted; `pause_limit`: seconds."""
        self._settings = settings
        self._container = container
        self._clock = clock
        self._notes = notes
        self._pause_limit = pause_limit

    # --- capture

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:
        """Copy the directory aside, at one instant; the copy is removed at the end, always.

        Raises CaptureFailed.
        """
        container = self._container() if self._container else None
        with _staging(self._settings.staging) as place:
            try:
                taken, directory, found = self._measured_copy(container, place)
            except TornIndex as error:
                raise CaptureFailed(f"the copy is torn: {error}", hint="back up again") from error
            except ContainerError as error:
                raise CaptureFailed(error.message, hint=error.hint) from error
            except (OSError, sqlite3.Error) as error:
                raise CaptureFailed(
                    f"the copy cannot be made or read: {error}",
                    hint="is there room where it is made (staging)?",
                ) from error
            capture = Capture(Tree(place, paged=("*.sqlite3", "*.bin")), taken.instant)
            capture.warnings += [*taken.warnings, *_lost(since, found)]
            if self._settings.facts:
                capture.facts.update(collections=found, served=AS_CAPTURED)
            capture.attributes.update(
                image=container.image if container else "",
                dir=directory,
                quiesce=taken.quiesce,
                blocked_seconds=round(taken.blocked, 3),
            )
            yield capture

    def _measured_copy(self, container: Container | None, place: Path) -> tuple[_Taken, str, dict[str, Json]]:
        """A copy whose parts agree; or twice disagree in the same way, so that it is the source's own fault."""
        before: list[str] | None = None
        for _ in range(_TRIES):
            _empty(place)
            taken, directory = self._copy(container, place)
            if not self._settings.facts:
                return taken, directory, {}
            found, odd = measure(place, still=True)
            if not odd or odd == before:
                taken.warnings += odd
                return taken, directory, found
            before = odd
        raise TornIndex("; ".join(before or ()))

    def _copy(self, container: Container | None, place: Path) -> tuple[_Taken, str]:
        """Fill `place`. How it went, and where the directory is in the container."""
        inside = find_directory(container) if container and not self._settings.path else DATA
        root = self._settings.path or (container.mount(inside) if container else None)
        if root is not None and not (root / DATABASE).is_file():
            raise CaptureFailed(
                f"there is no {DATABASE} in {root}",
                hint="path is ChromaDB's persistent directory, in its image /data",
            )
        if root is not None:
            _check_room(root, place)
        if (
            container is not None
            and container.running
            and (self._settings.quiesce == "pause" or root is None)
        ):
            return self._copy_paused(container, root, inside, place), inside
        if root is None:
            return self._copy_stopped(container, inside, place), inside
        return self._copy_locked(root, place), inside

    def _copy_locked(self, root: Path, place: Path) -> _Taken:
        torn: TornIndex | None = None
        for _ in range(_TRIES):
            _empty(place)
            outcome = _run_snapshot(root, place)
            try:
                check_indexes(place)
            except TornIndex as error:
                torn = error
                continue
            instant = datetime.fromtimestamp(float(str(outcome["instant"])), UTC)
            warnings = outcome["warnings"]
            said = [str(w) for w in warnings] if isinstance(warnings, list) else []
            return _Taken(instant, float(str(outcome["blocked"])), "lock", said)
        raise CaptureFailed(
            f"every copy is torn: {torn}", hint="is the index damaged? does ChromaDB read it?"
        )

    def _copy_paused(self, container: Container, root: Path | None, inside: str, place: Path) -> _Taken:
        notes = self._notes or default_notes()
        release(container, notes)
        reason = ""
        for left in reversed(range(_TRIES)):
            _empty(place)
            known = copy_early(root, place) if root else {}
            with paused(container, notes, limit=self._pause_limit):
                begun, instant = time.monotonic(), self._clock()
                reason = unsettled(root) if root else ""
                if root and not reason:
                    copy_rest(root, place, known)
                    for name in (DATABASE, *(DATABASE + ending for ending in BESIDE)):
                        if (root / name).exists():
                            copy_file(root / name, place / name)
                elif not root:
                    _unpack(container, inside, place)
            blocked = time.monotonic() - begun
            try:
                if not root:
                    reason = unsettled(place) or (left and _too_fresh(place, instant)) or ""
                if not reason:
                    recover(place)
                    check_indexes(place)
                    return _Taken(instant, blocked, "pause")
            except TornIndex as error:  # paused in the middle of a write: it has to go on to finish it
                reason = str(error)
            time.sleep(0.2)
        raise CaptureFailed(f"every pause fell into a write: {reason}", hint="try again at a quieter time")

    def _copy_stopped(self, container: Container | None, inside: str, place: Path) -> _Taken:
        if container is None:
            raise CaptureFailed("a Chroma source needs a path or a container", hint="give one")
        instant = self._clock()
        _unpack(container, inside, place)
        recover(place)
        check_indexes(place)
        return _Taken(instant, 0.0, "stopped")

    # --- restore

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """The source's own image where it is known."""
        return ContainerSpec(
            image=str(point.attributes.get("image") or IMAGE),
            volumes=(str(point.attributes.get("dir") or DATA),),
            port=PORT,
            ready=_READY,
            load_while="stopped",
        )

    def load(self, archive: Archive, container: Container) -> None:
        """Put the directory in its place; a container that was running runs again afterwards.

        Raises RestoreFailed where there are collections already; then nothing was changed.
        """
        try:
            bring_back(archive, container, PORT)
        except ContainerError as error:
            raise RestoreFailed(error.message, hint=error.hint) from error

    def facts(self, container: Container) -> Facts:
        """As at capture, from the files of a restored container; and what its server serves of them."""
        if not self._settings.facts:
            return {}
        try:
            client = Client(*container.address(PORT))
            client.wait()
            inside = find_directory(container)
            with _files(container, inside) as root:
                found, _ = measure(root, still=False)
                return {"collections": found, "served": compare(client, root)}
        except ContainerError as error:
            raise RestoreFailed(error.message, hint=error.hint) from error
        except (TornIndex, OSError, sqlite3.Error) as error:
            raise RestoreFailed(
                f"the restored directory cannot be read: {error}", hint="restore another point"
            ) from error

    # --- check

    def check(self) -> Sequence[Problem]:
        """Is the directory there, and lockable? Touches nothing."""
        try:
            return list(self._problems())
        except BackupdError as error:
            return [Problem(error.message, error.hint)]

    def _problems(self) -> Iterator[Problem]:
        container = self._container() if self._container else None
        if container is not None and not container.running:
            yield Problem(f"container {container.name} is not running", "start it", fatal=False)
        url = urlsplit(self._settings.url)
        if url.scheme == "http" and not Client(url.hostname or "", url.port or PORT, timeout=5).answers():
            yield Problem(
                f"no ChromaDB answers at {url.hostname}:{url.port or PORT}", "is it running?", fatal=False
            )
        root = self._settings.path
        if root is None and container is not None:
            root = container.mount(find_directory(container))
        if root is None:
            if self._settings.quiesce == "lock":
                yield Problem(
                    "the directory cannot be reached from here: the container is paused for each copy",
                    "mount its volume here and give path, to have writers wait for milliseconds only",
                    fatal=False,
                )
            return
        if not (root / DATABASE).is_file():
            yield Problem(f"there is no {DATABASE} in {root}", "path is ChromaDB's persistent directory")
        elif self._settings.quiesce == "lock":
            try:
                with (root / DATABASE).open("r+b"):
                    pass
            except OSError as error:
                yield Problem(
                    f"{root / DATABASE} cannot be locked: {error.strerror}",
                    "mount it writable for the agent, or take quiesce = 'pause'",
                )


def release_left_paused(engine: Engine) -> list[str]:
    """What an agent does first: unpause what a killed one left paused. Their names."""
    return release_left(default_notes(), engine.container)


# --- the copy -------------------------------------------------------------------------------------------


@contextmanager
def _staging(parent: Path | None) -> Iterator[Path]:
    """A directory for one copy. What killed agents left beside it is removed first: nobody holds its lock."""
    where = parent or _default_staging()
    try:
        where.mkdir(parents=True, exist_ok=True)
        for left in where.glob(f"{_STAGING}*"):
            with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=where))
    except OSError as error:
        raise CaptureFailed(
            f"a copy cannot be made in {where}: {error.strerror}", hint="set staging to a writable directory"
        ) from error
    try:
        with (folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "data").mkdir()
            yield folder / "data"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _default_staging() -> Path:
    """Beside the agent's state: on a disk. The temporary directory of a container may be memory."""
    from platformdirs import user_state_path

    where = user_state_path("backupd") / "staging"
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return where if os.access(where, os.W_OK) else Path(tempfile.gettempdir())


def _empty(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def _check_room(root: Path, place: Path) -> None:
    needed = (root / DATABASE).stat().st_size + sum(info.st_size for _, info in files_of(root))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CaptureFailed(
            f"the copy needs {needed} bytes and {place.parent.parent} has {free}",
            hint="set staging to a directory with more room",
        )


def _run_snapshot(root: Path, place: Path) -> dict[str, object]:
    """In a process of its own: see there why."""
    program = [sys.executable, "-I", chroma_snapshot.__file__, str(root), str(place)]
    said = bytearray()
    try:
        for chunk in run(program):
            said += chunk
    except CommandFailed as error:
        if not said:
            raise CaptureFailed(error.message, hint=error.hint or "back up again") from error
    outcome: dict[str, object] = json.loads(said)
    if "error" in outcome:
        raise CaptureFailed(str(outcome["error"]), hint=str(outcome["hint"]))
    return outcome


def _too_fresh(place: Path, instant: datetime) -> str:
    """The engine's tars have whole seconds: of an index written in the second of the pause they tell nothing."""
    for marker in place.glob(f"*/{LAST_WRITTEN}"):
        if marker.stat().st_mtime > instant.timestamp() - 1:
            return f"{marker.parent.name} was written in the very second of the pause"
    return ""


def _unpack(container: Container, inside: str, place: Path) -> None:
    """The directory of a container, as files here."""

    def below(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        _, _, rest = member.name.partition("/")
        return tarfile.tar_filter(member.replace(name=rest), path) if rest else None

    with open_tar(container.read(inside)) as tar:
        tar.extractall(place, filter=below)  # noqa: S202  tar_filter refuses what leads outside
    if not (place / DATABASE).is_file():
        raise CaptureFailed(
            f"there is no {DATABASE} in {inside} of {container.name}", hint="is its data kept elsewhere?"
        )


@contextmanager
def _files(container: Container, inside: str) -> Iterator[Path]:
    """The directory of a container where it can be reached, else a copy of it."""
    mounted = container.mount(inside)
    if mounted is not None:
        yield mounted
        return
    with tempfile.TemporaryDirectory(prefix="backupd-facts-") as folder:
        _unpack(container, inside, Path(folder))
        yield Path(folder)


def _lost(since: RecoveryPoint | None, found: Mapping[str, Json]) -> list[str]:
    before = since.facts.get("collections") if since else None
    if isinstance(before, Mapping) and before and not found:
        return [f"there are no collections any more; the point before this one has {len(before)}"]
    return []
