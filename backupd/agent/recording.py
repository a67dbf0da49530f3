"""Continuous capture: a thread for each source whose log is recorded, begun again after a while when it fails."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import TracebackType

from backupd.agent.watch import EVERY, Watch
from backupd.catalog import explain
from backupd.errors import BackupdError, CaptureFailed, Locked, UsageError
from backupd.log import run_context
from backupd.logs import Claim, LogWriter
from backupd.model import Clock, Driver, Json, LogSpan, RecordingDriver
from backupd.repository import Repository
from backupd.retained import Retained, worry

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
_CALM = 10.0  # seconds after which a failure is a new one
_FLUSH = 3.0  # seconds that the last flush may take: docker stop kills ten seconds after the signal
_LATE = timedelta(minutes=3)  # an idle source's anchor is stored once a minute


def lag_limit(interval: timedelta) -> timedelta:
    """How old the newest anchor of a log may get."""
    return max(_LATE, 10 * interval)


@dataclass(frozen=True, slots=True)
class RecorderState:
    """How it stands with one source's log."""

    source: str
    state: str
    """`starting`, `recording`, `failing`, `stopped`."""
    since: datetime
    epoch: str = ""
    position: int = 0
    reach: datetime | None = None
    """Up to when a restore can be asked for now: an idle source's moves on once a minute."""
    rpo: timedelta | None = None
    """How much would be lost now: since when there may be something that the source acknowledged and that is not
    stored. Near nothing while nothing changes."""
    lagging: bool = False
    """Behind by more than a failure or two may cost."""
    failures: int = 0
    """Since it went well last."""
    error: str = ""
    """Of the last failure, or why the window closed last."""
    retained: Retained | None = None
    """What the server keeps of it meanwhile, where that is known."""

    @property
    def worry(self) -> str:
        """Why what the server keeps should be looked at."""
        return worry(self.retained)

    def json(self) -> dict[str, Json]:
        return {
            "state": self.state,
            "since": self.since.isoformat(),
            "epoch": self.epoch,
            "position": self.position,
            "reach": self.reach.isoformat() if self.reach else None,
            "rpo_seconds": round(self.rpo.total_seconds(), 3) if self.rpo is not None else None,
            "lagging": self.lagging,
            "failures": self.failures,
            "error": self.error,
            "retained_bytes": self.retained.size if self.retained else None,
            "retained_room_bytes": self.retained.room if self.retained else None,
            "unsent_bytes": self.retained.unsent if self.retained else None,
        }


class Recordings:
    """Records while its context lasts. Nothing that a recorder does ends it.

    `on_begin`, with source, epoch and position, is told whenever a stretch begins that may need a base of its own.
    """

    def __init__(
        self,
        intervals: Mapping[str, timedelta],
        *,
        driver: Callable[[str], Driver],
        repository: Callable[[], Repository],
        clock: Clock,
        on_begin: Callable[[str, str, int], object] = lambda _source, _epoch, _position: None,
        pause: float = FIRST_PAUSE,
        look_every: float = EVERY,
    ) -> None:
        self._driver, self._repository, self.clock, self._on_begin = driver, repository, clock, on_begin
        self._stop = threading.Event()
        self._sources = {
            name: _Source(name, interval, self, pause, clock()) for name, interval in intervals.items()
        }
        self._watches = {
            name: Watch(name, driver, source.stored, self._stop, every=look_every)
            for name, source in self._sources.items()
        }

    def __enter__(self) -> Recordings:
        for name, source in self._sources.items():
            source.thread.start()
            self._watches[name].thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        end = time.monotonic() + _FLUSH
        for source in self._sources.values():
            source.thread.join(max(0.0, end - time.monotonic()))
            if source.thread.is_alive():
                log.error(
                    "the recorder of %s did not stop when told to; nothing unstored was let go", source.name
                )

    def states(self) -> list[RecorderState]:
        """As of now, of every source."""
        now = self.clock()
        return [
            replace(source.state(now), retained=self._watches[name].retained)
            for name, source in self._sources.items()
        ]

    def wait_begun(self, source: str, stop: threading.Event, *, seconds: float = 60.0) -> None:
        """Until the log is recorded: a base made before would begin where nothing is stored. After some seconds it
        goes on all the same. Sources that are not recorded need not wait. Raises Locked while another server is
        recorded under this name: a base of this one would be restored with the other's log."""
        found = self._sources.get(source)
        end = time.monotonic() + seconds
        while (
            found is not None and not found.begun.wait(0.1) and time.monotonic() < end and not stop.is_set()
        ):
            if found.refused is not None:
                raise Locked(found.refused.message, hint=found.refused.hint)

    def record_once(self, source: _Source) -> None:
        """Until stopped, or until it fails."""
        repository, driver = self._repository(), self._driver(source.name)
        if not isinstance(driver, RecordingDriver):
            raise UsageError(
                f"the driver {driver.kind} cannot record a log", hint='take mode = "pitr" out of this source'
            )
        sink = LogWriter(repository, source.name, on_begin=lambda: self._begun(source), claim=source.claim)
        source.sink = sink
        well = False
        try:
            driver.recorder(interval=source.interval.total_seconds()).record(sink.since, sink, self._stop)
            well = True
        finally:
            with contextlib.nullcontext() if well else contextlib.suppress(BackupdError):
                sink.close()
        if not self._stop.is_set():
            raise CaptureFailed("the recorder ended by itself", hint="a fault of the driver: report it")
        # Not after a failure: while a server is started anew no copy of it may come in between.
        source.claim.release(repository)

    def _begun(self, source: _Source) -> None:
        source.stretches += 1
        source.turned(begun=True)
        if source.sink is not None:
            recorded = source.sink.recorded
            log.info("%s is recorded from %x of %s on", source.name, recorded.position, recorded.epoch)
            self._on_begin(source.name, recorded.epoch, recorded.position)

    def ask_for_base(self, source: str) -> None:
        """Tell `on_begin` once more: the base that it should have led to may have failed."""
        found = self._sources.get(source)
        if found is not None and found.begun.is_set() and found.sink is not None:
            recorded = found.sink.recorded
            self._on_begin(source, recorded.epoch, recorded.position)

    def stretch(self, source: str) -> tuple[int, str, int]:
        """How many stretches of a source's log have begun; the epoch, empty where nothing is recorded now, and the
        position of the last one."""
        found = self._sources.get(source)
        if found is None or not found.begun.is_set() or found.sink is None:
            return (found.stretches if found else 0), "", 0
        recorded = found.sink.recorded
        return found.stretches, recorded.epoch, recorded.position

    @property
    def stopping(self) -> threading.Event:
        return self._stop


