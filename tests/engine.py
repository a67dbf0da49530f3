"""A repository to try the archive engine on, with a clock of its own; no pytest in here."""

from __future__ import annotations

import dataclasses
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backupd.archive import ArchiveWriter, PointArchive, Written, open_archive, write_archive
from backupd.model import Content, PointKind, RecoveryPoint, Silence, Store, Tree
from backupd.repository import Manifest, Repository, new_point_id
from backupd.stores import MemoryStore

START = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)


@dataclasses.dataclass
class Engine:
    """Writes and reads points of one source."""

    store: Store = dataclasses.field(default_factory=MemoryStore)
    source: str = "tree"

    def __post_init__(self) -> None:
        self.now = START
        self.repository = Repository.create(self.store, clock=self.clock)
        self.stop = threading.Event()
        self.written: Written | None = None

    def clock(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def write(self, content: Content | Path, *, commit: bool = True) -> RecoveryPoint:
        """One run; what it wrote is in `written` too."""
        content = Tree(content) if isinstance(content, Path) else content
        started = self.clock()
        point_id = new_point_id()
        writer = ArchiveWriter(self.repository, self.source, point_id, progress=Silence(), stop=self.stop)
        written = self.written = write_archive(writer, content)
        point = RecoveryPoint(
            point_id, self.source, "volume", PointKind.FULL, started, started, self.clock(),
            written.size, written.stored, written.members, tuple(written.warnings),
        )  # fmt: skip
        if commit:
            codec = self.repository.codec.name
            self.repository.commit(Manifest(point, codec, written.ordered, written.pages, written.packs))
        return point

    def archive(self, point: RecoveryPoint) -> PointArchive:
        return open_archive(self.repository, point)

    def restore(self, point: RecoveryPoint, into: Path) -> Path:
        self.archive(point).extract(into)
        return into
