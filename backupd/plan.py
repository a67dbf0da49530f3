"""Which recovery point of each source reaches an instant, and how far from it each lands. Pure.

Never rounded in silence: an instant that cannot be reached is refused with what can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from backupd.errors import NoRecoveryPoint, UsageError
from backupd.model import PointKind, RecoveryPoint

LATEST = datetime.max.replace(tzinfo=UTC)
"""`--at latest`: the newest point there is, even one a server dated a second ahead of this clock."""

_AHEAD = timedelta(minutes=5)  # a clock this far ahead of ours may still be right


@dataclass(frozen=True, slots=True)
class Step:
    """One source: what is restored, and where it lands."""

    point: RecoveryPoint
    skew: timedelta
    """How much earlier than asked for it lands: what happened to the source in between is lost."""

    @property
    def source(self) -> str:
        return self.point.source

    @property
    def lands_at(self) -> datetime:
        return self.point.instant


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore does, before it does it. `steps` is never empty."""

    at: datetime
    """The instant asked for; of `latest`, the newest instant reached."""
    steps: tuple[Step, ...]

    @property
    def size(self) -> int:
        """Bytes when restored."""
        return sum(step.point.size for step in self.steps)

    @property
    def effective(self) -> datetime:
        """T_eff: everything the sources had at this instant is in the restore."""
        return min(step.lands_at for step in self.steps)

    @property
    def spread(self) -> timedelta:
        """How far apart the sources land: within it, one may know of what another does not."""
        return max(step.lands_at for step in self.steps) - self.effective


@dataclass(frozen=True, slots=True)
class Window:
    """The instants a source can be restored to: separate points for dumps and snapshots."""

    source: str
    points: tuple[RecoveryPoint, ...]
    """Sorted by instant; never empty."""

    @property
    def first(self) -> datetime:
        return self.points[0].instant

    @property
    def last(self) -> datetime:
        return self.points[-1].instant


def windows(points: Iterable[RecoveryPoint]) -> dict[str, Window]:
    """The window of each source that has a point."""
    by_source: dict[str, list[RecoveryPoint]] = {}
    for p in points:
        if p.kind is PointKind.FULL:
            by_source.setdefault(p.source, []).append(p)
    return {
        source: Window(source, tuple(sorted(group, key=lambda p: (p.instant, p.id))))
        for source, group in sorted(by_source.items())
    }


def plan_restore(
    points: Iterable[RecoveryPoint],
    at: datetime,
    sources: Sequence[str],
    *,
    max_skew: timedelta | None = None,
) -> RestorePlan:
    """For each source its newest point at or before `at`.

    Raises UsageError where nothing is asked for, NoRecoveryPoint where a source has no point so early (the
    message says from when to when it has some) or lands more than `max_skew` before `at`.
    """
    if not sources:
        raise UsageError(
            "there is nothing to restore", hint="name a source or a stack; `backupd list` shows them"
        )
    known = windows(points)
    wanted = list(dict.fromkeys(sources))
    _refuse_unknown(known, wanted)
    chosen: dict[str, RecoveryPoint] = {}
    for source in wanted:
        reached = [p for p in known[source].points if p.instant <= at]
        if reached:
            chosen[source] = reached[-1]
    if len(chosen) < len(wanted):
        raise _too_early(at, [known[s] for s in wanted if s not in chosen], [known[s] for s in wanted])
    asked = at if at != LATEST else max(p.instant for p in chosen.values())
    plan = RestorePlan(asked, tuple(Step(p, asked - p.instant) for p in chosen.values()))
    if max_skew is not None:
        _refuse_skew(plan, max_skew)
    return plan


def plan_point(point: RecoveryPoint) -> RestorePlan:
    """The plan that restores one point as it is."""
    return RestorePlan(point.instant, (Step(point, timedelta(0)),))


def _refuse_unknown(known: dict[str, Window], wanted: list[str]) -> None:
    without = [source for source in wanted if source not in known]
    if without:
        have = f"there are points of {', '.join(known)}" if known else "the repository holds none at all"
        raise NoRecoveryPoint(
            f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no recovery point",
            hint=f"`backupd backup {' '.join(without)}` makes one; {have}",
        )


def _too_early(at: datetime, late: list[Window], wanted: list[Window]) -> NoRecoveryPoint:
    said = "; ".join(
        f"{w.source} can be restored from {format_instant(w.first)} to {format_instant(w.last)}" for w in late
    )
    earliest = max(w.first for w in wanted)
    return NoRecoveryPoint(
        f"{format_instant(at)} is before the first recovery point: {said}",
        hint=f"the earliest for all that was asked for is --at {format_instant(earliest)}",
    )


