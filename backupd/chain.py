"""What a source's log reaches: spans into chains, and which of them a restore replays. Pure.

A chain is a stretch of one epoch without a hole. Spans may overlap, one may lie in another: compaction writes the
large one before it removes the small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from backupd.model import Json, LogGap, LogSpan, RecoveryPoint

SLACK = timedelta(seconds=1)
"""A commit may be written a few milliseconds after it took its time: so much more of the log is replayed from."""


@dataclass(frozen=True, slots=True)
class Need:
    """The log that a restore of a point cannot do without."""

    epoch: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chain:
    """[start, end) of one epoch, without a hole."""

    source: str
    epoch: str
    start: int
    end: int
    spans: tuple[LogSpan, ...]
    """Sorted by start; never empty."""

    @property
    def reach(self) -> datetime | None:
        """The newest anchor that counts."""
        return max((span.anchor.at for span in self.spans if span.anchor), default=None)

    def holds(self, need: Need) -> bool:
        """At least where it begins."""
        return need.epoch == self.epoch and self.start <= need.start <= self.end

    def covers(self, need: Need) -> bool:
        """All of it."""
        return need.epoch == self.epoch and self.start <= need.start and need.end <= self.end


def need_of(point: RecoveryPoint) -> Need | None:
    """None for a point that stands alone."""
    return need_in(point.attributes)


def need_in(attributes: Mapping[str, Json]) -> Need | None:
    """What a point with these attributes needs."""
    match [attributes.get(name) for name in ("epoch", "start", "end")]:
        case [str(epoch), int(start), int(end)]:
            return Need(epoch, start, end)
    return None


def chains(spans: Iterable[LogSpan], gaps: Iterable[LogGap] = ()) -> list[Chain]:
    """Sorted by source, epoch and start. No chain goes across a gap."""
    cuts = {(gap.source, gap.epoch, gap.position) for gap in gaps}
    found: list[Chain] = []
    ordered = sorted(spans, key=lambda s: (s.source, s.epoch, s.start, s.end))
    for (source, epoch), group in groupby(ordered, key=lambda s: (s.source, s.epoch)):
        run: list[LogSpan] = []
        end = 0
        for span in group:
            # An anchor alone, at a gap, belongs to what was before it.
            cut = span.start == end < span.end and (source, epoch, end) in cuts
            if run and (span.start > end or cut):
                found.append(Chain(source, epoch, run[0].start, end, tuple(run)))
                run = []
            end = max(end, span.end) if run else span.end
            run.append(span)
        found.append(Chain(source, epoch, run[0].start, end, tuple(run)))
    return found


def chain_of(point: RecoveryPoint, among: Iterable[Chain]) -> Chain | None:
    """The chain that holds all the log a point needs."""
    need = need_of(point)
    if need is None:
        return None
    return next((c for c in among if c.source == point.source and c.covers(need)), None)


def needs_base(points: Iterable[RecoveryPoint], among: Sequence[Chain], epoch: str, position: int) -> bool:
    """Whether what is recorded from this position on continues no point: then nothing of it could be restored."""
    held = [chain for chain in among if chain.epoch == epoch and chain.end == position]
    return not any(chain_of(point, held[-1:]) for point in points)


def interval(point: RecoveryPoint, chain: Chain) -> tuple[datetime, datetime]:
    """From when to when the point and its chain restore."""
    return point.instant, max(point.instant, chain.reach or point.instant)


def cover(spans: Sequence[LogSpan], position: int) -> Iterator[LogSpan]:
    """The fewest spans, of those sorted by start, that continue each other from `position` on; they may overlap."""
    number = 0
    best: LogSpan | None = None
    while True:
        while number < len(spans) and spans[number].start <= position:
            if best is None or spans[number].end > best.end:
                best = spans[number]
            number += 1
        if best is None or best.end <= position:
            return
        yield best
        position = best.end


def logs_for(chain: Chain, need: Need, at: datetime) -> tuple[LogSpan, ...]:
    """What a restore to `at` replays: from the point's start until everything of that instant is in it for certain,
    and a little more."""
    chosen: list[LogSpan] = []
    for span in cover(chain.spans, need.start):
        chosen.append(span)
        if span.end >= need.end and span.anchor and span.anchor.at - SLACK >= at:
            break
    return tuple(chosen)


def newest(spans: Iterable[LogSpan]) -> LogSpan | None:
    """Where recording goes on: of the epoch with the newest anchor, the span that ends last."""
    held = list(spans)
    if not held:
        return None
    last = max(held, key=lambda s: (s.anchor is not None, s.anchor.at if s.anchor else None, s.end))
    return max((s for s in held if s.epoch == last.epoch), key=lambda s: s.end)


def cuts_left_by(chain: Chain, removed: Iterable[LogSpan]) -> list[int]:
    """Positions behind which the log is gone when these spans are: the lower edges of the holes."""
    gone = {(s.start, s.end, s.anchor) for s in removed}
    cuts: list[int] = []
    end: int | None = None
    for span in chain.spans:
        if (span.start, span.end, span.anchor) in gone:
            continue
        if end is not None and span.start > end:
            cuts.append(end)
        end = max(end or 0, span.end)
    if end is not None and end < chain.end:
        cuts.append(end)
    return cuts
