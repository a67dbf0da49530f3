"""Compare what is stored with what was written.

Structure: every manifest, every pack it names, their directories, every index page, and that each member's content
lies in a blob that exists. Data: frames of whole packs are decoded and every blob compared with its digest, in
parallel and in bounded memory. Logs: every object's header and length, holes, points without the log they need; where
objects hold the same, whether they agree. Nothing stops at the first damage: the report names each, and the points
that need it.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from backupd.archive.earlier import load_directory
from backupd.archive.index import read_page
from backupd.archive.pack import Directory
from backupd.archive.page import CONTENT, MODE, NAME, SIZE, extra_of, is_file
from backupd.archive.parallel import Span, in_order, read_frames, spans
from backupd.chain import Chain, chains, still_there, stretches
from backupd.errors import BackupdError, Damaged, ObjectMissing, StoreError
from backupd.logs import check, check_log, read_span
from backupd.model import LogSpan, Progress, RecoveryPoint
from backupd.repository import Manifest, PackRef, PageRef, Repository, log_key

T = TypeVar("T")
R = TypeVar("R")

_MOST_PROBLEMS = 1000


@dataclass(slots=True)
class VerifyReport:
    """What was looked at and what is wrong. `problems` empty: everything looked at is as it was written."""

    points: int = 0
    objects: int = 0
    bytes_read: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not as it will be, and no damage."""


def verify(
    repository: Repository,
    *,
    sources: Sequence[str] | None,
    data_percent: float = 0,
    progress: Progress,
    choose: Callable[[Sequence[str], int], Sequence[str]] | None = None,
) -> VerifyReport:
    """Structure of everything; data of `data_percent` of the packs, chosen at random (or by `choose`).

    Raises StoreError where the store cannot be listed: that is not a finding about what is stored.
    """
    report = VerifyReport()
    names = sources if sources is not None else repository.sources()
    for source in names:
        progress.stage(f"{source}: verifying")
        _Source(repository, source, report, progress, choose or random.SystemRandom().sample).run(
            data_percent
        )
    return report


