"""Which recovery points stay. Pure: data in, verdicts out; nothing here reads, and nothing removes.

The words are restic's (`last`, `hourly`, `daily`, `weekly`, `monthly`, `yearly`, `within`) and so is their
meaning: going back from the newest point, each rule keeps the newest point of each hour, day and so on until
it has kept as many as it may, and `within` counts back from the newest *point*, not from now. A streak of
failures or a clock that jumped therefore never ages the last good copies out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple

from backupd.chain import Chain, chain_of, interval, need_of
from backupd.model import LogSpan, PointKind, RecoveryPoint

ALL = -1
"""As a count: no limit."""
_YOUNG = timedelta(days=1)
"""Log that is younger stays in any case: a point may be under way that needs it."""


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
    pitr: timedelta = timedelta(0)
    """How far back every instant can be restored, of a source whose log is recorded; of others, as `within`. Counted
    from the newest instant that was recorded: an agent that stood still ages nothing out."""
    timezone: str = ""
    """Where a day, a week, a month begins; UTC where it is empty."""

    def __post_init__(self) -> None:
        """Raises ValueError for a count below -1, a negative span, a zone that is none."""
        for rule in RULES:
            if getattr(self, rule) < ALL:
                raise ValueError(f"{rule} must be 0 or more, or -1 for no limit")
        for span in ("within", "pitr"):
            if getattr(self, span) < timedelta(0):
                raise ValueError(f"{span} must not be negative")
        if self.timezone in {"", "UTC"}:
            return
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{self.timezone!r} is not a time zone") from None

    def __bool__(self) -> bool:
        """True when there is at least one rule."""
        return bool(self.within or self.pitr) or any(getattr(self, rule) for rule in RULES)


class Verdict(NamedTuple):
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


def decide(
    points: Sequence[RecoveryPoint], policy: Policy, *, now: datetime, logs: Sequence[Chain] = ()
) -> list[Verdict]:
    """A verdict on every point, sorted by source and instant; sources never weigh on one another.

    Order is by instant, never by id, server or place. The newest point of each source stays whatever the
    policy says. A point dated after `now` stays and uses up no rule's count: one of the two clocks is wrong,
    and one of next year must not push out good ones. A full point stays while a kept log continues it, or while the
    window that `pitr` asks for begins with it.
    """
    verdicts: list[Verdict] = []
    ordered = sorted(points, key=lambda p: (p.source, p.instant, p.id))
    for _, group in groupby(ordered, key=lambda p: p.source):
        verdicts += _decide_source(list(group), policy, now, logs)
    return verdicts


def needless(
    kept: Sequence[RecoveryPoint], policy: Policy, logs: Sequence[Chain], *, now: datetime
) -> list[LogSpan]:
    """Of one source, the spans that neither a kept point nor the window needs, and that are older than a day.

    A kept point needs its own part of the log, from its start to where it is consistent; the window, the whole log
    from the start of the point it begins with. Without `pitr` the window begins with the oldest kept point. Without
    any rule or any point nothing is needless.
    """
    if not policy or not kept:
        return []
    horizon = _horizon(kept, policy, logs, now)
    found = []
    for chain in logs:
        ranges = _needed(chain, [p for p in kept if p.source == chain.source], horizon)
        last = None
        for span in reversed(chain.spans):
            last = span.anchor or last  # one without an anchor is older than the next that has one
            old = last is not None and now - last.at > _YOUNG
            if old and not any(start <= span.end and span.start <= end for start, end in ranges):
                found.append(span)
    return sorted(found, key=lambda s: (s.epoch, s.start, s.end))


def _needed(
    chain: Chain, points: Sequence[RecoveryPoint], horizon: datetime | None
) -> list[tuple[int, float]]:
    """Positions, from and to."""
    mine = [(p.instant, need) for p in points if (need := need_of(p)) and chain.holds(need)]
    ranges: list[tuple[int, float]] = [(need.start, need.end) for _, need in mine]
    if horizon is None:
        return [(min(start for start, _ in ranges), math.inf)] if ranges else []
    if chain.reach is None or chain.reach >= horizon:
        before = [found for found in mine if found[0] <= horizon]
        begin = max(before, key=lambda f: f[0]) if before else min(mine, key=lambda f: f[0], default=None)
        if begin:
            ranges.append((begin[1].start, math.inf))
    return ranges


def _horizon(
    points: Sequence[RecoveryPoint], policy: Policy, logs: Sequence[Chain], now: datetime
) -> datetime | None:
    """Where the window that `pitr` asks for begins. A clock that ran ahead does not push it on."""
    if not policy.pitr:
        return None
    reached = [interval(p, chain)[1] for p in points if (chain := chain_of(p, logs))]
    newest = max(reached, default=max((p.instant for p in points), default=now))
    return min(newest, now) - policy.pitr


def _decide_source(
    points: list[RecoveryPoint], policy: Policy, now: datetime, logs: Sequence[Chain]
) -> list[Verdict]:
    if not policy:
        return [Verdict(p, True, ("no policy: nothing is removed",)) for p in points]
    reasons: dict[str, list[str]] = {p.id: [] for p in points}
    for p in points:
        if p.instant > now:
            reasons[p.id].append("dated after now: the clock was or is wrong")
    past = [p for p in reversed(points) if p.instant <= now]
    _apply(past, policy, reasons)
    _keep_window(points, policy, logs, now, reasons)
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


def _keep_window(
    points: list[RecoveryPoint],
    policy: Policy,
    logs: Sequence[Chain],
    now: datetime,
    reasons: dict[str, list[str]],
) -> None:
    """Every point in the window, so that a restore has little to replay; and in each stretch of log that reaches into
    it from before, the point it begins with."""
    horizon = _horizon(points, policy, logs, now)
    if horizon is None:
        return
    begins: dict[tuple[str, int], RecoveryPoint] = {}
    for p in points:
        chain = chain_of(p, logs)
        if p.instant >= horizon:
            reasons[p.id].append("pitr")
        elif chain is not None and interval(p, chain)[1] >= horizon:
            begins[chain.parts[0].epoch, chain.start] = p  # sorted by instant: the newest stays
    for p in begins.values():
        reasons[p.id].append("pitr: the window begins with it")


def _keep_chains(points: list[RecoveryPoint], reasons: dict[str, list[str]]) -> None:
    """A log is worth nothing without what it continues: the pieces before it, down to the full point."""
    needed = False
    for p in reversed(points):
        if needed and not reasons[p.id]:
            reasons[p.id].append("a kept log continues it")
        needed = p.kind is PointKind.LOG and (needed or bool(reasons[p.id]))
