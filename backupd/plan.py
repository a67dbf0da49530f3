"""Which recovery point of each source, and which of its log, reach an instant, and how far from it each lands. Pure.

Never rounded in silence: an instant that cannot be reached is refused with what can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo

from backupd.chain import Chain, chain_of, interval, logs_for, need_of
from backupd.errors import NoRecoveryPoint, UsageError
from backupd.model import Json, LogSpan, PointKind, RecoveryPoint

LATEST = datetime.max.replace(tzinfo=UTC)
"""`--at latest`: the newest point there is, even one a server dated a second ahead of this clock."""

_ROUNDED = timedelta(seconds=1)  # a landing so much earlier than planned is no news
_AHEAD = timedelta(minutes=5)  # a clock this far ahead of ours may still be right


@dataclass(frozen=True, slots=True)
class Step:
    """One source: what is restored, and where it lands."""

    point: RecoveryPoint
    skew: timedelta
    """How much earlier than asked for it lands: what happened to the source in between is lost."""
    logs: tuple[LogSpan, ...] = ()
    """To be replayed on top: each begins where, or before, the one before ended."""
    landing: datetime | None = None
    """Where the log brings it; None: at the point's own instant."""
    whole: bool = False
    """The log is replayed to its very end, behind the last instant that is known of it."""
    asked: datetime | None = None
    """What the log is to be followed to, where it is known that it lands earlier."""

    @property
    def source(self) -> str:
        return self.point.source

    @property
    def lands_at(self) -> datetime:
        return self.landing or self.point.instant

    @property
    def replay_to(self) -> datetime | None:
        """None: to the end of `logs`."""
        return None if self.whole else self.asked or self.lands_at

    def landing_at(self, instant: datetime) -> Step:
        """The same, where it is known now that following the log to what was asked for ends there."""
        early = self.lands_at - instant
        return replace(self, skew=self.skew + early, landing=instant, asked=self.replay_to)

    @property
    def log_stored(self) -> int:
        """Bytes to be read for the log."""
        return sum(span.size for span in self.logs)


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


def landed_early(step: Step, as_of: Json) -> list[str]:
    """What is told where the log could not be followed as far as was planned, but only to this instant."""
    if not isinstance(as_of, str) or step.replay_to is None:
        return []
    early = step.replay_to - datetime.fromisoformat(as_of)
    if early <= _ROUNDED:
        return []
    return [
        f"it is as it was {early.total_seconds():.1f} s before {format_instant(step.replay_to)}: when was done what "
        "came after is not known, as nobody recorded it then"
    ]


# --- what can be restored ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reach:
    """The instants that one point restores: its own, or from there as far as its log goes on."""

    point: RecoveryPoint
    chain: Chain | None
    first: datetime
    last: datetime


@dataclass(frozen=True, slots=True)
class Window:
    """The instants a source can be restored to: separate points for dumps and snapshots, bars where a log is
    continuous."""

    source: str
    reaches: tuple[Reach, ...]
    """Sorted by instant."""
    waiting: tuple[RecoveryPoint, ...] = ()
    """Points that cannot be restored: the log that they need is not there, or not yet."""

    @property
    def points(self) -> tuple[RecoveryPoint, ...]:
        """Sorted by instant."""
        return tuple(reach.point for reach in self.reaches)

    @property
    def first(self) -> datetime:
        return self.reaches[0].first

    @property
    def last(self) -> datetime:
        return max(reach.last for reach in self.reaches)

    @property
    def bars(self) -> tuple[tuple[datetime, datetime], ...]:
        """Where every instant can be had: the union of what the points with a log reach."""
        found: list[tuple[datetime, datetime]] = []
        for reach in self.reaches:
            if reach.chain is None:
                continue
            if found and reach.first <= found[-1][1]:
                found[-1] = found[-1][0], max(found[-1][1], reach.last)
            else:
                found.append((reach.first, reach.last))
        return tuple(found)

    def at(self, instant: datetime) -> Reach | None:
        """What restores this instant: the newest point whose log holds it, or the newest dump before it. None
        where a log ends before it: an older dump would lose what nobody said may be lost."""
        if instant == LATEST:
            return max(self.reaches, key=lambda reach: (reach.last, reach.first), default=None)
        before = [reach for reach in self.reaches if reach.first <= instant]
        held = [reach for reach in before if instant <= reach.last]
        if held:
            return held[-1]
        return before[-1] if before and before[-1].chain is None else None

    def before(self, instant: datetime) -> datetime | None:
        """The last instant, not after this one, that can be asked for."""
        if self.at(instant) is not None:
            return instant
        return max((reach.last for reach in self.reaches if reach.last <= instant), default=None)

    def after(self, instant: datetime) -> datetime | None:
        """The first instant, not before this one, that can be asked for."""
        if self.at(instant) is not None:
            return instant
        return min((reach.first for reach in self.reaches if reach.first >= instant), default=None)


def windows(points: Iterable[RecoveryPoint], logs: Iterable[Chain] = ()) -> dict[str, Window]:
    """The window of each source that has a point that can be restored, or could be with its log."""
    held = list(logs)
    found: dict[str, tuple[list[Reach], list[RecoveryPoint]]] = {}
    for point in sorted(points, key=lambda p: (p.source, p.instant, p.id)):
        if point.kind is not PointKind.FULL:
            continue
        reaches, waiting = found.setdefault(point.source, ([], []))
        if need_of(point) is None:
            reaches.append(Reach(point, None, point.instant, point.instant))
        elif (chain := chain_of(point, held)) is not None:
            reaches.append(Reach(point, chain, *interval(point, chain)))
        else:
            waiting.append(point)
    return {source: Window(source, tuple(r), tuple(w)) for source, (r, w) in found.items()}


