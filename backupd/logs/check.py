"""What verify finds in a log, and a restore before it begins: holes that nothing explains, points without the log they
need, torn objects, objects that differ where they hold the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from backupd.chain import Chain, Need, chain_of, chains, cover, need_of
from backupd.errors import Damaged, ObjectMissing
from backupd.log import carry
from backupd.logs.read import AGAIN, check_log, hole, read_span
from backupd.model import LogMark, LogSpan, RecoveryPoint
from backupd.repository import Repository, log_key

READERS, DISTANT = 2, 8
"""Objects looked at side by side; of a distant store more, as each waits for its answers most of the time."""


def check_logs(
    repository: Repository,
    spans: Sequence[LogSpan],
    *,
    content: bool = False,
    stop: Callable[[], object] = lambda: None,
) -> None:
    """What a restore is about to replay, before it begins: all there, none torn, none that differs from another where
    they hold the same; with `content`, every byte of it what was written. Raises Damaged, with the last instant before
    what is, and what `stop` raises, which is asked often."""
    left = list(spans)
    for _ in range(AGAIN):
        try:
            _look_at(repository, left, content, stop)
        except ObjectMissing:  # put together with others, or lost: then reading would find a hole
            chain = _chain_of(repository, spans)
            left = list(cover(chain.spans, spans[0].start)) if chain else []
            if not left:
                gone = next(iter(_gone(repository, spans)), spans[0])
                raise hole(gone, gone.start) from None
        else:
            break
    if spans and (chain := _chain_of(repository, spans)):
        _refuse_differences(repository, chain, spans[0].start, spans[-1].end)


def _look_at(
    repository: Repository, spans: Sequence[LogSpan], content: bool, stop: Callable[[], object]
) -> None:
    """The first that is wrong, in their order, is raised; none after it is begun."""

    def look(span: LogSpan) -> None:
        stop()
        check_log(repository, span, content=content)

    pool = ThreadPoolExecutor(DISTANT if repository.distant else READERS, thread_name_prefix="log")
    looks = [pool.submit(carry(look), span) for span in spans]
    try:
        for span, done in zip(spans, looks, strict=True):
            try:
                done.result()
            except Damaged as error:
                chain = _chain_of(repository, spans)
                told = f"{last_before(chain, span)}; " if chain else ""
                raise Damaged(error.message, hint=f"{told}{error.hint}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chain_of(repository: Repository, spans: Sequence[LogSpan]) -> Chain | None:
    need = Need(spans[0].epoch, spans[0].start, spans[-1].end)
    found = chains(*repository.logs(spans[0].source))
    return next((chain for chain in found if chain.covers(need)), None)


def _refuse_differences(repository: Repository, chain: Chain, start: int, end: int) -> None:
    """Mostly there is nothing that overlaps, and nothing is read."""
    for one, other in overlaps(chain):
        if other.start < end and one.end > start and (told := agree(repository, one, other)):
            raise Damaged(
                told, hint="`backupd verify` names everything; take the right one from another copy"
            )


def _gone(repository: Repository, spans: Sequence[LogSpan]) -> Iterator[LogSpan]:
    there = set(repository.logs(spans[0].source)[0])
    return (span for span in spans if span not in there)


def missing(stretches: Sequence[Chain], marks: Sequence[LogMark]) -> Iterator[str]:
    """Holes without a mark. Pure."""
    cuts = {(mark.epoch, mark.position) for mark in marks if not mark.after}
    begins = {mark.epoch: mark.position for mark in marks if mark.after}
    before: Chain | None = None
    for stretch in stretches:
        same = before is not None and before.epoch == stretch.epoch
        end = before.end if before is not None and same else begins.get(stretch.epoch)
        if end is not None and end < stretch.start and (stretch.epoch, end) not in cuts:
            reach = before.reach if before is not None and same else None
            yield (
                f"the log of {stretch.epoch} is missing from {end:x} to {stretch.start:x}: "
                f"restores come up to {_said(reach)}, and go on with the next base after that"
            )
        before = stretch


def unreachable(points: Sequence[RecoveryPoint], chains: Sequence[Chain]) -> Iterator[str]:
    """Points that cannot be restored, as the log that they need is not whole. Pure."""
    for point in points:
        need = need_of(point)
        if need is not None and chain_of(point, chains) is None:
            yield (
                f"the point {point.id} of {point.instant:%Y-%m-%d %H:%M:%S} UTC cannot be restored: the log "
                f"that it needs, {need.start:x} to {need.end:x} of {need.epoch}, is not all there"
            )


def last_before(chain: Chain, span: LogSpan) -> str:
    """Up to when restores come where a span cannot be read. Pure."""
    held = [s.anchor.at for s in chain.spans if s.anchor and s.end <= span.start]
    return f"restores come up to {_said(max(held, default=None))}"


def overlaps(chain: Chain) -> Iterator[tuple[LogSpan, LogSpan]]:
    """Objects that hold some of the same log, each with the one before it that reaches furthest. Pure."""
    widest: LogSpan | None = None
    for span in chain.spans:
        if widest is not None and span.start < min(widest.end, span.end):
            yield widest, span
        if widest is None or span.end > widest.end:
            widest = span


def agree(repository: Repository, one: LogSpan, other: LogSpan) -> str:
    """Empty where both hold the same; compaction may take one away meanwhile. Raises Damaged."""
    start, end = max(one.start, other.start), min(one.end, other.end)
    try:
        held = [
            b"".join(data for _, data in read_span(repository, span, position=start))[: end - start]
            for span in (one, other)
        ]
    except ObjectMissing:
        return ""
    if held[0] == held[1]:
        return ""
    return f"{log_key(one)} and {log_key(other)} hold different bytes from {start:x} to {end:x}"


def _said(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S.%f} UTC" if at else "no instant of it"
