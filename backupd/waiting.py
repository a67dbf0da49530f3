"""Waiting for a restored service to answer: as long as it gets on, and no longer.

A server that replays hours of log answers nobody meanwhile; one that stands still never will.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from backupd.model import Container, ContainerSpec, Driver, Progress

_TOLD_EVERY = 10.0
"""Seconds between two lines of how far it is: where there is no terminal each is one more."""


@runtime_checkable
class StartingDriver(Protocol):
    """A power that some drivers have besides: services that take long before they answer."""

    def starting(self, container: Container) -> str:
        """How far a container that does not answer yet has come, for people; it changes as long as it gets on. Empty
        where that cannot be told. Raises nothing."""


class Ready(Protocol):
    """What waits: `model.Sandbox.wait_ready`."""

    def __call__(
        self, container: Container, spec: ContainerSpec, *, moving: Callable[[], str] = str
    ) -> None: ...


def start(
    container: Container,
    spec: ContainerSpec,
    driver: Driver,
    ready: Ready,
    progress: Progress,
    check: Callable[[], None],
) -> None:
    """Start it where it does not run, and return when it answers. Raises RestoreFailed, and what `check` raises."""
    if not container.running:
        progress.stage("starting")
        container.start()
    progress.stage("waiting until it answers")
    told, next_at = "", time.monotonic() + _TOLD_EVERY

    def moving() -> str:
        nonlocal told, next_at
        check()
        now = driver.starting(container) if isinstance(driver, StartingDriver) else ""
        if now not in ("", told) and time.monotonic() >= next_at:
            progress.stage(now)
            told, next_at = now, time.monotonic() + _TOLD_EVERY
        return now

    ready(container, spec, moving=moving)
    check()
