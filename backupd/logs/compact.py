"""Many small pieces of a log into few large ones, without ever opening a hole.

The large one is stored first, the small ones are removed then; who reads meanwhile meets both, or the large one.
`plan_compaction` is pure. A span is written anew only together with as much again, or while it is small: so each byte
of a log is written a few times, not every hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from backupd.chain import cover, stretches
from backupd.errors import ObjectExists
from backupd.logs.piece import encode
from backupd.logs.read import read_header, read_logs, read_span
from backupd.model import Anchor, LogMark, LogSpan, Progress
from backupd.repository import Repository, log_key

LARGE = 64 << 20
"""Bytes of log in one object, at most."""
SMALL = 1 << 20
_THIN = timedelta(milliseconds=250)  # anchors that stay lie at least so far apart
_ANCHORS = 100_000
"""In one object: where days lie in it, as the source does little, fewer a second stay. Its header must stay small."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """Spans of which one is made."""

    made: LogSpan
    """Its size is not known before."""
    read: tuple[LogSpan, ...]
    """That continue each other and are its content."""
    remove: tuple[LogSpan, ...]
    """Everything that lies in it."""


def plan_compaction(
    spans: Iterable[LogSpan], marks: Iterable[LogMark] = (), *, large: int = LARGE, small: int = SMALL
) -> list[Compaction]:
    """Only what makes fewer objects."""
    planned: list[Compaction] = []
    for chain in stretches(spans, marks):
        line = list(cover(chain.spans, chain.start)) or [chain.spans[-1]]
        for group in _groups(line, large, small):
            start, end = group[0].start, group[-1].end
            # At its end, anchors alone belong to it; at its start, to what was before it.
            inside = tuple(
                s for s in chain.spans
                if start <= s.start and s.end <= end and (s.start < s.end or s.start > start or s.start == chain.start)
            )  # fmt: skip
            anchor = max((s.anchor for s in inside if s.anchor), key=lambda a: a.at, default=None)
            made = LogSpan(chain.source, chain.epoch, start, end, anchor and Anchor(anchor.at, end), 0)
            only_anchors = all(s.start == s.end for s in inside if s not in group)
            if len(group) == 1 and only_anchors and start < end:
                planned += _anchors_alone(inside, group[0])
            elif len(inside) > 1:
                planned.append(Compaction(made, tuple(group), inside))
    return planned


def _groups(line: Sequence[LogSpan], large: int, small: int) -> Iterator[list[LogSpan]]:
    """Neighbours to be put together, newest first."""
    group: list[LogSpan] = []
    total = 0
    for span in reversed(line):
        length = span.end - span.start
        overlap = max(0, span.end - group[0].start) if group else 0
        if group and (total + length - overlap > large or length > max(total, small)):
            yield group
            group, total = [], 0
            overlap = 0
        group.insert(0, span)
        total += length - overlap
    if group:
        yield group


def _anchors_alone(inside: Sequence[LogSpan], large: LogSpan) -> Iterator[Compaction]:
    """Beside a span that is not written anew: of the anchors at each position only the newest stays, and none that
    the span knows better."""
    alone: dict[int, list[LogSpan]] = {}
    for span in inside:
        if span.start == span.end:
            alone.setdefault(span.start, []).append(span)
    for held in alone.values():
        best = max(held, key=lambda s: (s.anchor is not None, s.anchor and s.anchor.at))
        known = large.anchor is not None and (best.anchor is None or best.anchor.at <= large.anchor.at)
        if known:
            yield Compaction(large, (large,), (large, *held))
        elif len(held) > 1:
            yield Compaction(best, (best,), tuple(held))


def compact_logs(
    repository: Repository, source: str, *, progress: Progress, large: int = LARGE, small: int = SMALL
) -> int:
    """Objects that there are fewer. Under the source's lease. Raises Locked, StoreError, Damaged; stopped anywhere,
    it leaves nothing but spans that lie in one another."""
    progress.stage(f"{source}: putting the log together")
    fewer = 0
    with repository.lease(source) as lease:
        for planned in plan_compaction(*repository.logs(source), large=large, small=small):
            _make(repository, planned)
            kept = log_key(planned.made)
            for span in planned.remove:
                if log_key(span) != kept:
                    repository.remove_log(span, lease)
            fewer += len(planned.remove) - 1
            progress.advance(planned.made.end - planned.made.start, len(planned.remove))
    return fewer


def _make(repository: Repository, planned: Compaction) -> None:
    """Stored and readable when it returns."""
    made = planned.made
    if log_key(made) in {log_key(span) for span in planned.remove}:
        for _ in read_span(repository, made):  # what stays is sound before the others go
            pass
        return
    anchors = thinned(anchor for span in planned.remove for anchor in read_header(repository, span).anchors)
    pieces = (data for _, data in read_logs(repository, planned.read))
    stored, size = encode(repository.codec, pieces, anchors)
    if size != made.end - made.start:
        raise AssertionError(f"{size} bytes of log from {made.start:x} to {made.end:x}")
    try:
        repository.put_log(made, stored)
    except ObjectExists:
        for _ in read_span(repository, made):
            pass


def thinned(anchors: Iterable[Anchor], *, most: int = _ANCHORS) -> list[Anchor]:
    """Oldest first; the oldest and the newest always stay. Of those at one position the first and the last say all:
    the source stood still between."""
    kept: list[Anchor] = []
    for anchor in sorted(set(anchors), key=lambda a: (a.at, a.position)):
        if len(kept) > 1 and anchor.position == kept[-1].position == kept[-2].position:
            kept.pop()
        kept.append(anchor)
    apart = _THIN
    kept = _apart(kept, apart)
    while len(kept) > most:
        apart *= 2
        kept = _apart(kept, apart)
    return kept


def _apart(anchors: Iterable[Anchor], least: timedelta) -> list[Anchor]:
    kept: list[Anchor] = []
    for anchor in anchors:
        if len(kept) > 1 and anchor.at - kept[-2].at < least:
            kept.pop()
        kept.append(anchor)
    return kept
