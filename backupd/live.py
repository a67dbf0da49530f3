"""The nouns of a restore into a running service: a power that some drivers have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, runtime_checkable

from backupd.model import Archive, Driver, Facts, LogSpan, Progress


@dataclass(frozen=True, slots=True)
class Way:
    """How a restore into a running service is done."""

    safety: str = ""
    """The recovery point that holds what the service held before."""
    listen: str = ""
    """HOST or HOST:PORT where the service reaches this process; empty: where it sees us come from."""
    keep_expired: bool = False
    """What has expired since the instant is kept, all times to live run on from where they stood."""


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
