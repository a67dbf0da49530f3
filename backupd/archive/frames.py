"""Blobs back from their packs, each compared with its digest before it is handed out."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

from backupd.archive.extract_frame import side_by_side
from backupd.archive.pack import BLOB, Directory, decode_directory
from backupd.codec import Codec
from backupd.errors import Damaged
from backupd.repository import Manifest, Repository

T = TypeVar("T")
Request: TypeAlias = "tuple[T, list[list[Any]] | None]"
"""Something the caller knows its content by, and where it lies: [pack, first blob, blobs], or None for none."""
Blob: TypeAlias = "tuple[int, int, bytes]"
"""Offset in its frame, length, digest."""
_Item: TypeAlias = "tuple[T, Callable[[], Iterable[memoryview]] | None, bool]"
"""Request, what gives its content of one frame, and whether it is the first that waits to use that reading of it."""

READERS = 4
_AHEAD = 6  # frames of 2 MiB that are decoded before they are asked for
_KEPT = 8
"""Frames that are kept while others are read: a file of which some pages changed goes to and fro between the frames
that it came with and those of later points."""
_WAITING = 4096  # members without content must not pile up either
_APART = 16
"""Blobs from which on the thread that decoded their frame also compares them: to hand over fewer costs more."""
_DIRECTORIES = 64  # of some 10 to 150 KB each


class FrameReader:
    """Reads what one manifest names. Safe to use from several threads."""

    def __init__(self, repository: Repository, manifest: Manifest) -> None:
        self._repository = repository
        self._source = manifest.point.source
        self._refs = {pack.name: pack for pack in manifest.packs}
        self._directories: OrderedDict[str, Directory] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def distant(self) -> bool:
        return self._repository.distant

    def directory(self, name: str) -> Directory:
        """Raises Damaged."""
        with self._lock:
            found = self._directories.get(name)
            if found is not None:
                self._directories.move_to_end(name)
                return found
        ref = self._refs.get(name)
        if ref is None:
            raise Damaged(f"the index needs the pack {name}, which the manifest does not name")
        frame = self._repository.read_pack(self._source, name, ref.size - ref.directory, ref.directory)
        if self._repository.codec.digest(frame).hex() != ref.digest:
            raise Damaged(f"the directory of the pack {name} is not what was written")
        directory = decode_directory(frame, self._repository.codec)
        with self._lock:
            self._directories[name] = directory
            while len(self._directories) > _DIRECTORIES:
                self._directories.popitem(last=False)
        return directory

    def locate(self, pack: str, first: int, count: int) -> Iterator[tuple[int, list[Blob]]]:
        """The frames that hold a run of blobs, in order: (number of the frame, its blobs)."""
        directory = self.directory(pack)
        starts = directory.starts()
        end = first + count
        if not 0 <= first <= end <= directory.count:
            raise Damaged(f"the index names blobs that the pack {pack} does not have")
        while first < end:
            frame = bisect_right(starts, first) - 1
            stop = min(end, starts[frame + 1])
            rows = directory.blobs[first * BLOB.size : stop * BLOB.size]
            yield frame, list(BLOB.iter_unpack(rows))
            first = stop

    def frame_of(self, pack: str, blob: int) -> tuple[int, int, int]:
        """The frame that holds a blob: (its number, its first blob, one behind its last). Raises Damaged."""
        starts = self.directory(pack).starts()
        if not 0 <= blob < starts[-1]:
            raise Damaged(f"the index names a blob that the pack {pack} does not have")
        number = bisect_right(starts, blob) - 1
        return number, starts[number], starts[number + 1]

    @property
    def codec(self) -> Codec:
        return self._repository.codec

    def file(self, pack: str) -> str:
        """Where a pack lies as a file, for another process; empty where the store keeps none."""
        return self._repository.pack_file(self._source, pack)

    def stored(self, pack: str, first: int, end: int) -> memoryview:
        """Frames from `first` up to `end` as they are stored, in one request. Raises Damaged."""
        frames = self.directory(pack).frames
        offset, last = frames[first].offset, frames[end - 1]
        length = last.offset + last.length - offset
        return memoryview(self._repository.read_pack(self._source, pack, offset, length))

    def frame(self, pack: str, number: int) -> bytes:
        """A frame's bytes; its blobs are checked where they are taken. Raises Damaged."""
        frame = self.directory(pack).frames[number]
        stored = self._repository.read_pack(self._source, pack, frame.offset, frame.length)
        try:
            return self._repository.codec.decode(stored, frame.size)
        except Damaged as error:
            raise Damaged(f"frame {number} of the pack {pack}: {error.message}") from None

    def _together(self, data: bytes, blobs: list[Blob], pack: str) -> Iterator[memoryview]:
        """Blobs that lie side by side in one piece, each compared with its digest. Raises Damaged."""
        view, digest = memoryview(data), self._repository.codec.digest
        for start, end in side_by_side(blobs):
            for offset, length, name in blobs[start:end]:
                if digest(part := view[offset : offset + length]) != name or len(part) != length:
                    raise Damaged(f"content in the pack {pack} is not what was written")
            yield view[blobs[start][0] : blobs[end - 1][0] + blobs[end - 1][1]]

    def _parts(
        self, frame: Future[bytes], blobs: list[Blob], pack: str
    ) -> Callable[[], Iterable[memoryview]]:
        """What waits for a frame, and gives these blobs of it. Raises Damaged."""
        if len(blobs) < _APART:
            return lambda: self._together(frame.result(), blobs, pack)
        checked: Future[list[memoryview]] = Future()

        def check(frame: Future[bytes]) -> None:
            try:
                checked.set_result(list(self._together(frame.result(), blobs, pack)))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                checked.set_exception(error)

        frame.add_done_callback(check)
        return checked.result

    def stream(self, requests: Iterable[Request[T]]) -> Iterator[tuple[T, memoryview | None]]:
        """The content of each request in order, as much at once as lies together in a frame; (request, None) first,
        for every request."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="frame") as readers:
            waiting: deque[_Item[T]] = deque()
            kept: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
            ahead = 0

            def hand_out() -> Iterator[tuple[T, memoryview | None]]:
                nonlocal ahead
                tag, parts, first = waiting.popleft()
                if parts is None:
                    yield tag, None
                    return
                ahead -= first
                for part in parts():
                    yield tag, part

            def asked(pack: str, number: int) -> tuple[Future[bytes], bool]:
                nonlocal ahead
                found = kept.get((pack, number))
                if found is not None:
                    kept.move_to_end((pack, number))
                    return found, False
                found = kept[pack, number] = readers.submit(self.frame, pack, number)
                ahead += 1
                while len(kept) > _KEPT:
                    kept.popitem(last=False)
                return found, True

            for tag, pieces in requests:
                waiting.append((tag, None, False))
                for pack, start, count in pieces or ():
                    for number, blobs in self.locate(pack, start, count):
                        frame, first = asked(pack, number)
                        waiting.append((tag, self._parts(frame, blobs, pack), first))
                        while ahead > _AHEAD or len(waiting) > _WAITING:
                            yield from hand_out()
                while len(waiting) > _WAITING:
                    yield from hand_out()
            while waiting:
                yield from hand_out()
