"""Which recovery points stay. Pure: data in, verdicts out; nothing here reads, and nothing removes.

The words are restic's (`last`, `hourly`, `daily`, `weekly`, `monthly`, `yearly`, `within`) and so is their
meaning: going back from the newest point, each rule keeps the newest point of each hour, day and so on until
it has kept as many as it may, and `within` counts back from the newest *point*, not from now. A streak of
failures or a clock that jumped therefore never ages the last good copies out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import groupby

from backupd.model import PointKind, RecoveryPoint

ALL = -1
"""As a count: no limit."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep of one source. Every rule adds points; a point goes only when no rule wants it.

    Counts: 0 is off, -1 is no limit. A policy without any rule removes nothing.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta = timedelta(0)
    timezone: str = ""
    """Where a day, a week, a month begins; UTC where it is empty."""

    def __post_init__(self) -> None:
        """Raises ValueError for a count below -1, a negative span, a zone that is none."""
        for rule in RULES:
            if getattr(self, rule) < ALL:
                raise ValueError(f"{rule} must be 0 or more, or -1 for no limit")
        if self.within < timedelta(0):
            raise ValueError("within must not be negative")
        if self.timezone in {"", "UTC"}:
            return
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{self.timezone!r} is not a time zone") from None

    def __bool__(self) -> bool:
        """True when there is at least one rule."""
        return bool(self.within) or any(getattr(self, rule) for rule in RULES)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keep or remove, and why."""

    point: RecoveryPoint
    keep: bool
    reasons: tuple[str, ...]


_BUCKETS: dict[str, Callable[[datetime, int], object]] = {
    "last": lambda _at, position: position,
    # The offset is part of the hour: at the end of summer time two hours carry the same number.
    "hourly": lambda at, _: (at.date(), at.hour, at.utcoffset()),
    "daily": lambda at, _: at.date(),
    "weekly": lambda at, _: at.isocalendar()[:2],
    "monthly": lambda at, _: (at.year, at.month),
    "yearly": lambda at, _: at.year,
}
RULES = tuple(_BUCKETS)


def rules(policy: Policy) -> dict[str, int | timedelta]:
    """The rules of `policy` that are on, by name, in the order people say them."""
    return {
        f.name: getattr(policy, f.name)
        for f in fields(policy)
        if f.name != "timezone" and getattr(policy, f.name)
    }


def decide(points: Sequence[RecoveryPoint], policy: Policy, *, now: datetime) -> list[Verdict]:
    """A verdict on every point, sorted by source and instant; sources never weigh on one another.

    Order is by instant, never by id, server or place. The newest point of each source stays whatever the
    policy says. A point dated after `now` stays and uses up no rule's count: one of the two clocks is wrong,
    and one of next year must not push out good ones. A full point stays while a kept log continues it.
    """
    verdicts: list[Verdict] = []
    ordered = sorted(points, key=lambda p: (p.source, p.instant, p.id))
    for _, group in groupby(ordered, key=lambda p: p.source):
        verdicts += _decide_source(list(group), policy, now)
    return verdicts


def _decide_source(points: list[RecoveryPoint], policy: Policy, now: datetime) -> list[Verdict]:
    if not policy:
        return [Verdict(p, True, ("no policy: nothing is removed",)) for p in points]
    reasons: dict[str, list[str]] = {p.id: [] for p in points}
    for p in points:
        if p.instant > now:
            reasons[p.id].append("dated after now: the clock was or is wrong")
    past = [p for p in reversed(points) if p.instant <= now]
    _apply(past, policy, reasons)
    # Every rule there is keeps the newest point already. No rule that comes later can forget it.
    for newest in (points[-1:], past[:1]):
        for p in newest:
            if not reasons[p.id]:
                reasons[p.id].append("newest of its source")
    _keep_chains(points, reasons)
    return [Verdict(p, bool(reasons[p.id]), tuple(reasons[p.id]) or ("no rule keeps it",)) for p in points]


def _apply(newest_first: list[RecoveryPoint], policy: Policy, reasons: dict[str, list[str]]) -> None:
    from zoneinfo import ZoneInfo

    zone = ZoneInfo(policy.timezone or "UTC")
    for rule, bucket in _BUCKETS.items():
        left, before = getattr(policy, rule), None
        for position, p in enumerate(newest_first):
            if left == 0:
                break
            this = bucket(p.instant.astimezone(zone), position)
            oldest = position == len(newest_first) - 1
            # The oldest point fills a rule that has room left, as in restic: a short history keeps its start.
            if this != before or oldest:
                reasons[p.id].append(rule if this != before else f"oldest {rule}")
                before = this
                left -= left > 0
    if policy.within and newest_first:
        since = newest_first[0].instant - policy.within
        for p in newest_first:
            if p.instant >= since:
                reasons[p.id].append("within")


def _keep_chains(points: list[RecoveryPoint], reasons: dict[str, list[str]]) -> None:
    """A log is worth nothing without what it continues: the pieces before it, down to the full point."""
    needed = False
    for p in reversed(points):
        if needed and not reasons[p.id]:
            reasons[p.id].append("a kept log continues it")
        needed = p.kind is PointKind.LOG and (needed or bool(reasons[p.id]))