def _refuse_skew(plan: RestorePlan, max_skew: timedelta) -> None:
    far = [step for step in plan.steps if step.skew > max_skew]
    if far:
        said = "; ".join(f"{s.source} lands at {format_instant(s.lands_at)}, {s.skew} before" for s in far)
        raise NoRecoveryPoint(
            f"no point is near enough to {format_instant(plan.at)}: {said}",
            hint=f"allow more than {max_skew}, or ask for --at {format_instant(plan.effective)}",
        )


# --- instants as people write them ----------------------------------------------------------------

_UNITS = {
    "second": 1, "sec": 1, "s": 1, "minute": 60, "min": 60, "m": 60, "hour": 3600, "hr": 3600, "h": 3600,
    "day": 86400, "d": 86400, "week": 604800, "w": 604800,
}  # fmt: skip
_AGO = re.compile(r"((?:\d+(?:\.\d+)?\s*[a-z]+[\s,]*(?:and\s+)?)+)ago")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")
_DAY = re.compile(r"(today|yesterday)(?:[\s,]+(?:at\s+)?(\d{1,2}:\d{2}(?::\d{2})?))?")
_EXAMPLES = 'write "2026-03-01T14:30:00Z", "2026-03-01 14:30" (configured zone), "2 hours ago" or "latest"'


def format_instant(instant: datetime) -> str:
    """RFC 3339 in UTC, to the microsecond where it has any: what is shown can be handed back to `--at`. Cut
    to the second it would name an instant just before the point, and the one before would be restored."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_at(text: str, *, now: datetime, timezone: tzinfo) -> datetime:
    """An instant in UTC from RFC 3339, `latest`, `now`, `2 hours ago`, `yesterday 14:30`, or a time without a
    zone, which is one of `timezone`.

    Raises UsageError for nonsense, for the future, and for a time that the zone's clock change skipped or
    showed twice: which one was meant is not ours to guess.
    """
    plain = " ".join(text.strip().lower().split())
    if plain == "latest":
        return LATEST
    if plain == "now":
        return now.astimezone(UTC)
    try:
        instant = _parse_words(plain, now, timezone) or _parse_time(text.strip(), timezone)
    except OverflowError:
        raise UsageError(f"{text!r} is out of all time", hint=_EXAMPLES) from None
    if instant > now + _AHEAD:
        raise UsageError(
            f"{format_instant(instant)} is in the future; it is {format_instant(now)} now",
            hint='for the newest recovery points write "latest"',
        )
    return instant


def _parse_words(plain: str, now: datetime, zone: tzinfo) -> datetime | None:
    if match := _AGO.fullmatch(plain):
        seconds = 0.0
        for number, word in _PART.findall(match[1]):
            unit = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
            if unit is None:
                raise UsageError(
                    f"{word!r} is no unit of time", hint="seconds, minutes, hours, days or weeks"
                )
            seconds += float(number) * unit
        return (now - timedelta(seconds=seconds)).astimezone(UTC)
    if match := _DAY.fullmatch(plain):
        day = now.astimezone(zone).date() - timedelta(days=match[1] == "yesterday")
        return _parse_time(f"{day} {(match[2] or '00:00').zfill(5)}", zone)
    return None


def _parse_time(text: str, zone: tzinfo) -> datetime:
    try:
        written = datetime.fromisoformat(re.sub(r"\s+(?=[+-]\d|[zZ]$)", "", text))
    except ValueError:
        raise UsageError(f"{text!r} is not a time", hint=_EXAMPLES) from None
    if written.tzinfo is not None:
        return written.astimezone(UTC)
    return _in_zone(written, zone)


def _in_zone(naive: datetime, zone: tzinfo) -> datetime:
    """Where a clock change makes the time ambiguous, the two readings differ between fold 0 and 1."""
    first = naive.replace(tzinfo=zone, fold=0)
    second = naive.replace(tzinfo=zone, fold=1)
    early, late = first.astimezone(UTC), second.astimezone(UTC)
    if early.astimezone(zone).replace(tzinfo=None, fold=0) != naive.replace(fold=0):
        raise UsageError(
            f"there was no {naive} in {zone}: the clock was put forward over it",
            hint=f"write {late.astimezone(zone).isoformat()} or {early.astimezone(zone).isoformat()}",
        )
    if early != late:
        raise UsageError(
            f"{naive} was twice in {zone}: the clock was put back",
            hint=f"write {first.isoformat()} for the first or {second.isoformat()} for the second",
        )
    return early
