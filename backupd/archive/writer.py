"""One run's archive in the making: what is taken over, what is on its way, what a manifest will name."""

from __future__ import annotations

import threading
from typing import NamedTuple

from backupd.archive import tar
from backupd.archive.earlier import Earlier
from backupd.archive.page import CONTENT, SIZE, Row
from backupd.archive.pipeline import PageDraft, Pipeline
from backupd.errors import CaptureFailed, Interrupted
from backupd.model import Progress
from backupd.repository import PackRef, PageRef, Repository

_MOST_WARNINGS = 1000
_PUTTERS_FAR = 3
"""Packs that are sent at once where each waits for answers; a disk takes them as fast one by one, in less memory."""


class Written(NamedTuple):
    """What one run wrote, ready for a manifest."""

    pages: tuple[PageRef, ...]
    packs: tuple[PackRef, ...]
    ordered: bool
    size: int
    members: int
    stored: int
    warnings: list[str]
    sockets: int


class ArchiveWriter:
    """One run. Nothing counts until a manifest names what it wrote."""

    def __init__(
        self,
        repository: Repository,
        source: str,
        point_id: str,
        *,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._repository = repository
        self._source = source
        self.point_id = point_id
        self._progress = progress
        self._stop = stop
        self.earlier = Earlier(repository, source)
        self.plain = self.earlier.nothing
        self.warnings: list[str] = []
        self._pipeline: Pipeline | None = None
        self._pages: list[PageRef | int] = []  # taken over, or the slot of one being written
        self._drafts = 0

    # --- used by the readers ------------------------------------------------------------------------------

    @property
    def pipeline(self) -> Pipeline:
        """Made when the first byte is to be stored: an unchanged tree starts no thread."""
        if self._pipeline is None:
            names = (f"{self.point_id}/{number:04d}" for number in range(10**9))
            known = None if self.plain else self.earlier.known
            self._pipeline = Pipeline(
                self._repository.codec, self._put, names, known,
                putters=_PUTTERS_FAR if self._repository.distant else 1, stop=self._stop,
            )  # fmt: skip
        return self._pipeline

    def warn(self, text: str) -> None:
        if len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(text)
        elif len(self.warnings) == _MOST_WARNINGS:
            self.warnings.append("more warnings than these were left out")

    def digest(self, data: bytes) -> bytes:
        return self._repository.codec.digest(data)

    def take_over(self, page: PageRef) -> None:
        self._pages.append(page)
        self._progress.advance(page.bytes, page.members)

    def add_page(self, dirs: list[tuple[str, Row | None, list[Row]]], digest: str, first: str) -> None:
        members = sum(len(rows) + (own is not None) for _, own, rows in dirs)
        size = sum(row[SIZE] for _, _, rows in dirs for row in rows if type(row[CONTENT]) is list)
        slot = self.pipeline.slot()
        self.pipeline.add_page(PageDraft(slot, digest, first, dirs, members, size))
        self._pages.append(slot)
        self._progress.advance(size, members)

    def check_stop(self) -> None:
        if self._pipeline is not None:
            self._pipeline.check()
        elif self._stop.is_set():
            raise Interrupted("the backup was told to stop; nothing was written")

    def _put(self, name: str, data: memoryview) -> None:
        self._repository.put_pack(self._source, name, data)

    # --- the end ------------------------------------------------------------------------------------------

    def finish(self, *, ordered: bool, sockets: int = 0) -> Written:
        """Everything is stored when this returns."""
        new: list[PackRef] = []
        pages: list[PageRef] = []
        if self._pipeline is not None:
            if self.plain:  # the packs of a first run, one after another, are a whole tar
                slab = self._pipeline.room(len(tar.END))
                slab.view[slab.length : slab.length + len(tar.END)] = tar.END
                slab.length += len(tar.END)
            self._pipeline.finish()
            new = self._pipeline.packs
        for item in self._pages:
            page = self._pipeline.pages[item] if isinstance(item, int) and self._pipeline else item
            if not isinstance(page, PageRef):
                raise CaptureFailed(
                    "an index page was not written", hint="this is a bug in backupd: please report it"
                )
            pages.append(page)
        mine = {pack.name: pack for pack in new}
        needed = dict.fromkeys(name for page in pages for name in (page.pack, *page.packs))
        packs = tuple(mine.get(name) or self.earlier.pack(name) for name in needed)
        for text in self.earlier.skipped:
            self.warn(text)
        return Written(
            tuple(pages), packs, ordered, sum(p.bytes for p in pages), sum(p.members for p in pages),
            sum(pack.size for pack in new), self.warnings, sockets,
        )  # fmt: skip

    def abandon(self) -> None:
        """End the threads; what is stored stays for the next run to use."""
        if self._pipeline is not None:
            self._pipeline.abandon()
