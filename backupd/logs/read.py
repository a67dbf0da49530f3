"""Reading a log back: in order, without a hole, each byte compared with its digest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from backupd.chain import Need, chains, cover, still_there
from backupd.errors import Damaged, ObjectMissing
from backupd.log import carry
from backupd.logs.piece import HEAD, Header, decode, decode_frame, decode_header, header_length
from backupd.model import Anchor, LogMark, LogSpan
from backupd.repository import Repository, log_key

LOG_FOLDER = "backupd-log"
"""Where a restore into a directory puts the log, beside the files."""

AGAIN = 3
"""Times that what was planned is looked for anew, when compaction was faster."""
_AHEAD = 2  # pieces
_NAPS = (0.05, 0.5)
"""Seconds between two looks for a log that is waited for: the first, and the longest. Each lists what is stored."""


def read_logs(repository: Repository, spans: Sequence[LogSpan]) -> Iterator[tuple[LogSpan, bytes]]:
    """The log of these spans, some MiB at a time, each piece beginning where the one before ended; one may be empty,
    with what is known of how long nothing followed. The next ones are read meanwhile.

    Where compaction has put another object in the place of one, that is read. Raises Damaged for a hole.
    """
    pieces = _pieces(repository, spans)
    step = carry(lambda: next(pieces, None))
    reader = ThreadPoolExecutor(1, thread_name_prefix="log")
    try:
        waiting = deque(reader.submit(step) for _ in range(_AHEAD))
        while (piece := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(step))
            yield piece
    finally:
        reader.shutdown(cancel_futures=True)


def _pieces(repository: Repository, spans: Sequence[LogSpan]) -> Iterator[tuple[LogSpan, bytes]]:
    if not spans:
        return
    first, position, end = spans[0], spans[0].start, max(span.end for span in spans)
    left, tries = list(spans), 0
    while position < end:
        before = position
        try:
            for span in cover(left, position):
                yield from _alone(repository, spans, position)
                for piece, data in read_span(repository, span, position=position):
                    yield piece, data
                    position = piece.end
                if position >= end:
                    break
            if position >= end:
                break
        except ObjectMissing:
            left = list(still_there(spans, chains(*repository.logs(first.source))))
            tries = tries + 1 if position == before else 1
            if tries <= AGAIN:
                continue
        raise hole(first, position)
    yield from _alone(repository, spans, end)


def _alone(
    repository: Repository, spans: Iterable[LogSpan], position: int
) -> Iterator[tuple[LogSpan, bytes]]:
    """The objects that hold anchors alone, at a position."""
    for span in spans:
        if span.start == span.end == position and span.anchor is not None:
            anchors: tuple[Anchor, ...] = (span.anchor,)
            with contextlib.suppress(ObjectMissing):  # compaction was faster, and left a newer one
                anchors = read_header(repository, span).anchors or anchors
            yield replace(span, anchors=anchors), b""


def read_span(
    repository: Repository, span: LogSpan, *, position: int | None = None
) -> Iterator[tuple[LogSpan, bytes]]:
    """One object's log from `position` on, frame by frame. Raises Damaged, ObjectMissing."""
    stored = repository.read_log(span)
    at, wanted = span.start, span.start if position is None else position
    try:
        header = decode_header(repository.codec, stored)
        anchors = list(header.anchors)
        for data in decode(repository.codec, stored, header):
            begin, at = at, at + len(data)
            if at > wanted:
                skip = max(0, wanted - begin)
                known = tuple(takewhile(lambda anchor: anchor.position <= at, anchors))  # noqa: B023
                del anchors[: len(known)]
                piece = replace(span, start=begin + skip, end=at, anchors=known)
                yield piece, data[skip:] if skip else data
        if at != span.end:
            raise Damaged(f"it holds the log up to {at:x} instead of {span.end:x}")
    except Damaged as error:
        raise _named(span, error) from None


def read_tail(repository: Repository, span: LogSpan, size: int) -> bytes:
    """The last bytes of an object's log, at most `size` and what its last frame holds. Raises Damaged,
    ObjectMissing."""
    header = read_header(repository, span)
    if not header.frames:
        return b""
    frame = header.frames[-1]
    stored = repository.read_log(span, offset=header.stored - frame.length, length=frame.length)
    try:
        return decode_frame(repository.codec, stored, frame)[-size:]
    except Damaged as error:
        raise _named(span, error) from None


