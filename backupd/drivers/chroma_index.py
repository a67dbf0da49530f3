"""Read one of ChromaDB's index directories (HNSW): which ids it holds, and their vectors.

Format as written by ChromaDB 0.4 to 1.5 (little-endian):
  header.bin          version i32 = 1; u64 each: offset of level 0, room, elements, bytes an element, offset of
                      the label, offset of the vector; and the graph's own parameters
  data_level0.bin     the elements: links, vector (float32), label (u64)
  link_lists.bin      for each element the size of its links above level 0 (u32), and them
  length.bin          the length of each vector before it was normalised (float32; only of cosine indexes)
  index_metadata.pickle   a dictionary: id_to_label and more; written last
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backupd.drivers.chroma_snapshot import LAST_WRITTEN

_HEADER = struct.Struct("<iQQQQQQ")
_LABEL = struct.Struct("<Q")
_SIZE = struct.Struct("<I")


class TornIndex(Exception):
    """The files do not belong together, or are cut off."""


class _Fields:
    """Stands in for the one class that ChromaDB before 1.0 pickled."""

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)


class _Plain(pickle.Unpickler):
    """Dictionaries, strings, numbers: a pickle that asks for anything else is refused, so nothing is executed."""

    def find_class(self, module: str, name: str) -> Any:
        """Only ChromaDB's own record, and only as a bag of fields."""
        if module == "chromadb.segment.impl.vector.local_persistent_hnsw" and name == "PersistentData":
            return _Fields
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: object) -> Any:  # noqa: ARG002  the base class names it
        """Never."""
        raise pickle.UnpicklingError("it refers to something outside")


def read_labels(path: Path) -> dict[str, int]:
    """id -> label of `index_metadata.pickle`, read to its end without executing anything. Raises TornIndex."""
    try:
        with path.open("rb") as file:
            found = _Plain(file).load()
            if file.read(1):
                raise TornIndex(f"{path.parent.name}/{path.name} does not end where it should")
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TornIndex(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    fields = found if isinstance(found, dict) else vars(found) if isinstance(found, _Fields) else {}
    labels = fields.get("id_to_label")
    if not isinstance(labels, dict):
        raise TornIndex(f"{path.parent.name}/{path.name} has no labels")
    return {str(key): int(label) for key, label in labels.items()}


class Index:
    """A checked index directory: every id has its vector. Close it."""

    def __init__(self, directory: Path) -> None:
        """Raises TornIndex where the files do not belong together, OSError."""
        self.name = directory.name
        self.labels = read_labels(directory / LAST_WRITTEN)
        head = (directory / "header.bin").read_bytes()
        if len(head) < _HEADER.size:
            raise TornIndex(f"{self.name}/header.bin is cut off")
        version, _, _, count, self._size, self._label_at, self._vector_at = _HEADER.unpack_from(head)
        data = (directory / "data_level0.bin").read_bytes() if count == 0 else self._map(directory)
        self._data: bytes | mmap.mmap = data
        sane = version == 1 and 0 < self._vector_at < self._label_at <= self._size - _LABEL.size
        if not sane or len(data) < count * self._size or count < len(self.labels):
            self.close()
            raise TornIndex(
                f"{self.name} has {len(self.labels)} ids, {count} elements and {len(data)} bytes of them"
            )
        self._lengths = (directory / "length.bin").read_bytes()
        self._places = {self._label(place): place for place in range(count)}
        if missing := self.labels.values() - self._places.keys():
            self.close()
            raise TornIndex(f"{self.name} has {len(missing)} ids without an element")
        self._check_links(directory / "link_lists.bin", count)

    def _map(self, directory: Path) -> mmap.mmap:
        with (directory / "data_level0.bin").open("rb") as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise TornIndex(f"{self.name}/data_level0.bin is empty") from error

    def _label(self, place: int) -> int:
        label: int = _LABEL.unpack_from(self._data, place * self._size + self._label_at)[0]
        return label

    def _check_links(self, path: Path, count: int) -> None:
        links, at = path.read_bytes(), 0
        for _ in range(count):
            if at + _SIZE.size > len(links):
                break
            at += _SIZE.size + _SIZE.unpack_from(links, at)[0]
        else:
            if at <= len(links):
                return
        self.close()
        raise TornIndex(f"{self.name}/{path.name} is cut off")

    @property
    def dimension(self) -> int:
        """Numbers a vector has."""
        return int(self._label_at - self._vector_at) // 4

    def vector(self, key: str) -> bytes:
        """float32s as they are stored: of length 1 in a cosine index. Raises KeyError."""
        at = self._places[self.labels[key]] * self._size
        return bytes(self._data[at + self._vector_at : at + self._label_at])

    def length(self, key: str) -> float:
        """How long the vector was before it was normalised; meaningless in other than cosine indexes."""
        place = self._places[self.labels[key]]
        found: float = struct.unpack_from("<f", self._lengths, place * 4)[0]
        return found

    def close(self) -> None:
        """Closing twice is fine."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()