class _Source:
    """One source's thread, and what is known of it."""

    def __init__(
        self, name: str, interval: timedelta, recordings: Recordings, pause: float, now: datetime
    ) -> None:
        self.name, self.interval = name, interval
        self.sink: LogWriter | None = None
        self.claim = Claim(name)
        self.refused: Locked | None = None
        """Another server is recorded under this name."""
        self.begun = threading.Event()
        self.stretches = 0
        """How many have begun."""
        self.thread = threading.Thread(target=self._run, name=f"record {name}", daemon=True)
        self._recordings, self._pause = recordings, pause
        self._started = self._since = now
        self._error = ""
        self._failures = 0

    def _run(self) -> None:
        stop, pause = self._recordings.stopping, self._pause
        with run_context(job="record", source=self.name):
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    self._recordings.record_once(self)
                    return
                except Exception as error:  # nothing that a recorder does may end the agent
                    expected = isinstance(error, BackupdError)
                    if time.monotonic() - begun > _CALM:
                        pause, self._failures = self._pause, 0
                    self._error = explain(error)
                    self._failures += 1
                    self.refused = error if isinstance(error, Locked) else None
                    self.turned(begun=False)
                    log.error("recording %s failed: %s; again in %g s", self.name, self._error, pause,
                              exc_info=None if expected else error)  # fmt: skip
                stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def turned(self, *, begun: bool) -> None:
        """It records now, or no longer."""
        if begun != self.begun.is_set():
            self._since = self._recordings.clock()
        if begun:
            self.refused = None
            self.begun.set()
        else:
            self.begun.clear()

    def stored(self) -> LogSpan | None:
        """Up to where the log is stored; None until that is known."""
        recorded = self.sink.recorded if self.sink else None
        if recorded is None or not recorded.epoch:
            return self.sink.since if self.sink else None
        return LogSpan(self.name, recorded.epoch, recorded.position, recorded.position, None, 0)

    def state(self, now: datetime) -> RecorderState:
        recorded = self.sink.recorded if self.sink else None
        reach = recorded.reach if recorded else None
        begun = self.begun.is_set()
        state = "recording" if begun else "failing" if self._failures else "starting"
        if not self.thread.is_alive():
            state = "stopped" if self._recordings.stopping.is_set() else "starting"
        complete = recorded.complete if recorded else None
        rpo = now - complete if complete else None
        # At the start what was not recorded meanwhile is fetched first.
        behind = now - max(complete or self._started, self._started)
        gap = recorded.gap if recorded else ""
        return RecorderState(
            self.name, state, self._since, recorded.epoch if recorded else "", recorded.position if recorded else 0,
            reach, rpo, behind > lag_limit(self.interval), self._failures if not begun else 0,
            self._error if not begun and self._error else gap,
        )  # fmt: skip