def check_log(repository: Repository, span: LogSpan, *, content: bool = False) -> Header:
    """Its header, after it was compared with the name and the length of the object: a torn one is found without
    reading it. With `content` every frame is read, one at a time, and compared with its digest. Raises Damaged,
    ObjectMissing."""
    try:
        head = read_head(repository, span)
        header = decode_header(repository.codec, head)
        if header.stored != span.size:
            raise Damaged(f"it has {span.size:,} bytes instead of {header.stored:,}")
        if header.size != span.end - span.start:
            raise Damaged(f"it holds {header.size:,} bytes of the log instead of {span.end - span.start:,}")
        at = header.length
        for frame in header.frames if content else ():
            end = at + frame.length
            within = end <= len(head)  # small objects came whole
            stored = head[at:end] if within else repository.read_log(span, offset=at, length=frame.length)
            decode_frame(repository.codec, stored, frame)
            at = end
    except Damaged as error:
        raise _named(span, error) from None
    return header


def write_logs(pieces: Iterator[tuple[LogSpan, bytes]], folder: Path) -> str:
    """The log as one file in a new folder; its name: epoch and first position."""
    folder.mkdir()
    name = ""
    with contextlib.ExitStack() as stack:
        for piece, data in pieces:
            if not name:
                name = f"{piece.epoch}-{piece.start:016x}"
                file = stack.enter_context((folder / name).open("xb"))
            file.write(data)
    return name


def read_header(repository: Repository, span: LogSpan | LogMark) -> Header:
    """Raises Damaged, ObjectMissing."""
    return decode_header(repository.codec, read_head(repository, span))


def read_head(repository: Repository, span: LogSpan | LogMark) -> bytes:
    """The front of an object, its header at least. Raises Damaged, ObjectMissing."""
    head = repository.read_log(span, length=HEAD)
    if header_length(head) > len(head) >= HEAD:
        head = repository.read_log(span, length=header_length(head))
    return head


def anchored(repository: Repository, spans: Sequence[LogSpan], at: datetime) -> list[LogSpan]:
    """Those of a log, with their anchors, that tell between which of these an instant lies. One header or two are read,
    more where nothing was recorded for long. Raises Damaged, ObjectMissing."""
    behind = next((n for n, span in enumerate(spans) if span.anchor and span.anchor.at > at), len(spans) - 1)
    found: list[LogSpan] = []
    for span in reversed(spans[: behind + 1]):
        try:
            found.insert(0, replace(span, anchors=read_header(repository, span).anchors))
        except Damaged as error:
            raise _named(span, error) from None
        if any(anchor.at <= at for anchor in found[0].anchors):
            break
    return found


def reached(logs: Mapping[str, Iterable[LogSpan]]) -> dict[str, datetime]:
    """The newest anchor of each source's log that has any: up to when a restore would come. Pure."""
    found = {}
    for source, spans in logs.items():
        newest = max((span.anchor.at for span in spans if span.anchor), default=None)
        if newest is not None:
            found[source] = newest
    return found


def wait_for_logs(
    repository: Repository, source: str, need: Need, *, seconds: float, stop: threading.Event
) -> bool:
    """Whether everything a new point needs of the log is stored, or came to be within some seconds: another thread
    or another process records it."""
    end = time.monotonic() + seconds
    nap, longest = _NAPS
    while not any(chain.covers(need) for chain in chains(*repository.logs(source))):
        if time.monotonic() >= end or stop.wait(nap):
            return False
        nap = min(2 * nap, longest)
    return True


def _named(span: LogSpan, error: Damaged) -> Damaged:
    return Damaged(
        f"the log {log_key(span)} is damaged: {error.message}",
        hint="copy that object from another copy",
    )


def hole(span: LogSpan, position: int) -> Damaged:
    """What is raised where the log ends before it should."""
    return Damaged(
        f"the log of {span.source} has a hole at {position:016x} of {span.epoch}",
        hint="it was pruned, or an object is missing; `backupd window` shows what can be restored",
    )
