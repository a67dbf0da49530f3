"""The sink of a recorder: pieces into the repository, each durable before it is acknowledged, none out of order.

An anchor is stored with the first piece that ends at or behind its position. While nothing happens at the source
there is no piece; then an object with the anchor alone is stored once a minute, so that "up to when" stays known.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from backupd.chain import cover, newest, stretches
from backupd.errors import Locked, ObjectExists, StoreError
from backupd.logs.claim import Claim
from backupd.logs.piece import encode
from backupd.logs.read import read_logs, read_span, read_tail
from backupd.model import Anchor, LogMark, LogSpan
from backupd.repository import Repository, log_key

log = logging.getLogger(__name__)

IDLE = 60.0
"""Seconds after which an anchor is stored without a piece."""
STEP = timedelta(seconds=1)
"""A clock that goes back by more was set: times before and after it cannot be told apart."""


def put_mark(repository: Repository, mark: LogMark, reason: str) -> None:
    """For good. It may be there already."""
    stored, _ = encode(repository.codec, [], (), gap=reason)
    with contextlib.suppress(ObjectExists):
        repository.put_log(mark, stored)


@dataclass(frozen=True, slots=True)
class Recorded:
    """How far recording has come."""

    epoch: str = ""
    position: int = 0
    reach: datetime | None = None
    """The newest stored anchor: up to when a restore can be asked for now."""
    complete: datetime | None = None
    """Everything that the source acknowledged before this instant is stored. While it is idle this moves on, and the
    anchor that says so is stored once a minute."""
    pieces: int = 0
    stored: int = 0
    """Bytes, since the start."""
    gap: str = ""
    """Why the window closed last, since the start."""


class LogWriter:
    """A `model.LogSink` of one source. Fed by one thread; `recorded` may be asked by any.

    `on_begin` is told whenever a stretch begins that may need a base of its own.
    """

    def __init__(
        self,
        repository: Repository,
        source: str,
        *,
        on_begin: Callable[[], object] = lambda: None,
        claim: Claim | None = None,
        idle: float = IDLE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`claim`: kept by the agent, which makes a writer for every try."""
        self._repository, self._source, self._claim = repository, source, claim
        self._on_begin, self._idle, self._now = on_begin, idle, now
        self._lock = threading.RLock()
        spans, marks = repository.logs(source)
        self.since = newest(spans)
        """Where recording goes on."""
        found = stretches(spans, marks)
        self._last = {chain.epoch: chain for chain in found}  # sorted by start: the last of each epoch stays
        self._ends = {epoch: chain.end for epoch, chain in self._last.items()}
        self._cuts = {(mark.epoch, mark.position) for mark in marks if not mark.after}
        reach = max((c.reach for c in found if c.reach), default=None)
        self._recorded = Recorded(reach=reach, complete=reach)
        self._epoch = ""
        self._position = 0
        self._begun = False
        self._fresh = False  # right behind a gap: nothing is stored yet of what follows
        self._newest: Anchor | None = None  # of this chain, stored or pending
        self._stored: Anchor | None = None  # of this chain
        self._pending: list[Anchor] = []
        self._attempt: tuple[int, int, tuple[Anchor, ...]] | None = None
        self._before: tuple[int, int, bytes] | None = None
        self._put_at = now()

    @property
    def recorded(self) -> Recorded:
        """Without the lock, which is held while a store takes its time: who asks must not wait for that."""
        return self._recorded

    # --- the seam ---------------------------------------------------------------------------------------

    def claim(self, server: str) -> None:
        with self._lock:
            if self._claim is None:
                return
            self._claim.take(self._repository, server)
            if not self._begun and _end(newest(self._repository.logs(self._source)[0])) != _end(self.since):
                raise StoreError(
                    f"the log of {self._source} went on just now", hint="it is begun again by itself"
                )

    def begin(self, epoch: str, position: int) -> None:
        log_key(LogMark(self._source, epoch, position))  # refuses an epoch that cannot be part of a key
        with self._lock:
            end = self._ends.get(epoch)
            if end is not None and position < end:
                raise StoreError(
                    f"the log of {self._source} goes back: it is stored up to {end:x} and begins again at {position:x}",
                    hint="was the server set back to an earlier state? promote it: that makes a timeline of its own",
                )
            if end is not None and position > end:
                self._mark(epoch, end, f"the log goes on at {position:x} instead of {end:x}")
            cut = position == end and (epoch, position) in self._cuts
            continues = self._begun and end is None and position == self._position
            if continues:
                after = LogMark(self._source, epoch, position, self._epoch)
                put_mark(self._repository, after, "")
            anew = cut or end is None or position > end
            if not continues and (anew or not self._begun or epoch != self._epoch):
                last = self._last.get(epoch)
                anchor = Anchor(last.reach, position) if not anew and last and last.reach else None
                self._newest = self._stored = anchor
                self._fresh, self._pending, self._attempt, self._before = cut, [], None, None
            self._epoch, self._position, self._begun = epoch, position, True
            self._ends[epoch] = position
            self._tell(epoch=epoch, position=position)
        self._on_begin()

    def piece(self, start: int, end: int, data: bytes) -> None:
        with self._lock:
            whole = (start, end, self._repository.codec.digest(data))
            if self._before == whole:
                return
            self._refuse(start, end, data)
            if self._attempt and self._attempt[:2] == (start, end):
                anchors = self._attempt[2]  # again after an answer was lost: under the same name
            else:
                anchors = tuple(anchor for anchor in self._pending if anchor.position <= end)
            self._attempt = (start, end, anchors)
            self._put(start, end, data, anchors)
            self._before, self._attempt = whole, None
            self._position, self._ends[self._epoch], self._fresh = end, end, False
            self._pending = [anchor for anchor in self._pending if anchor not in anchors]
            self._tell(position=end)

    def anchor(self, at: datetime, position: int) -> None:
        with self._lock:
            self._refuse_unbegun()
            if self._newest is not None and at < self._newest.at:
                if self._newest.at - at <= STEP:
                    return
                self._set_back(at, self._newest.at)
            self._newest = Anchor(at, position)
            # Of those at one position the first and the last say all: the source stood still between.
            if [anchor.position for anchor in self._pending[-2:]] == [position, position]:
                self._pending.pop()
            self._pending.append(self._newest)
            if position <= self._position and not self._fresh:
                self._tell(complete=_later(self._recorded.complete, at))
            if self._now() - self._put_at >= self._idle:
                self._put_anchor()

    def last(self, belongs: Callable[[str], bool]) -> LogSpan | None:
        return newest(s for epoch, chain in self._last.items() if belongs(epoch) for s in chain.spans)

    def tail(self, epoch: str, size: int) -> bytes:
        """As of the start."""
        chain = self._last.get(epoch)
        size = min(size, chain.end - chain.start) if chain else 0
        if chain is None or size <= 0:
            return b""
        spans = list(cover(chain.spans, chain.end - size))
        last = read_tail(self._repository, spans[-1], size)
        if len(last) == size:
            return last
        return b"".join(data for _, data in read_logs(self._repository, spans))[-size:]

    def gap(self, reason: str) -> None:
        with self._lock:
            epoch, position = self._epoch, self._position
            if not self._begun:
                found = max(self._last.values(), key=lambda c: (c.reach is not None, c.reach), default=None)
                if found is None:
                    return  # nothing is stored that could be cut off
                epoch, position = found.epoch, found.end
            self._mark(epoch, position, reason)
            self._begun, self._pending, self._newest = False, [], None

    def close(self) -> None:
        """After a recorder ended: the newest anchor that counts is stored. Raises StoreError."""
        with self._lock:
            if self._begun:
                self._put_anchor()

    # --- what it takes ------------------------------------------------------------------------------------

    def _refuse_unbegun(self) -> None:
        if not self._begun:
            raise StoreError(
                f"the log of {self._source} has not begun", hint="a fault of the driver: report it"
            )

    def _refuse(self, start: int, end: int, data: bytes) -> None:
        self._refuse_unbegun()
        if start != self._position:
            raise StoreError(
                f"the log of {self._source} is stored up to {self._position:x}; the next piece begins at {start:x}",
                hint="a fault of the driver: report it",
            )
        if end - start != len(data) or not data:
            raise StoreError(
                f"a piece of the log of {self._source} has {len(data):,} bytes from {start:x} to {end:x}",
                hint="a fault of the driver: report it",
            )

    def _put(self, start: int, end: int, data: bytes, anchors: tuple[Anchor, ...]) -> None:
        """Durable when it returns."""
        self._keep_claim()
        anchor = max((*anchors, *filter(None, [self._stored])), key=lambda a: a.at, default=None)
        stored, _ = encode(self._repository.codec, [data], anchors)
        span = LogSpan(self._source, self._epoch, start, end, anchor, len(stored))
        try:
            self._repository.put_log(span, stored)
        except ObjectExists:
            if b"".join(held for _, held in read_span(self._repository, span)) != data:
                raise
        self._put_at, self._stored = self._now(), anchor
        done = self._recorded
        at = anchor.at if anchor else None
        self._tell(reach=_later(done.reach, at), complete=_later(done.complete, at), pieces=done.pieces + 1,
                   stored=done.stored + len(stored))  # fmt: skip

    def _keep_claim(self) -> None:
        """Before anything is stored. Raises Locked where another server has the log now: then this one ends here."""
        try:
            if self._claim is not None:
                self._claim.check(self._repository)
        except Locked:
            self._begun = False
            raise

    def _put_anchor(self) -> None:
        """An object without any log, for the anchors that count. None right behind a gap: by its position it would
        belong to what was before. The first of them is stored with the next piece once more."""
        counting = [anchor for anchor in self._pending if anchor.position <= self._position]
        news = counting and (self._stored is None or counting[-1].at > self._stored.at)
        if news and not self._fresh:
            self._put(self._position, self._position, b"", tuple(counting))
            self._pending = [anchor for anchor in self._pending if anchor not in counting[1:]]

    def _set_back(self, at: datetime, before: datetime) -> None:
        reason = f"the source's clock was set back from {before.isoformat()} to {at.isoformat()}"
        self._mark(self._epoch, self._position, reason)
        self._fresh, self._pending, self._stored = True, [], None
        self._on_begin()

    def _mark(self, epoch: str, position: int, reason: str) -> None:
        """The window closes at this position, for good."""
        self._keep_claim()
        log.warning("the window of %s closes: %s; a new base is needed", self._source, reason)
        put_mark(self._repository, LogMark(self._source, epoch, position), reason)
        self._cuts.add((epoch, position))
        self._tell(gap=reason)

    def _tell(self, **changes: object) -> None:
        self._recorded = replace(self._recorded, **changes)  # type: ignore[arg-type]


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    return max((at for at in (one, other) if at), default=None)


def _end(span: LogSpan | None) -> tuple[str, int] | None:
    return (span.epoch, span.end) if span else None
