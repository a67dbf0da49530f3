"""Small tars to and from containers: streams, never held whole."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from backupd.model import Bytes

if TYPE_CHECKING:
    from tarfile import TarFile

_BLOCK = 512
_CHUNK = 1 << 20


class IteratorFile(io.RawIOBase):
    """Read chunks as a file: what `tarfile` wants."""

    def __init__(self, chunks: Iterable[Bytes]) -> None:
        super().__init__()
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: object) -> int:
        """Fill as much of `buffer` as one chunk allows; 0 at the end."""
        into = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(into), len(self._left))
        into[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


@contextlib.contextmanager
def open_tar(chunks: Iterable[bytes]) -> Iterator[TarFile]:
    """A tar that is read once, from front to back. `chunks` is closed at the end: an engine that is still
    sending when nobody reads holds on to its container."""
    import tarfile

    try:
        with tarfile.open(fileobj=io.BufferedReader(IteratorFile(chunks), _CHUNK), mode="r|") as tar:
            yield tar
    finally:
        if isinstance(chunks, Generator):
            chunks.close()


def first_file(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of the first regular file of a tar. Raises FileNotFoundError where there is none."""
    with open_tar(chunks) as tar:
        for entry in tar:
            if entry.isfile():
                content = tar.extractfile(entry)
                while content is not None and (piece := content.read(_CHUNK)):
                    yield piece
                return
    raise FileNotFoundError("the tar holds no file")


def entry(
    name: str, *, size: int = 0, mode: int = 0o644, uid: int = 0, gid: int = 0, link: str = ""
) -> bytes:
    """The header of one entry: a directory where `name` ends in a slash, a hard link to `link`."""
    import tarfile

    made = tarfile.TarInfo(name)
    made.size, made.mode, made.uid, made.gid = size, mode, uid, gid
    if name.endswith("/"):
        made.type = tarfile.DIRTYPE
    elif link:
        made.type, made.linkname = tarfile.LNKTYPE, link
    return made.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """What follows a content of `size` bytes."""
    return b"\0" * (-size % _BLOCK)


END = b"\0" * (2 * _BLOCK)