class _Source:
    """One source's share of the work."""

    def __init__(
        self,
        repository: Repository,
        source: str,
        report: VerifyReport,
        progress: Progress,
        choose: Callable[[Sequence[str], int], Sequence[str]],
    ) -> None:
        self._repository = repository
        self._source = source
        self._report = report
        self._progress = progress
        self._choose = choose
        self._lock = threading.Lock()
        self._needed_by: dict[str, list[str]] = defaultdict(list)  # pack -> points
        self._counts: dict[str, int] = {}  # pack -> blobs, for packs whose directory is sound

    def run(self, data_percent: float) -> None:
        manifests = list(self._manifests())
        packs = self._packs(manifests)
        self._each(packs.values(), self._check_pack)
        pages = {page.digest + page.pack: (page, m) for m in manifests for page in m.pages}
        self._each(pages.values(), lambda item: self._check_page(*item))
        if data_percent > 0:
            sound = sorted(self._counts)
            count = max(1, round(len(sound) * data_percent / 100)) if sound else 0
            chosen = [packs[name] for name in self._choose(sound, count)]
            self._each(self._spans(chosen), self._check_span)
        self._check_log([manifest.point for manifest in manifests], data_percent)

    def _each(self, items: Iterable[T], check: Callable[[T], object]) -> None:
        deque(in_order(items, self._guard(check)), maxlen=0)

    def _manifests(self) -> Iterator[Manifest]:
        for key in self._repository.point_keys(self._source):
            try:
                manifest = self._repository.manifest_at(key)
            except (Damaged, StoreError) as error:
                self._problem(f"{error.message}: this point cannot be restored")
                continue
            self._report.points += 1
            self._report.objects += 1
            yield manifest

    def _packs(self, manifests: Sequence[Manifest]) -> dict[str, PackRef]:
        present = {name: info.size for name, info in self._repository.packs(self._source)}
        found: dict[str, PackRef] = {}
        for manifest in manifests:
            for pack in manifest.packs:
                found[pack.name] = pack
                self._needed_by[pack.name].append(manifest.point.id)
        for name, pack in list(found.items()):
            if name not in present:
                self._problem(f"the pack {name} is missing", name)
                del found[name]
            elif present[name] != pack.size:
                self._problem(f"the pack {name} has {present[name]:,} bytes instead of {pack.size:,}", name)
                del found[name]
        return found

    def _check_pack(self, ref: PackRef) -> None:
        directory = self._directory(ref)
        self._count(ref.directory)
        self._counts[ref.name] = directory.count

    def _directory(self, ref: PackRef) -> Directory:
        try:
            directory, read = load_directory(self._repository, self._source, ref.name, ref.size)
        except Damaged as error:
            raise _Finding(error.message, ref.name) from None
        if read.digest != ref.digest:
            raise _Finding(f"the directory of the pack {ref.name} is not what was written", ref.name)
        return directory

    def _check_page(self, ref: PageRef, manifest: Manifest) -> None:
        if ref.pack not in self._counts:
            return  # told already, with the pack
        try:
            page = read_page(self._repository, self._source, ref)
        except Damaged as error:
            raise _Finding(error.message, ref.pack) from None
        self._count(ref.length)
        for path, _, rows in page.dirs:
            for row in rows:
                if not is_file(row):
                    continue
                flat = row[CONTENT] or []
                for pack, first, count in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
                    name = page.packs[pack]
                    if name in self._counts and not 0 <= first <= first + count <= self._counts[name]:
                        where = f"{path}/{row[NAME]}"
                        raise _Finding(
                            f"the index of point {manifest.point.id} is wrong about {where}", ref.pack
                        )
                if not flat and row[SIZE] and not extra_of(row) and row[MODE]:
                    raise _Finding(f"the index says nothing of where {path}/{row[NAME]} lies", ref.pack)

    def _spans(self, chosen: Sequence[PackRef]) -> Iterator[Span]:
        """All content of these packs, some frames at a time."""
        for pack, directory in zip(chosen, in_order(chosen, self._guard(self._directory)), strict=True):
            if directory is not None:
                self._count(pack.directory)
                yield from spans(pack.name, directory)

    def _check_span(self, span: Span) -> None:
        try:
            deque(read_frames(self._repository, self._source, span), maxlen=0)
        except Damaged as error:
            raise _Finding(error.message, span.pack) from None
        self._count(span.length, objects=0)

    # --- the log ------------------------------------------------------------------------------------------

    def _check_log(self, points: Sequence[RecoveryPoint], data_percent: float) -> None:
        """Listed after the manifests were: what they need was stored before them."""
        spans, marks = self._repository.logs(self._source)
        found = chains(spans, marks)
        for problem in (*check.missing(stretches(spans, marks), marks), *check.unreachable(points, found)):
            self._problem(problem)
        pieces = [(chain, span) for chain in found for span in chain.spans]
        self._each(pieces, lambda piece: self._check_piece(*piece))
        pairs = [pair for chain in found for pair in check.overlaps(chain)]
        if pairs:
            self._report.notes.append(
                f"{self._source}: {len(pairs)} log objects lie in others; compaction removes them"
            )
        self._each(pairs, lambda pair: self._check_pair(*pair))
        if data_percent > 0 and pieces:
            names = [str(number) for number in range(len(pieces))]
            count = max(1, round(len(names) * data_percent / 100))
            chosen = [pieces[int(name)] for name in self._choose(names, count)]
            self._each(chosen, lambda piece: self._check_content(*piece))

    def _check_piece(self, chain: Chain, span: LogSpan) -> None:
        try:
            header = check_log(self._repository, span)
        except Damaged as error:
            raise _Finding(f"{error.message}; {check.last_before(chain, span)}", "") from None
        except ObjectMissing:
            return self._put_together(span)
        return self._count(header.length)

    def _put_together(self, span: LogSpan) -> None:
        """Gone since it was listed: compaction has another object in its place, prune none any more."""
        if not still_there([span], chains(*self._repository.logs(self._source))):
            self._report.notes.append(f"{self._source}: {log_key(span)} was removed while it was verified")

    def _check_pair(self, one: LogSpan, other: LogSpan) -> None:
        if differ := check.agree(self._repository, one, other):
            raise _Finding(differ, "")

    def _check_content(self, chain: Chain, span: LogSpan) -> None:
        try:
            deque(read_span(self._repository, span), maxlen=0)
        except ObjectMissing:
            return
        except Damaged as error:
            raise _Finding(f"{error.message}; {check.last_before(chain, span)}", "") from None
        self._count(span.size, objects=0)

    # --- telling ------------------------------------------------------------------------------------------

    def _guard(self, check: Callable[[T], R]) -> Callable[[T], R | None]:
        """Damage is told and the rest goes on."""

        def guarded(item: T) -> R | None:
            try:
                return check(item)
            except _Finding as finding:
                self._problem(finding.message, finding.pack)
            except (Damaged, StoreError) as error:
                self._problem(error.message)
            return None

        return guarded

    def _count(self, size: int, objects: int = 1) -> None:
        with self._lock:
            self._report.objects += objects
            self._report.bytes_read += size
        self._progress.advance(size, objects)

    def _problem(self, text: str, pack: str = "") -> None:
        points = self._needed_by.get(pack, [])
        if points:
            text += f" (needed by {len(points)} point{'s' * (len(points) > 1)}: {', '.join(points[:5])}"
            text += ", ...)" if len(points) > 5 else ")"
        with self._lock:
            if len(self._report.problems) < _MOST_PROBLEMS:
                self._report.problems.append(f"{self._source}: {text}")


class _Finding(BackupdError):
    """Damage, and the pack in which it is."""

    def __init__(self, message: str, pack: str) -> None:
        super().__init__(message)
        self.pack = pack
