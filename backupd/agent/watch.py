"""What a server keeps of its log because it is not stored yet: looked at all the time, since it may fill a disk, or be
let go of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from backupd.chain import newest
from backupd.errors import BackupdError
from backupd.model import Driver, LogSpan
from backupd.retained import Retained, RetainingDriver, worry

log = logging.getLogger(__name__)

EVERY = 15.0
"""Seconds between two looks."""


def retained_of(driver_of: Callable[[], Driver], since: LogSpan | None) -> Retained | None:
    """None where it keeps nothing, or cannot be asked now. `since`: up to where the log is stored."""
    try:
        driver = driver_of()
        return driver.retained(since) if isinstance(driver, RetainingDriver) else None
    except BackupdError as error:
        log.debug("what is kept of a log is not known: %s", error)
        return None


def retained_of_all(
    logs: Mapping[str, Iterable[LogSpan]], driver: Callable[[str], Driver]
) -> dict[str, Retained | None]:
    """Asked at once: one may not answer for a while. `logs`: what is stored of each source's."""

    def ask(name: str) -> Retained | None:
        return retained_of(partial(driver, name), newest(logs[name]))

    with ThreadPoolExecutor(max(1, len(logs)), thread_name_prefix="retained") as pool:
        return dict(zip(logs, pool.map(ask, logs), strict=True))


class Watch:
    """Looks at one source until told to stop, whether or not its log can be stored: when it cannot, it grows.

    `stored` says up to where the log is stored, once that is known.
    """

    def __init__(
        self,
        source: str,
        driver: Callable[[str], Driver],
        stored: Callable[[], LogSpan | None],
        stop: threading.Event,
        *,
        every: float = EVERY,
    ) -> None:
        self._source, self._driver, self._stored = source, driver, stored
        self._stop, self._every = stop, every
        self._worried = ""
        self.retained: Retained | None = None
        """As of the last look."""
        self.thread = threading.Thread(target=self._run, name=f"watch {source}", daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.retained = self._look()
            self._stop.wait(self._every)

    def _look(self) -> Retained | None:
        try:
            found = retained_of(partial(self._driver, self._source), self._stored())
        except Exception:  # whatever it is, the recorder meets it too and tells it
            log.debug("%s cannot be looked at", self._source, exc_info=True)
            return None
        told, self._worried = self._worried, worry(found)
        if self._worried and not told:
            log.warning("%s: %s", self._source, self._worried)
        return found
