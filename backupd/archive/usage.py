"""What of each pack kept points still need: read from their index pages and the packs' directories.

A million blobs are some 5 MB here: a byte that says needed or not, and four for its length.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress

from backupd.archive.earlier import load_directory
from backupd.archive.index import read_pages
from backupd.archive.pack import SKIPPABLE_HEADER, Directory, Frame
from backupd.archive.page import CONTENT, Page, Row
from backupd.archive.parallel import in_order
from backupd.archive.repack import IndexUse, PackUse
from backupd.errors import Damaged
from backupd.repository import Manifest, PackRef, PageRef, Repository


@dataclass(slots=True)
class Usage:
    """Everything that the kept points of one source need."""

    packs: dict[str, PackRef]
    needed: dict[str, bytearray]
    """Of each pack, a byte for each of its blobs."""
    uses: list[PackUse]
    index: list[IndexUse]


def measure(
    repository: Repository, source: str, manifests: Sequence[Manifest], sizes: Mapping[str, int]
) -> Usage:
    """`sizes`: of the manifests as stored, by point id. Raises Damaged where an index or a directory is damaged."""
    packs = {pack.name: pack for manifest in manifests for pack in manifest.packs}
    needed: dict[str, bytearray] = {}
    lengths: dict[str, array[int]] = {}
    frames: dict[str, list[Frame]] = {}
    for ref, directory in zip(
        packs.values(), in_order(packs.values(), partial(read_directory, repository, source)), strict=True
    ):
        needed[ref.name] = bytearray(directory.count)
        lengths[ref.name] = _lengths(directory)
        frames[ref.name] = directory.frames
    pages = unique_pages(manifests)
    for page in read_pages(repository, source, pages):
        _mark(page, needed)
    uses = [
        PackUse(name, ref.size, _content(ref, frames[name], lengths[name], needed[name]))
        for name, ref in packs.items()
    ]
    return Usage(packs, needed, uses, list(_index(packs, pages, manifests, sizes)))


def unique_pages(manifests: Sequence[Manifest]) -> list[PageRef]:
    """Every page once, however many points share it."""
    return list(
        {(page.pack, page.offset): page for manifest in manifests for page in manifest.pages}.values()
    )


def read_directory(repository: Repository, source: str, ref: PackRef) -> Directory:
    """The directory that a manifest names. Raises Damaged."""
    directory, found = load_directory(repository, source, ref.name, ref.size)
    if found.digest != ref.digest:
        raise Damaged(f"the directory of the pack {ref.name} is not what was written")
    return directory


def contents(page: Page) -> Iterator[Row]:
    """The rows of a page that name blobs."""
    for _, _, rows in page.dirs:
        for row in rows:
            if type(row[CONTENT]) is list:
                yield row


def _mark(page: Page, needed: Mapping[str, bytearray]) -> None:
    for row in contents(page):
        flat = row[CONTENT]
        for i in range(0, len(flat), 3):
            name, first, count = page.packs[flat[i]], flat[i + 1], flat[i + 2]
            blobs = needed.get(name)
            if blobs is None or not 0 <= first <= first + count <= len(blobs):
                raise Damaged(f"an index page names blobs that the pack {name} does not have")
            blobs[first : first + count] = b"\1" * count


def _lengths(directory: Directory) -> array[int]:
    """Of the blobs: the second of the six words of each row."""
    words = array("I", bytes(directory.blobs))
    if sys.byteorder == "big":
        words.byteswap()
    return words[1::6]


def _content(ref: PackRef, frames: Sequence[Frame], lengths: array[int], needed: bytearray) -> int:
    """Stored bytes of what is needed. A frame's blobs are taken to compress alike, and what a first run's frames
    hold beside them, the headers of a tar, to nothing."""
    total = start = 0
    for frame in frames:
        end = start + frame.blobs
        some = needed[start:end]
        if all(some):
            total += frame.length if some else 0
        elif any(some):
            part = sum(compress(lengths[start:end], some))
            total += -(-frame.length * part // max(sum(lengths[start:end]), 1))
        start = end
    if needed:
        total += -(-ref.directory * needed.count(1) // len(needed))
    return total


def _index(
    packs: Mapping[str, PackRef],
    pages: Sequence[PageRef],
    manifests: Sequence[Manifest],
    sizes: Mapping[str, int],
) -> Iterator[IndexUse]:
    number = {name: index for index, name in enumerate(packs)}
    for page in pages:
        touches = tuple({number[name] for name in (page.pack, *page.packs)})
        yield IndexUse(page.length + SKIPPABLE_HEADER, touches, number[page.pack])
    for manifest in manifests:
        yield IndexUse(sizes.get(manifest.point.id, 0), tuple({number[pack.name] for pack in manifest.packs}))