def first_of_all(found: Iterable[Window]) -> datetime | None:
    """The first instant that all of them have."""
    held = list(found)
    return _nearest(max(w.first for w in held), held, Window.after)


# --- the plan ---------------------------------------------------------------------------------------


def plan_restore(
    points: Iterable[RecoveryPoint],
    at: datetime,
    sources: Sequence[str],
    *,
    logs: Iterable[Chain] = (),
) -> RestorePlan:
    """For each source its newest point at or before `at`; where a log continues it, that brings it to `at`.

    Raises UsageError where nothing is asked for, NoRecoveryPoint where a source has no point so early, where its
    log ends before `at` or has a hole there: the message says from when to when it can be had.
    """
    if not sources:
        raise UsageError(
            "there is nothing to restore", hint="name a source or a stack; `backupd list` shows them"
        )
    known = windows(points, logs)
    wanted = list(dict.fromkeys(sources))
    _refuse_unknown(known, wanted)
    chosen = {source: known[source].at(at) for source in wanted}
    if refused := [known[source] for source, reach in chosen.items() if reach is None]:
        raise _unreachable(at, refused, [known[source] for source in wanted])
    reaches = [reach for reach in chosen.values() if reach is not None]
    asked = at if at != LATEST else max(reach.last for reach in reaches)
    return RestorePlan(asked, tuple(_step(reach, at, asked) for reach in reaches))


def _step(reach: Reach, at: datetime, asked: datetime) -> Step:
    need = need_of(reach.point)
    if reach.chain is None or need is None:
        return Step(reach.point, asked - reach.first)
    landing = min(at, reach.last)
    return Step(reach.point, asked - landing, logs_for(reach.chain, need, at), landing, whole=at == LATEST)


def plan_point(point: RecoveryPoint, logs: Iterable[Chain] = ()) -> RestorePlan:
    """The plan that restores one point as it is. Raises NoRecoveryPoint where the log that it needs is not there."""
    need, chain = need_of(point), chain_of(point, logs)
    if need is None:
        return RestorePlan(point.instant, (Step(point, timedelta(0)),))
    if chain is None:
        raise _without_log([point])
    spans = logs_for(chain, need, point.instant)
    return RestorePlan(point.instant, (Step(point, timedelta(0), spans, point.instant),))


def _refuse_unknown(known: dict[str, Window], wanted: list[str]) -> None:
    without = [source for source in wanted if source not in known]
    if without:
        have = f"there are points of {', '.join(known)}" if known else "the repository holds none at all"
        raise NoRecoveryPoint(
            f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no recovery point",
            hint=f"`backupd backup {' '.join(without)}` makes one; {have}",
        )
    unrestorable = [
        point for source in wanted if not known[source].reaches for point in known[source].waiting
    ]
    if unrestorable:
        raise _without_log(unrestorable)


def _without_log(points: Sequence[RecoveryPoint]) -> NoRecoveryPoint:
    names = " and ".join(dict.fromkeys(point.source for point in points))
    return NoRecoveryPoint(
        f"no point of {names} can be restored: the log that it needs is not there, or not yet",
        hint="is `backupd serve` at work? it records the log; `backupd verify` names what is missing",
    )


def _unreachable(at: datetime, refused: list[Window], wanted: list[Window]) -> NoRecoveryPoint:
    said = "; ".join(f"{w.source} can be restored {_stretches(w, at)}" for w in refused)
    before, after = _nearest(at, wanted, Window.before), _nearest(at, wanted, Window.after)
    if all(at < w.first for w in refused):
        earliest = (
            f"the earliest for all that was asked for is --at {format_instant(after)}" if after else _NONE
        )
        return NoRecoveryPoint(
            f"{format_instant(at)} is before the first recovery point: {said}", hint=earliest
        )
    late = all(at > w.last for w in refused)
    where = "after the last instant that was recorded" if late else "where the log has a hole"
    near = [f"--at {format_instant(t)} {word}" for t, word in ((before, "before"), (after, "after")) if t]
    return NoRecoveryPoint(
        f"{format_instant(at)} is {where}: {said}",
        hint=f"the nearest that can be had: {', '.join(near)}"
        if near
        else "no instant holds for all of them",
    )


_SHOWN = 4
_NONE = "there is no instant near it that all of them have; restore them one by one"


def _stretches(window: Window, at: datetime) -> str:
    """From when to when, of a window with many holes those nearest to `at`."""
    if not window.bars or any(reach.chain is None for reach in window.reaches):
        return f"from {format_instant(window.first)} to {format_instant(window.last)}"
    near = sorted(window.bars, key=lambda bar: min(abs(bar[0] - at), abs(bar[1] - at)))[:_SHOWN]
    return ", ".join(f"from {format_instant(a)} to {format_instant(b)}" for a, b in sorted(near))


def _nearest(
    at: datetime, wanted: list[Window], move: Callable[[Window, datetime], datetime | None]
) -> datetime | None:
    """The nearest instant that all of them have, in one direction."""
    while True:
        moved = at
        for window in wanted:
            found = move(window, moved)
            if found is None:
                return None
            moved = found
        if moved == at:
            return at
        at = moved


def refuse_skew(plan: RestorePlan, max_skew: timedelta) -> None:
    """Raises NoRecoveryPoint where a source lands more than `max_skew` before the instant asked for."""
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
