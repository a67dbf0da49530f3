"""A source with a log, all in memory: an account whose every movement is a record of sixteen bytes; no pytest in here.

Positions count bytes, as everywhere. A restore gives the list of movements; so a test sees exactly which came back.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Facts,
    Json,
    LogSink,
    LogSpan,
    Problem,
    RecoveryPoint,
    Stream,
    Streams,
)

RECORD = struct.Struct("<qQ")  # microseconds since 1970, number of the movement
_1970 = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Account:
    """The server. Its log is kept from `kept` on, as a slot would."""

    epochs: list[tuple[str, int]] = field(default_factory=lambda: [("acc-1", 0)])
    """Each with the position where it began."""
    log: bytearray = field(default_factory=bytearray)
    kept: int = 0
    now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)
    breaks: str = ""
    server: str = "one"
    """A copy is another."""

    @property
    def epoch(self) -> str:
        return self.epochs[-1][0]

    def promote(self) -> None:
        """A new epoch continues the one before, as a timeline does."""
        self.epochs.append((f"acc-{len(self.epochs) + 1}", len(self.log)))

    def move(self, at: datetime | None = None) -> datetime:
        """A movement, acknowledged at the instant returned."""
        self.now = at or self.now + timedelta(seconds=1)
        self.log += RECORD.pack((self.now - _1970) // timedelta(microseconds=1), len(self.log) // 16)
        return self.now


class AccountDriver:
    """A `model.Driver` and a `model.RecordingDriver`."""

    kind = "account"

    def __init__(self, account: Account) -> None:
        self.account = account
        self.restored: dict[str, list[int]] = {}
        """By container: the numbers of the movements that came back."""
        self.targets: list[Mapping[str, str]] = []

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:
        account = self.account
        start = len(account.log)
        base = json.dumps([number for _, number in RECORD.iter_unpack(bytes(account.log))])
        account.move()  # while the base is read
        end, instant = len(account.log), account.now + timedelta(microseconds=1)
        attributes: dict[str, Json] = {"epoch": account.epoch, "start": start, "end": end}
        chunks = iter([base.encode()])
        yield Capture(Streams([Stream("movements.json", chunks)]), instant, attributes=attributes)

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        return ContainerSpec("account", load_while="stopped", service=False)

    def load(self, archive: Archive, container: Container) -> None:
        raise AssertionError("a base without its log is not consistent")

    def load_to(
        self,
        archive: Archive,
        logs: Iterator[tuple[LogSpan, bytes]],
        at: datetime | None,
        container: Container,
        **target: str,
    ) -> None:
        back: list[int] = json.loads(b"".join(archive.read("movements.json")))
        position, held, first = int(str(archive.point.attributes["start"])), bytearray(), 0
        for span, data in logs:
            assert span.end - span.start == len(data)
            assert not held or span.start == first + len(held)
            if not held:
                first = span.start
            held += data
        if held:
            assert first <= position
            for micros, number in RECORD.iter_unpack(bytes(held[position - first :])):
                if at is not None and _1970 + timedelta(microseconds=micros) > at:
                    break
                back.append(number)
        self.restored[container.name] = back
        self.targets.append(target)

    def recovered(self, container: Container) -> Facts:
        return {}

    def facts(self, container: Container) -> Facts:
        return {}

    def check(self) -> Sequence[Problem]:
        return []

    def recorder(self, *, interval: float) -> AccountRecorder:
        return AccountRecorder(self.account, interval)


class AccountRecorder:
    """A `model.Recorder`."""

    def __init__(self, account: Account, interval: float = 0.01) -> None:
        self.account, self.interval = account, interval

    def record(self, since: LogSpan | None, sink: LogSink, stop: threading.Event) -> None:
        account = self.account
        if account.breaks:
            raise RuntimeError(account.breaks)
        sink.claim(account.server)
        position = account.kept
        self.epoch = len(account.epochs) - 1
        if since is not None:
            known = [epoch for epoch, _ in account.epochs]
            if since.epoch not in known:
                sink.gap(f"{account.epoch} is another account than {since.epoch}")
            else:
                position, self.epoch = since.end, known.index(since.epoch)
            if position < account.kept:
                sink.gap(f"the log is kept from {account.kept:x} on")
                position, self.epoch = account.kept, len(account.epochs) - 1
        sink.begin(account.epochs[self.epoch][0], position)
        while True:
            position = self.once(sink, position)
            if stop.wait(self.interval):
                self.once(sink, position)
                return

    def once(self, sink: LogSink, position: int) -> int:
        """What came since, through every change of the epoch."""
        account = self.account
        if account.breaks:
            raise RuntimeError(account.breaks)
        now, last = account.now, len(account.log)
        sink.anchor(now + timedelta(microseconds=1), last)
        while True:
            ended = self.epoch + 1 < len(account.epochs)
            end = account.epochs[self.epoch + 1][1] if ended else last
            if end > position:
                sink.piece(position, end, bytes(account.log[position:end]))
            if not ended:
                return max(end, position)
            self.epoch += 1
            position = max(end, position)
            sink.begin(account.epochs[self.epoch][0], position)
