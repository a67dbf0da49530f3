"""Work done side by side by a few threads, in bounded memory: how everything is read that reads very much.

`in_order` is one stage. Stages follow one another as generators do: the results of one are the items of the next, so
that packs are read, decoded, encoded and stored at the same time, and a slow store holds back what feeds it.
`read_frames` is what every one of them reads with: a few neighbouring frames in one request, each blob compared with
its digest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from backupd.archive.pack import BLOB, Directory
from backupd.errors import Damaged
from backupd.log import carry
from backupd.repository import Repository

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 4
SPAN = 4 << 20
"""Bytes of one request, and of what it decodes to, unless a single frame is larger: a request for each frame would
wait for the store most of the time, whole packs of 16 MiB in every thread would not be little memory."""


def in_order(
    items: Iterable[T], work: Callable[[T], R], *, workers: int = WORKERS, ahead: int = WORKERS
) -> Generator[R]:
    """`work` done on every item, the results in the items' order.

    At most `ahead` items are under way or wait to be taken. The first error, of the work or of the items, ends it:
    what has not begun never does, and what has is waited for. So does leaving early.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="parallel")
    waiting: deque[Future[R]] = deque()
    carried = carry(work)
    try:
        for item in items:
            waiting.append(pool.submit(carried, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(items, Generator):
            items.close()  # a stage before this one ends with it, not when somebody sweeps up


class Span(NamedTuple):
    """Neighbouring frames of a pack, read in one request."""

    pack: str
    directory: Directory
    first: int
    end: int
    """One behind the last."""

    @property
    def offset(self) -> int:
        return self.directory.frames[self.first].offset

    @property
    def length(self) -> int:
        last = self.directory.frames[self.end - 1]
        return last.offset + last.length - self.offset


class FrameContent(NamedTuple):
    """A frame as stored and as given. Every blob in it that was asked for is what was written."""

    number: int
    stored: memoryview
    data: memoryview


def spans(pack: str, directory: Directory, wanted: Sequence[int] | None = None) -> Iterator[Span]:
    """The frames with these numbers (all of them for None), those side by side together."""
    frames = directory.frames
    row: list[int] = []
    plain = 0
    for number in range(len(frames)) if wanted is None else wanted:
        frame = frames[number]
        if row:
            extent = frame.offset + frame.length - frames[row[0]].offset
            if number != row[-1] + 1 or extent > SPAN or plain + frame.size > SPAN:
                yield Span(pack, directory, row[0], row[-1] + 1)
                row, plain = [], 0
        row.append(number)
        plain += frame.size
    if row:
        yield Span(pack, directory, row[0], row[-1] + 1)


def read_frames(
    repository: Repository, source: str, span: Span, needed: bytes | bytearray | None = None
) -> Iterator[FrameContent]:
    """Read and compare. Of the blobs, those that are `needed` (a byte for each of the pack's; all for None) must be
    as written. Raises Damaged."""
    frames, starts, codec = span.directory.frames, span.directory.starts(), repository.codec
    base = span.offset
    stored = memoryview(repository.read_pack(source, span.pack, base, span.length))
    for number in range(span.first, span.end):
        frame = frames[number]
        part = stored[frame.offset - base : frame.offset - base + frame.length]
        try:
            data = memoryview(codec.decode(part, frame.size))
        except Damaged as error:
            raise Damaged(f"frame {number} of the pack {span.pack}: {error.message}") from None
        rows = memoryview(span.directory.blobs)[starts[number] * BLOB.size : starts[number + 1] * BLOB.size]
        for blob, (offset, length, digest) in enumerate(BLOB.iter_unpack(rows), starts[number]):
            if needed is not None and not needed[blob]:
                continue
            if codec.digest(data[offset : offset + length]) != digest:
                raise Damaged(f"content in frame {number} of the pack {span.pack} is not what was written")
        yield FrameContent(number, part, data)
