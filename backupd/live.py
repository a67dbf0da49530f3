"""Powers of a restore that only some drivers have: into the running service itself; with what has expired since; by a
log that has no times of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, runtime_checkable

from backupd.model import Archive, Driver, Facts, LogSpan, Progress, RecoveryPoint


@dataclass(frozen=True, slots=True)
class Way:
    """How a restore into a running service is done."""

    safety: str = ""
    """The recovery point that holds what the service held before."""
    listen: str = ""
    """HOST or HOST:PORT where the service reaches this process; empty: where it sees us come from."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A running service that holds what was asked for."""

    facts: Facts
    warnings: tuple[str, ...] = ()
    recovered: Facts = field(default_factory=dict)


class Standing(Protocol):
    """A running service that acknowledges no write, as far as it can promise that."""

    @property
    def unfinished(self) -> str | None:
        """The safety copy of a restore that did not end: what the service holds now is not whole, or None."""

    def replace(
        self, archive: Archive, logs: Callable[[], Iterator[tuple[LogSpan, bytes]]], at: datetime | None, way: Way,
        progress: Progress,
    ) -> Replaced:  # fmt: skip
        """The point, and its log up to `at`, in the place of all that the service holds. Raises RestoreFailed, which
        says what the service holds now: never a part of something that could be taken for the whole."""


@runtime_checkable
class LiveDriver(Protocol):
    """A power that some drivers have besides: a restore into the running service itself."""

    @property
    def alone(self) -> Driver:
        """Captures points that stand alone, without a log."""

    def standing(self) -> AbstractContextManager[Standing]:
        """Of the configured service. Raises RestoreFailed."""


@runtime_checkable
class ExpiringDriver(Protocol):
    """A power that some drivers have besides: what they restore holds things whose time to live runs out."""

    def keeping(self) -> Driver:
        """The same, whose restores of every way keep what has expired since the restored instant: each time to live
        runs on from where it stood then. Else that goes, as it went where it came from."""


@runtime_checkable
class AnchoredDriver(Protocol):
    """A power that some drivers have besides: their log has no times of its own, and is followed to an anchor."""

    def lands_at(self, point: RecoveryPoint, log: Iterable[LogSpan], at: datetime) -> datetime:
        """At or before `at`. `log`: as much of it as tells which anchors lie round that, each piece with its own."""
