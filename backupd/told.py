"""A restore tells how far it is, and hears when it is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from backupd.model import Archive, Bytes, LogSpan, Member, Progress, RecoveryPoint

B = TypeVar("B", bound=Bytes)


class Heeding:
    """A Progress that stops the work that tells of itself: `check` raises."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self._progress, self._check = progress, check

    def stage(self, text: str) -> None:
        self._check()
        self._progress.stage(text)

    def advance(self, size: int = 0, members: int = 0) -> None:
        self._check()
        self._progress.advance(size, members)


class Told:
    """An archive that tells how far it was read, and stops when told to."""

    def __init__(self, archive: Archive, progress: Progress, check: Callable[[], None]) -> None:
        self._archive, self._progress, self._check = archive, progress, check
        self.warnings: list[str] = []

    @property
    def point(self) -> RecoveryPoint:
        return self._archive.point

    def members(self) -> Iterator[Member]:
        return self._archive.members()

    def read(self, name: str) -> Iterator[bytes]:
        return self._count(self._archive.read(name))

    def tar(
        self, change: Callable[[Member], Member | None] | None = None, *, end: bool = True
    ) -> Iterator[Bytes]:
        return self._count(self._archive.tar(change, end=end))

    def extract(self, into: Path) -> list[str]:
        self.warnings += self._archive.extract(into)
        return self.warnings

    def count_log(self, pieces: Iterator[tuple[LogSpan, bytes]]) -> Iterator[tuple[LogSpan, bytes]]:
        for piece in pieces:
            self._check()
            self._progress.advance(len(piece[1]))
            yield piece

    def _count(self, chunks: Iterator[B]) -> Iterator[B]:
        for chunk in chunks:
            self._check()
            self._progress.advance(len(chunk))
            yield chunk
