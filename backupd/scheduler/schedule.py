"""When something is due: pure functions of a schedule, the last good run and `now`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from backupd.errors import UsageError

_HINT = 'five fields: minute hour day-of-month month day-of-week, as in "0 2 * * *" or "30 22 * * MON-FRI"'
_WINDOWS = tuple(timedelta(minutes=m) for m in (2, 60, 1500, 8 * 1440, 32 * 1440, 367 * 1440, 9 * 366 * 1440))
# looked through for a past due time, smallest first; nine years hold a 29 February even across 2100


@dataclass(frozen=True, slots=True)
class Schedule:
    """A crontab line in a time zone. Made by `parse`; all instants in and out are aware, results in UTC.

    Daylight saving as in Debian's cron: a daily time that is skipped runs at the next minute that exists, one
    that comes twice runs once. (APScheduler's own CronTrigger loses a day in spring for jobs at 00:00 and
    00:30.)
    """

    text: str
    timezone: str
    jitter: timedelta = timedelta()
    """Up to this much later, so that many agents do not start in the same second."""
    seed: str = ""
    """The delay is drawn from this name and the due time: a restart does not draw again."""

    @classmethod
    def parse(
        cls, text: str, timezone: str = "UTC", *, jitter: timedelta = timedelta(), seed: str = ""
    ) -> Schedule:
        """Raises UsageError with a hint where no instant would ever be due."""
        from cronsim import CronSim, CronSimError

        try:
            zone = ZoneInfo(timezone)
        except (
            LookupError,
            ValueError,
            OSError,
        ):  # what it raises for an unknown, an absolute, a directory's name
            raise UsageError(
                f'unknown time zone "{timezone}"', hint='use a name such as "UTC" or "Europe/Berlin"'
            ) from None
        try:
            next(CronSim(text, datetime(2026, 1, 1, tzinfo=zone)))
        except CronSimError as error:
            raise UsageError(f'bad schedule "{text}": {_words(error)}', hint=_HINT) from None
        except StopIteration:
            raise UsageError(f'the schedule "{text}" never comes due', hint=_HINT) from None
        return cls(text, timezone, jitter, seed)

    def after(self, instant: datetime) -> datetime:
        """The first due time later than the instant."""
        from cronsim import CronSim

        # Within an hour that comes twice the library may offer an instant that has passed already.
        return next(
            due
            for due in (
                d.astimezone(UTC) for d in CronSim(self.text, instant.astimezone(ZoneInfo(self.timezone)))
            )
            if due > instant
        )

    def previous(self, instant: datetime) -> datetime | None:
        """The last due time that is not later than the instant; None where there was none for nine years."""
        # By going forward from further and further back: going backward, the library disagrees with itself
        # around a change of the clocks, and a due time must be the same from both sides.
        for window in _WINDOWS:
            due = None
            candidate = self.after(instant - window)
            while candidate <= instant:
                due, candidate = candidate, self.after(candidate)
            if due is not None:
                return due
        return None

    def fires(self, due: datetime) -> datetime:
        """When the job of a due time is started: at most `jitter` later, and before the next is due."""
        if not self.jitter:
            return due
        digest = hashlib.sha256(f"{self.seed}\0{due.isoformat()}".encode()).digest()
        fraction = int.from_bytes(digest[:6], "big") / 2**48
        return due + fraction * min(self.jitter, self.after(due) - due)

    def fired(self, now: datetime) -> datetime | None:
        """The last due time whose job should have been started by now."""
        due = self.previous(now)
        if due is not None and self.fires(due) > now:
            due = self.previous(due - timedelta(microseconds=1))
        return due

    def next_fire(self, now: datetime) -> datetime:
        """When the next job will be started, later than now."""
        due = self.previous(now)
        if due is not None and self.fires(due) > now:
            return self.fires(due)
        return self.fires(self.after(now))

    def tolerance(self, now: datetime) -> timedelta:
        """How late a good run may be before the source is overdue: half the distance between two due times,
        at least 10 minutes, at most 6 hours."""
        coming = self.after(now)
        gap = self.after(coming) - coming
        return min(max(gap / 2, timedelta(minutes=10)), timedelta(hours=6))


def due_now(schedule: Schedule, last_ok: datetime | None, now: datetime) -> datetime | None:
    """The due time that must be caught up at once, if any: the last one, when nothing good has started since.

    Ten missed runs are caught up by one. A source that has never had a good run is due at once.
    """
    due = schedule.fired(now)
    if due is None:
        return now if last_ok is None else None
    return due if last_ok is None or last_ok < due else None


def overdue(
    schedule: Schedule, last_ok: datetime | None, now: datetime, tolerance: timedelta | None = None
) -> datetime | None:
    """The due time that should have led to a good run by now and did not."""
    tolerance = schedule.tolerance(now) if tolerance is None else tolerance
    due = schedule.fired(now - tolerance)
    return due if due is not None and (last_ok is None or last_ok < due) else None


def _words(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]
