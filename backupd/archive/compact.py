"""Write anew what is still needed of some packs, and let the points that needed them name the new ones.

    directories -> spans of frames, read and compared -> frames as they are, or of blobs taken out -> packs -> put
    then the pages that lie in those packs or name them, into the same new packs
    then, when everything is stored, each manifest in the place of the one before

A frame that is needed whole is copied as it is. Until the first manifest is replaced nothing that counts has changed;
each replacement is one step of the store, and both manifests name packs that are there. The old packs are not removed
here: who has read an old manifest may be reading them. Stopped anywhere, every point is whole: packs that no manifest
came to name are removed by the next prune, and content that some points name in its new place already and others in
its old one is found there, not moved twice.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from backupd.archive.index import read_page
from backupd.archive.known import KnownContent
from backupd.archive.pack import BLOB, Directory, PackBuilder
from backupd.archive.page import CONTENT, Pieces, encode_page, pieces_of
from backupd.archive.parallel import FrameContent, Span, in_order, read_frames, spans
from backupd.archive.pipeline import FRAME_SIZE, PACK_SIZE, page_row
from backupd.archive.usage import Usage, contents, read_directory, unique_pages
from backupd.codec import DIGEST_SIZE
from backupd.errors import BackupdError, Damaged
from backupd.model import Lease, Progress
from backupd.repository import Manifest, PackRef, PageRef, Repository

_PUTTERS = 2
"""Packs of 16 MiB on their way, beside the one that is filled."""


@dataclass(slots=True)
class Compacted:
    """What was written."""

    packs: int = 0
    bytes: int = 0
    """Of packs and manifests."""


def compact(
    repository: Repository,
    source: str,
    manifests: Sequence[Manifest],
    usage: Usage,
    chosen: Sequence[str],
    *,
    names: Iterator[str],
    present: Mapping[str, object],
    lease: Lease,
    at: datetime,
    progress: Progress,
) -> Compacted:
    """Repack `chosen` of the packs that `manifests` (all that stay) name. `names` are free ones for new packs,
    `present` the packs that are there. Raises Damaged, with nothing changed, where needed content is damaged;
    StoreError, Locked."""
    move = _Move(repository, source, manifests, usage, chosen, names, lease, progress)
    try:
        move.write()
        changed = [move.manifest(manifest, present, at) for manifest in manifests if move.concerns(manifest)]
    except BackupdError:
        move.take_back()
        raise
    done = Compacted(len(move.packs), sum(pack.size for pack in move.packs.values()))
    for manifest in changed:
        done.bytes += repository.replace(manifest, lease)
        progress.advance(0, 1)
    return done


@dataclass(slots=True)
class _Draft:
    """A frame to be."""

    stored: bytes = b""
    """As it was, where it is copied whole."""
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    rows: list[bytes] = field(default_factory=list)
    origins: list[tuple[str, int]] = field(default_factory=list)
    """Pack and number of each blob, as it was."""

    def add(self, part: bytes, digest: bytes, origin: tuple[str, int]) -> None:
        self.rows.append(BLOB.pack(self.size, len(part), digest))
        self.parts.append(part)
        self.origins.append(origin)
        self.size += len(part)


@dataclass(slots=True)
class _Page:
    """A page to be."""

    ref: PageRef
    plain: bytes
    stored: bytes
    packs: list[str]


class _Move:
    """One compaction of one source."""

    def __init__(
        self,
        repository: Repository,
        source: str,
        manifests: Sequence[Manifest],
        usage: Usage,
        chosen: Sequence[str],
        names: Iterator[str],
        lease: Lease,
        progress: Progress,
    ) -> None:
        self._repository, self._source, self._manifests = repository, source, manifests
        self._usage, self._names, self._lease, self._progress = usage, names, lease, progress
        self._chosen = set(chosen)
        self._targets: list[str] = []
        self._numbers: dict[str, int] = {}
        # Of each chosen pack, for every blob: the number of its target plus one (0: not moved), and its number there.
        self._places = {
            name: (
                array("I", bytes(4 * len(usage.needed[name]))),
                array("I", bytes(4 * len(usage.needed[name]))),
            )
            for name in chosen
        }
        self._pages: dict[tuple[str, int], PageRef] = {}
        self._begun: list[str] = []
        self._buffers = [
            bytearray()
        ]  # free ones, used again: packs that come and go leave the heap in tatters
        self._pack = PackBuilder(next(names), self._buffers.pop())
        self._known = self._moved_before()
        self.packs: dict[str, PackRef] = {}

    # --- what the caller does with it ---------------------------------------------------------------------

    def write(self) -> None:
        """Everything is stored when this returns."""
        for pack in in_order(self._filled(), self._put, workers=_PUTTERS, ahead=_PUTTERS):
            self.packs[pack.name] = pack

    def concerns(self, manifest: Manifest) -> bool:
        return any(pack.name in self._chosen for pack in manifest.packs)

    def manifest(self, old: Manifest, present: Mapping[str, object], at: datetime) -> Manifest:
        """The same point, named by its new pages and packs."""
        pages = tuple(self._pages.get((page.pack, page.offset), page) for page in old.pages)
        names = dict.fromkeys(name for page in pages for name in (page.pack, *page.packs))
        before = [(name, when) for name, when in old.replaced if name in present and name not in names]
        replaced = [(pack.name, at) for pack in old.packs if pack.name not in names]
        packs = tuple(self.packs.get(name) or self._usage.packs[name] for name in names)
        return old._replace(pages=pages, packs=packs, replaced=(*before, *replaced))

    def take_back(self) -> None:
        """Remove what was written; what cannot be removed now, the next prune removes."""
        for name in self._begun:
            with contextlib.suppress(BackupdError):
                self._repository.remove_pack(self._source, name, self._lease)

    # --- content ------------------------------------------------------------------------------------------

    def _moved_before(self) -> KnownContent | None:
        """Where one point names a pack that another has replaced, a compaction was stopped between the two: what
        is to be moved lies in the other's packs already."""
        stopped = [m for m in self._manifests if any(name in self._chosen for name, _ in m.replaced)]
        packs = {pack.name: pack for manifest in stopped for pack in manifest.packs}
        refs = [pack for name, pack in packs.items() if name not in self._chosen]
        if not refs:
            return None
        known = KnownContent(expected=sum(ref.directory for ref in refs) // 20)
        for ref, directory in zip(refs, in_order(refs, self._directory), strict=True):
            known.add_pack(ref.name, directory.blobs)
        return known

    def _directory(self, ref: PackRef) -> Directory:
        return read_directory(self._repository, self._source, ref)

    def _spans(self) -> Iterator[Span]:
        """Frames of which something is needed and not moved yet."""
        refs = [self._usage.packs[name] for name in self._places]
        for ref, directory in zip(refs, in_order(refs, self._directory), strict=True):
            needed = self._usage.needed[ref.name]
            if self._known is not None:
                self._find_moved(self._known, ref.name, directory)
            starts = directory.starts()
            wanted = [n for n in range(len(directory.frames)) if any(needed[starts[n] : starts[n + 1]])]
            yield from spans(ref.name, directory, wanted)

    def _find_moved(self, known: KnownContent, pack: str, directory: Directory) -> None:
        needed = self._usage.needed[pack]
        for blob, (_, _, digest) in enumerate(BLOB.iter_unpack(directory.blobs)):
            place = known.find(digest) if needed[blob] else None
            if place is not None:
                self._note(pack, blob, self._target(place[0]), place[1])
                needed[blob] = 0

    def _read(self, span: Span) -> tuple[Span, list[_Draft]]:
        """Copies of what is needed: views would keep the whole span in memory until a new frame is full."""
        needed = self._usage.needed[span.pack]
        frames = read_frames(self._repository, self._source, span, needed)
        return span, [self._take(span, frame) for frame in frames]

    def _take(self, span: Span, frame: FrameContent) -> _Draft:
        """A whole frame as it is, or the needed blobs of one."""
        needed, starts, blobs = self._usage.needed[span.pack], span.directory.starts(), span.directory.blobs
        numbers = range(starts[frame.number], starts[frame.number + 1])
        if all(needed[numbers.start : numbers.stop]):
            rows = [bytes(blobs[n * BLOB.size : (n + 1) * BLOB.size]) for n in numbers]
            return _Draft(bytes(frame.stored), [], len(frame.data), rows, [(span.pack, n) for n in numbers])
        draft = _Draft()
        for blob in numbers:
            if needed[blob]:
                offset, length, digest = BLOB.unpack_from(blobs, blob * BLOB.size)
                draft.add(bytes(frame.data[offset : offset + length]), digest, (span.pack, blob))
        return draft

    def _drafts(self) -> Iterator[_Draft]:
        """Whole frames, and frames put together of what was taken out of others."""
        open_draft = _Draft()
        for span, drafts in in_order(self._spans(), self._read):
            self._progress.advance(span.length)
            for draft in drafts:
                if draft.stored:
                    yield draft
                    continue
                for part, row, origin in zip(draft.parts, draft.rows, draft.origins, strict=True):
                    if open_draft.size and open_draft.size + len(part) > FRAME_SIZE:
                        yield open_draft
                        open_draft = _Draft()
                    open_draft.add(part, row[-DIGEST_SIZE:], origin)
        if open_draft.rows:
            yield open_draft

    def _encode(self, draft: _Draft) -> _Draft:
        if not draft.stored:
            draft.stored = self._repository.codec.encode(b"".join(draft.parts))
            draft.parts.clear()
        return draft

    # --- pages --------------------------------------------------------------------------------------------

    def _concerned_pages(self) -> Iterator[PageRef]:
        for page in unique_pages(self._manifests):
            if page.pack in self._chosen or not self._chosen.isdisjoint(page.packs):
                yield page

    def _rewrite(self, ref: PageRef) -> _Page:
        page = read_page(self._repository, self._source, ref)
        for row in contents(page):
            row[CONTENT] = self._moved(pieces_of(row, page.packs))
        plain, packs = encode_page(page.dirs)
        return _Page(ref, plain, self._repository.codec.encode(plain), packs)

    def _moved(self, pieces: Pieces) -> Pieces:
        """The same content in its new places, neighbours merged."""
        moved: Pieces = []
        for name, first, count in pieces:
            places = self._places.get(name)
            if places is None:
                moved.append([name, first, count])
                continue
            for blob in range(first, first + count):
                if not places[0][blob]:
                    raise Damaged(f"the index needs a blob of the pack {name} that was not to be needed")
                target, number = self._targets[places[0][blob] - 1], places[1][blob]
                if moved and moved[-1][0] == target and moved[-1][1] + moved[-1][2] == number:
                    moved[-1][2] += 1
                else:
                    moved.append([target, number, 1])
        return moved

    # --- packs --------------------------------------------------------------------------------------------

    def _filled(self) -> Iterator[PackBuilder]:
        """Full packs, first of content, then of pages: where content lies must be known before a page can say it."""
        for draft in in_order(self._drafts(), self._encode):
            number, target = (
                self._pack.add_frame(draft.stored, draft.size, draft.rows),
                self._target(self._pack.name),
            )
            for blob, (pack, old) in enumerate(draft.origins, number):
                self._note(pack, old, target, blob)
            if self._pack.size >= PACK_SIZE:
                yield self._next()
        for page in in_order(self._concerned_pages(), self._rewrite):
            self._add_page(page)
            if self._pack.size >= PACK_SIZE:
                yield self._next()
        if self._pack.size:
            yield self._next()

    def _add_page(self, page: _Page) -> None:
        offset = self._pack.add_page(page.stored)
        ref = page.ref._replace(
            pack=self._pack.name, offset=offset, length=len(page.stored), size=len(page.plain),
            digest=self._repository.codec.digest(page.plain).hex(), packs=tuple(page.packs),
        )  # fmt: skip
        self._pack.directory.pages.append(page_row(ref))
        self._pages[page.ref.pack, page.ref.offset] = ref

    def _next(self) -> PackBuilder:
        buffer = self._buffers.pop() if self._buffers else bytearray()
        full, self._pack = self._pack, PackBuilder(next(self._names), buffer)
        self._begun.append(full.name)
        return full

    def _put(self, pack: PackBuilder) -> PackRef:
        data, directory = pack.finish(self._repository.codec)
        ref = PackRef(pack.name, len(data), directory, self._repository.codec.digest(data[-directory:]).hex())
        self._lease.check()
        self._repository.put_pack(self._source, pack.name, data)
        data.release()
        self._buffers.append(pack.buffer)
        return ref

    def _target(self, name: str) -> int:
        number = self._numbers.setdefault(name, len(self._targets))
        if number == len(self._targets):
            self._targets.append(name)
        return number

    def _note(self, pack: str, blob: int, target: int, number: int) -> None:
        targets, numbers = self._places[pack]
        targets[blob], numbers[blob] = target + 1, number
