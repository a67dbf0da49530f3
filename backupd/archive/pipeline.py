"""From slabs of bytes to stored packs: workers, an ordered writer, putters, with bounded queues between.

    reader (the caller) -> slabs -> workers: digest, look up, compress -> writer, in order: packs and pages -> putters

The reader has digested and looked up small files already; what is known takes no room in a slab.
A slab goes back to the reader when its worker is done with it; a frame counts against `_IN_FLIGHT` until the writer
has placed it; a pack's buffer is free again when it is stored. So a slow store holds back the source, and
memory stays flat. An error anywhere stops the reader at its next step and is raised there, once.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from backupd.archive.cut import WHOLE, FileCutter
from backupd.archive.known import KnownContent
from backupd.archive.pack import BLOB, PackBuilder
from backupd.archive.page import Pieces, Row, encode_page
from backupd.codec import Codec
from backupd.errors import BackupdError, Interrupted
from backupd.repository import PackRef, PageRef

FRAME_SIZE = 3 << 19
"""Bytes of content that a frame aims at: one compressor per thread scales best on 1 to 4 MiB."""
SLAB_SIZE = FRAME_SIZE + (1 << 20) + (1 << 18)
"""A slab is submitted when it reaches FRAME_SIZE; the rest is room for one more small file and its header."""
PACK_SIZE = 16 << 20
_MOST_BLOBS = 1 << 16
"""Blobs in a pack, whose directory is put together in memory: small files fill a pack by their number."""
_IN_FLIGHT = 6
"""Frames, and pages that came alone, between the reader and their place in a pack."""
_MOST_ROWS = 1024
"""Members of pages that wait for one frame, of some 1.2 KB each: where little of much changed, a frame would not
fill before thousands of pages wait for it."""


Content: TypeAlias = "tuple[int, int, Pieces, bytes | None]"
"""A blob in a slab: offset, length, where its place is to be noted, its digest. Empty: the worker's to compute. None: a
file that the worker is to cut into blobs."""


class Slab:
    """A reused buffer. Fresh memory costs: 1.9 GB/s into new pages against 8.6 into warm ones."""

    __slots__ = ("blobs", "buffer", "length", "pages", "view")

    def __init__(self) -> None:
        self.buffer = bytearray(SLAB_SIZE)
        self.view = memoryview(self.buffer)
        self.clear()

    def clear(self) -> None:
        self.length = 0
        self.blobs: list[Content] = []
        self.pages: list[PageDraft] = []

    def add_file(self, start: int, length: int, pieces: Pieces) -> None:
        """A file that lies in the slab from end to end: one blob, several where it is large, none where it is empty."""
        if length:
            self.blobs.append((start, length, pieces, b"" if length <= WHOLE else None))


class PageDraft(NamedTuple):
    """A page whose content is still on its way to a pack."""

    slot: int
    stat: str
    first: str
    dirs: list[tuple[str, Row | None, list[Row]]]
    members: int
    bytes: int


@dataclass(slots=True)
class _Frame:
    """What a worker makes of a slab; the writer waits for `ready`."""

    blobs: list[Content]
    pages: list[PageDraft]
    ready: threading.Event = field(default_factory=threading.Event)
    stored: bytes = b""
    size: int = 0
    rows: list[bytes] = field(default_factory=list)
    """Packed BLOB rows of the blobs that are new."""
    places: list[tuple[str, int] | None] = field(default_factory=list)
    """For each blob where it was found, or None where it is new."""


class Pipeline:
    """One run's way into the repository. `put` stores a finished pack under its name.

    `plain`: keep every byte of the slabs, tar headers included, so that the packs are a plain .tar.zst. Else only
    blobs that are not known yet are kept.
    """

    def __init__(
        self,
        codec: Codec,
        put: Callable[[str, memoryview], None],
        names: Iterator[str],
        known: KnownContent | None,
        *,
        putters: int = 1,
        stop: threading.Event | None = None,
    ) -> None:
        self._codec = codec
        self._put = put
        self._names = names
        self._known = known
        self._stop = stop or threading.Event()
        self.digest = codec.digest
        self._failure: BaseException | None = None
        self._ended = False
        workers = max(1, len(os.sched_getaffinity(0)))
        self._free: queue.SimpleQueue[Slab] = queue.SimpleQueue()
        self._unmade = workers + 4  # slabs: a small run needs one or two
        self._work: queue.SimpleQueue[tuple[Slab, _Frame] | None] = queue.SimpleQueue()
        self._ordered: queue.SimpleQueue[_Frame | PageDraft | None] = queue.SimpleQueue()
        self._flight = threading.BoundedSemaphore(_IN_FLIGHT)
        self._putters = ThreadPoolExecutor(putters, thread_name_prefix="put")
        self._buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(putters):
            self._buffers.put(bytearray())
        self._pack = PackBuilder(next(names))
        self._waiting: list[tuple[int, PageRef, bytes]] = []  # pages for the end of the pack, and their slots
        self._waiting_size = 0
        self.packs: list[PackRef] = []
        self.pages: list[PageRef | None] = []
        self._current: Slab | None = None
        self._rows = 0  # of the pages that wait for it
        self._threads = [threading.Thread(target=self._worker, daemon=True) for _ in range(workers)]
        self._threads.append(threading.Thread(target=self._writer, daemon=True))
        for thread in self._threads:
            thread.start()

    # --- the reader's side ---------------------------------------------------------------------------

    def room(self, size: int) -> Slab:
        """The slab being filled, with room for `size` more bytes. Raises what went wrong in any thread."""
        slab = self._current
        if slab is not None and slab.length + size > SLAB_SIZE:
            self.submit()
            slab = None
        if slab is None:
            slab = self._current = self._take_slab()
            slab.clear()
            self.check()
        return slab

    def _take_slab(self) -> Slab:
        if self._unmade and self._free.empty():
            self._unmade -= 1
            return Slab()
        return self._free.get()

    def find(self, digest: bytes) -> tuple[str, int] | None:
        """Where this content is stored already: pack and blob. Nothing is known in a first run."""
        return self._known.find(digest) if self._known is not None else None

    def filled(self) -> None:
        """Submit the slab if it has reached the size of a frame."""
        if self._current is not None and self._current.length >= FRAME_SIZE:
            self.submit()

    def submit(self) -> None:
        """Send the slab being filled on its way."""
        slab, self._current, self._rows = self._current, None, 0
        if slab is None:
            return
        self._flight.acquire()
        frame = _Frame(slab.blobs, slab.pages)
        self._work.put((slab, frame))
        self._ordered.put(frame)
        self.check()

    def add_page(self, draft: PageDraft) -> None:
        """A page whose content was given before."""
        if self._current is None:
            self._flight.acquire()
            self._ordered.put(draft)
            return
        self._current.pages.append(draft)
        self._rows += draft.members
        if self._rows >= _MOST_ROWS:
            self.submit()

    def slot(self, page: PageRef | None = None) -> int:
        """Keep a place in the row of pages, or fill it at once with one that is taken over."""
        self.pages.append(page)
        return len(self.pages) - 1

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise Interrupted(
                "the backup was told to stop; nothing it wrote counts, the next one will use it"
            )

    def finish(self) -> None:
        """Everything is stored when this returns."""
        try:
            self.submit()
        finally:
            self._end()
        self.check()

    def abandon(self) -> None:
        """Stop the threads; packs that are stored already stay, for the next run to use."""
        self._failure = self._failure or Interrupted("abandoned")
        self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._ordered.put(None)
        for _ in self._threads[:-1]:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._putters.shutdown(wait=True)

    # --- workers ---------------------------------------------------------------------------------------

    def _worker(self) -> None:
        _yield_to_others()
        cutter = FileCutter()
        while (job := self._work.get()) is not None:
            slab, frame = job
            try:
                if self._failure is None:
                    frame.blobs = _cut_files(slab, cutter)
                    self._make_frame(slab, frame)
            except BaseException as error:  # noqa: BLE001 - told to the reader, who raises it
                self._fail(error)
            self._free.put(slab)
            frame.ready.set()

    def _make_frame(self, slab: Slab, frame: _Frame) -> None:
        view, digest, pack_row = slab.view, self._codec.digest, BLOB.pack
        if self._known is None:
            for offset, length, _, name in frame.blobs:
                frame.rows.append(pack_row(offset, length, name or digest(view[offset : offset + length])))
            frame.size = slab.length
            frame.stored = self._codec.encode(view[: slab.length]) if slab.length else b""
            return
        new: list[memoryview] = []
        end = 0
        find = self._known.find
        for offset, length, _, known in frame.blobs:
            part = view[offset : offset + length]
            name = known or digest(part)
            place = None if known else find(name)  # whoever gave the digest has looked already
            frame.places.append(place)
            if place is None:
                frame.rows.append(pack_row(end, length, name))
                new.append(part)
                end += length
        frame.size = end
        if new:
            frame.stored = self._codec.encode(b"".join(new) if end < slab.length else view[:end])

    # --- the ordered writer ------------------------------------------------------------------------------

    def _writer(self) -> None:
        while (item := self._ordered.get()) is not None:
            try:
                if isinstance(item, _Frame):
                    item.ready.wait()
                if self._failure is None:
                    if isinstance(item, _Frame):
                        self._place(item)
                    for draft in item.pages if isinstance(item, _Frame) else (item,):
                        self._write_page(draft)
                    if (
                        self._pack.size + self._waiting_size >= PACK_SIZE
                        or self._pack.directory.count >= _MOST_BLOBS
                    ):
                        self._finish_pack()
            except BaseException as error:  # noqa: BLE001 - told to the reader, who raises it
                self._fail(error)
            finally:
                self._flight.release()
        try:
            if self._failure is None and (self._pack.size or self._waiting):
                self._finish_pack()
        except BaseException as error:  # noqa: BLE001 - told to the reader, who raises it
            self._fail(error)

    def _place(self, frame: _Frame) -> None:
        """Put a frame into the pack, and note for every blob where it lies now."""
        pack = self._pack
        number = pack.directory.count
        if frame.size:
            pack.add_frame(frame.stored, frame.size, frame.rows)
            if self._known is not None:
                self._known.add_pack(pack.name, b"".join(frame.rows), number)
        places = frame.places
        for index, (_, _, pieces, _) in enumerate(frame.blobs):
            place = places[index] if places else None
            if place is None:
                name, blob = pack.name, number
                number += 1
            else:
                name, blob = place
            if pieces:
                last = pieces[-1]
                if last[0] == name and last[1] + last[2] == blob:
                    last[2] += 1
                    continue
            pieces.append([name, blob, 1])

    def _write_page(self, draft: PageDraft) -> None:
        """Pages end the pack, side by side: many are read in one request."""
        plain, packs = encode_page(draft.dirs)
        stored = self._codec.encode(plain)
        digest = self._codec.digest(plain).hex()
        page = PageRef(
            draft.stat, self._pack.name, 0, len(stored), len(plain), digest, draft.first, tuple(packs), draft.members,
            draft.bytes,
        )  # fmt: skip
        self._waiting.append((draft.slot, page, stored))
        self._waiting_size += len(stored)

    def _finish_pack(self) -> None:
        pack = self._pack
        for slot, page, stored in self._waiting:
            placed = page._replace(offset=pack.add_page(stored))
            pack.directory.pages.append(page_row(placed))
            self.pages[slot] = placed
        self._waiting, self._waiting_size = [], 0
        data, directory = pack.finish(self._codec)
        digest = self._codec.digest(data[-directory:]).hex()
        self.packs.append(PackRef(pack.name, len(data), directory, digest))
        self._putters.submit(self._put_pack, pack, data)
        self._pack = PackBuilder(next(self._names), self._buffers.get())  # waits while all are on their way

    def _put_pack(self, pack: PackBuilder, data: memoryview) -> None:
        try:
            if self._failure is None:
                self._put(pack.name, data)
        except BaseException as error:  # noqa: BLE001 - told to the reader, who raises it
            self._fail(error)
        finally:
            data.release()
            self._buffers.put(pack.buffer)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None or not isinstance(self._failure, BackupdError):
            self._failure = error


def _cut_files(slab: Slab, cutter: FileCutter) -> list[Content]:
    """The blobs of a slab, those of files that were to be cut among them."""
    blobs: list[Content] = []
    for blob in slab.blobs:
        start, length, pieces, digest = blob
        if digest is not None:
            blobs.append(blob)
            continue
        for count in cutter.cut(slab.view[start : start + length]):
            blobs.append((start, count, pieces, b""))
            start += count
    return blobs


def _yield_to_others() -> None:
    """Lower this thread's priority, so that the reader, who has the interpreter to himself, is never kept waiting for
    a core by those he feeds: a tenth of a full run. Linux keeps a nice value for each thread."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 5))


def page_row(page: PageRef) -> list[Any]:
    """As a pack's directory lists it: the pack itself is not named."""
    return [
        page.stat, page.offset, page.length, page.size, page.digest, page.first, list(page.packs), page.members,
        page.bytes,
    ]  # fmt: skip


def page_from_row(pack: str, row: list[Any]) -> PageRef:
    stat, offset, length, size, digest, first, packs, members, total = row
    return PageRef(stat, pack, offset, length, size, digest, first, tuple(packs), members, total)
