"""Hold what a driver captured in memory, and hand it back as an archive: no repository is needed.

Independent of `backupd.archive` on purpose; no pytest in here.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from backupd.model import (
    Capture,
    Driver,
    Member,
    MemberType,
    PointKind,
    RecoveryPoint,
    Streams,
    TarStream,
    Tree,
)


@dataclasses.dataclass
class Held:
    """A `model.Archive` in memory."""

    point: RecoveryPoint
    files: dict[str, bytes]
    tar_bytes: bytes = b""

    def __post_init__(self) -> None:
        if self.tar_bytes:
            with tarfile.open(fileobj=io.BytesIO(self.tar_bytes)) as tar:
                self.files = {one.name: tar.extractfile(one).read() for one in tar if one.isfile()}  # type: ignore[union-attr]

    def members(self) -> Iterator[Member]:
        """Only what drivers ask for: name and size."""
        for name, content in self.files.items():
            yield Member(name, MemberType.FILE, len(content), 0o644, 0, 0, 0)

    def read(self, name: str) -> Iterator[bytes]:
        """In pieces, as an archive does."""
        content = self.files[name]
        for at in range(0, len(content), 100_000):
            yield content[at : at + 100_000]

    def tar(
        self, change: Callable[[Member], Member | None] | None = None, *, end: bool = True
    ) -> Iterator[bytes]:
        """The tree as it was captured, with what `change` makes of name, owner and mode."""
        out = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(self.tar_bytes)) as tar,
            tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made,
        ):
            for one in tar:
                kind = MemberType.DIRECTORY if one.isdir() else MemberType.FILE
                member = Member(one.name, kind, one.size, one.mode, one.uid, one.gid, 0)
                found = change(member) if change else member
                if found is not None:
                    one.name, one.mode, one.uid, one.gid = found.name, found.mode, found.uid, found.gid
                    made.addfile(one, tar.extractfile(one) if one.isfile() else None)
            length = out.tell()
        whole = out.getvalue() if end else out.getvalue()[:length]
        for at in range(0, len(whole), 100_000):
            yield whole[at : at + 100_000]

    def extract(self, into: Path) -> tuple[str, ...]:
        """As the archive does, near enough."""
        with tarfile.open(fileobj=io.BytesIO(self.tar_bytes)) as tar:
            tar.extractall(into, filter="fully_trusted")
        return ()


def take(driver: Driver) -> Held:
    """Capture to the end, as `backup` does. Whatever the driver raises comes out."""
    with driver.capture(None) as capture:
        files, tar = consume(capture)
    point = RecoveryPoint(
        id="p1",
        source="s",
        driver=driver.kind,
        kind=PointKind.FULL,
        instant=capture.instant,
        started=capture.instant,
        finished=datetime.now(UTC),
        size=sum(map(len, files.values())),
        stored=0,
        members=len(files),
        warnings=tuple(capture.warnings),
        facts=dict(capture.facts),
        attributes=dict(capture.attributes),
    )
    return Held(point, files, tar)


def consume(capture: Capture) -> tuple[dict[str, bytes], bytes]:
    """Every byte of a capture: files by name, and a tar of a tree."""
    content = capture.content
    if isinstance(content, Streams):
        return {stream.name: b"".join(stream.chunks) for stream in content.streams}, b""
    if isinstance(content, TarStream):
        return {}, content.file.read()
    assert isinstance(content, Tree)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(content.root.rglob("*")):
            tar.add(path, path.relative_to(content.root), recursive=False)
    files = {str(p.relative_to(content.root)): p.read_bytes() for p in content.root.rglob("*") if p.is_file()}
    return files, out.getvalue()
