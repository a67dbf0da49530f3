"""What a source's log reaches: spans into chains, and which of them a restore replays. Pure.

A chain is a stretch of log without a hole, across epochs where one continues another (a new timeline). Spans may
overlap, one may lie in another: compaction writes the large one before it removes the small ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple, TypeAlias

from backupd.model import Json, LogMark, LogSpan, RecoveryPoint

SLACK = timedelta(seconds=1)
"""A commit may be written a few milliseconds after it took its time: so much more of the log is replayed from."""


Place: TypeAlias = "tuple[str, str, int]"
"""Source, epoch, position."""


class Need(NamedTuple):
    """[start, end) of an epoch: the log that a restore of a point cannot do without; a part of a chain."""

    epoch: str
    start: int
    end: int


class Chain(NamedTuple):
    """[start, end) of a log, without a hole."""

    source: str
    start: int
    end: int
    spans: tuple[LogSpan, ...]
    """Sorted by start; never empty."""
    parts: tuple[Need, ...]
    """Of which epoch what is: mostly one."""

    @property
    def epoch(self) -> str:
        """The one it ends with."""
        return self.parts[-1].epoch

    @property
    def reach(self) -> datetime | None:
        """The newest anchor that counts."""
        return max((span.anchor.at for span in self.spans if span.anchor), default=None)

    def holds(self, need: Need) -> bool:
        """At least where it begins."""
        return any(p.epoch == need.epoch and p.start <= need.start <= p.end for p in self.parts)

    def covers(self, need: Need) -> bool:
        """All of it."""
        return need.end <= self.end and self.holds(need)


def need_of(point: RecoveryPoint) -> Need | None:
    """None for a point that stands alone."""
    return need_in(point.attributes)


def need_in(attributes: Mapping[str, Json]) -> Need | None:
    """What a point with these attributes needs."""
    match [attributes.get(name) for name in ("epoch", "start", "end")]:
        case [str(epoch), int(start), int(end)]:
            return Need(epoch, start, end)
    return None


def stretches(spans: Iterable[LogSpan], marks: Iterable[LogMark] = ()) -> list[Chain]:
    """The chains within each epoch, sorted by source, epoch and start. None goes across a gap."""
    cuts = {(mark.source, mark.epoch, mark.position) for mark in marks if not mark.after}
    found: list[Chain] = []
    ordered = sorted(spans, key=lambda s: (s.source, s.epoch, s.start, s.end))
    for (source, epoch), group in groupby(ordered, key=lambda s: (s.source, s.epoch)):
        run: list[LogSpan] = []
        end = 0
        for span in group:
            # An anchor alone, at a gap, belongs to what was before it.
            cut = span.start == end < span.end and (source, epoch, end) in cuts
            if run and (span.start > end or cut):
                found.append(_stretch(run, end))
                run = []
            end = max(end, span.end) if run else span.end
            run.append(span)
        found.append(_stretch(run, end))
    return found


def _stretch(run: list[LogSpan], end: int) -> Chain:
    first = run[0]
    return Chain(first.source, first.start, end, tuple(run), (Need(first.epoch, first.start, end),))


def chains(spans: Iterable[LogSpan], marks: Iterable[LogMark] = ()) -> list[Chain]:
    """As `stretches`, those of an epoch that continues another put behind it."""
    held = list(marks)
    found = stretches(spans, held)
    cuts = {(mark.source, mark.epoch, mark.position) for mark in held if not mark.after}
    links = {(m.source, m.after, m.position): m for m in held if m.after}
    links = {before: m for before, m in links.items() if before not in cuts}
    begins = {(c.source, c.epoch, c.start): c for c in found if (c.source, c.epoch, c.start) not in cuts}
    continued = _continued(links, {(c.source, c.epoch, c.end) for c in found})
    linked = []
    for chain in found:
        begin = (chain.source, chain.epoch, chain.start)
        if begin in continued and begin in begins:
            continue  # it stands behind another
        whole, seen = chain, {chain.epoch}
        while (mark := links.get((whole.source, whole.epoch, whole.end))) and mark.epoch not in seen:
            seen.add(mark.epoch)
            after = begins.get((mark.source, mark.epoch, mark.position))
            whole = Chain(
                whole.source, whole.start, after.end if after else whole.end,
                whole.spans + (after.spans if after else ()),
                (*whole.parts, *(after.parts if after else (Need(mark.epoch, whole.end, whole.end),))),
            )  # fmt: skip
        linked.append(whole)
    return linked


def _continued(links: Mapping[Place, LogMark], ends: set[Place]) -> set[Place]:
    """Where epochs begin behind a stretch that is there, also by way of epochs of which nothing was stored."""
    found: set[Place] = set()
    reached = set(ends)
    while (
        new := {(m.source, m.epoch, m.position) for before, m in links.items() if before in reached} - found
    ):
        found |= new
        reached |= new
    return found


def chain_of(point: RecoveryPoint, among: Iterable[Chain]) -> Chain | None:
    """The chain that holds all the log a point needs."""
    need = need_of(point)
    if need is None:
        return None
    return next((c for c in among if c.source == point.source and c.covers(need)), None)


def needs_base(
    points: Iterable[RecoveryPoint],
    among: Sequence[Chain],
    epoch: str,
    position: int,
    marks: Iterable[LogMark] = (),
) -> bool:
    """Whether what is recorded from this position on continues no point: then nothing of it could be restored. A point
    that begins there, or behind, can be restored once so much is recorded."""
    known = list(points)
    needs = [need for point in known if (need := need_of(point))]
    if any(need.epoch == epoch and need.start >= position for need in needs):
        return False
    if any((mark.epoch, mark.position, mark.after) == (epoch, position, "") for mark in marks):
        return True
    held = [chain for chain in among if chain.holds(Need(epoch, position, position))]
    return not any(chain_of(point, held[-1:]) for point in known)


def still_there(chain_spans: Sequence[LogSpan], among: Iterable[Chain]) -> tuple[LogSpan, ...]:
    """What holds the same log now: compaction may have put it together. Empty where there is no such chain."""
    first, last = chain_spans[0], chain_spans[-1]
    for chain in among:
        if chain.covers(Need(first.epoch, first.start, last.end)):
            return chain.spans
    return ()


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
    alone: dict[int, list[LogSpan]] = {}
    for span in chain.spans:
        if span.start == span.end and span.anchor:
            alone.setdefault(span.start, []).append(span)
    chosen: list[LogSpan] = []
    for span in cover(chain.spans, need.start):
        chosen.append(span)
        if span.end >= need.end and span.anchor and span.anchor.at - SLACK >= at:
            break
        chosen += _first_and_last(alone.get(span.end, ()))
    return tuple(chosen or _first_and_last(alone.get(need.start, ())))


def _first_and_last(alone: Iterable[LogSpan]) -> list[LogSpan]:
    """Anchors alone, at one position, say how long nothing was done there: those between say no more."""
    found = sorted(alone, key=lambda s: s.anchor.at if s.anchor else datetime.min)
    return [*found[:1], *found[1:][-1:]]


def newest(spans: Iterable[LogSpan]) -> LogSpan | None:
    """Where recording goes on: of the epoch with the newest anchor, the span that ends last."""
    held = list(spans)
    if not held:
        return None
    last = max(held, key=lambda s: (s.anchor is not None, s.anchor.at if s.anchor else None, s.end))
    return max((s for s in held if s.epoch == last.epoch), key=lambda s: s.end)


def cuts_left_by(stretch: Chain, removed: Collection[LogSpan], *, continues: bool = False) -> list[int]:
    """Positions behind which the log is gone when these spans are: the lower edges of the holes. `continues`: the
    epoch's beginning continues another, and is such an edge itself."""
    cuts: list[int] = []
    end: int | None = stretch.start if continues else None
    for span in stretch.spans:
        if span in removed:
            continue
        if end is not None and span.start > end:
            cuts.append(end)
        end = max(end or 0, span.end)
    if end is not None and end < stretch.end:
        cuts.append(end)
    return cuts
