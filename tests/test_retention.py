"""Retention: which points stay. The promises first, then restic's rules one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.model import PointKind, RecoveryPoint
from backupd.retention import Policy, Verdict, decide

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
_numbers = itertools.count()


def point(
    instant: datetime, source: str = "orders", kind: PointKind = PointKind.FULL, id: str = ""
) -> RecoveryPoint:
    return RecoveryPoint(
        id or f"{next(_numbers):012x}", source, "postgres", kind, instant, instant, instant, 1, 1, 1
    )


def daily(days: int, *, until: datetime = NOW) -> list[RecoveryPoint]:
    return [point(until - timedelta(days=n, hours=1)) for n in reversed(range(days))]


def kept(verdicts: Sequence[Verdict]) -> list[RecoveryPoint]:
    return [v.point for v in verdicts if v.keep]


policies = st.builds(
    Policy,
    **{rule: st.integers(-1, 5) for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly")},
    within=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=60)),
    pitr=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=60)),
    timezone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "Pacific/Apia"]),
)
instants = st.datetimes(datetime(2020, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))
histories = st.lists(
    st.builds(point, instants, st.sampled_from(["orders", "sessions"]), st.sampled_from(PointKind)),
    max_size=40,
)


# --- the promises ------------------------------------------------------------------------------------


@given(histories, policies, instants)
def test_every_point_gets_one_verdict_with_a_reason(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """Nothing is forgotten, nothing is unexplained."""
    verdicts = decide(history, policy, now=now)
    assert sorted(v.point.id for v in verdicts) == sorted(p.id for p in history)
    assert all(v.reasons for v in verdicts)


@given(histories, policies, instants)
def test_the_newest_point_of_each_source_always_stays(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """Whatever the policy, whatever the clock: no source is ever left without its newest point."""
    stays = {p.id for p in kept(decide(history, policy, now=now))}
    for source in {p.source for p in history}:
        mine = sorted((p for p in history if p.source == source), key=lambda p: (p.instant, p.id))
        assert mine[-1].id in stays


@given(histories, policies, instants)
def test_the_newest_point_before_a_wrong_clock_stays_too(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """A point dated next year does not push out the newest one that is credible."""
    stays = {p.id for p in kept(decide(history, policy, now=now))}
    for source in {p.source for p in history}:
        past = [p for p in history if p.source == source and p.instant <= now]
        if past:
            assert max(past, key=lambda p: (p.instant, p.id)).id in stays


@given(histories, instants)
def test_no_policy_removes_nothing(history: list[RecoveryPoint], now: datetime) -> None:
    """A forgotten [retention] must not be one of zero."""
    assert all(v.keep for v in decide(history, Policy(), now=now))


@given(histories, policies, instants, st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(
    history: list[RecoveryPoint], policy: Policy, now: datetime, random: object
) -> None:
    """Stores list by key, and a key is no time."""
    shuffled = list(history)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(history, policy, now=now) == decide(shuffled, policy, now=now)


@given(histories, policies, instants)
def test_a_source_does_not_weigh_on_another(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """Each is decided as if it were alone."""
    alone = [p for p in history if p.source == "orders"]
    together = [v for v in decide(history, policy, now=now) if v.point.source == "orders"]
    assert together == decide(alone, policy, now=now)


@given(histories, policies, instants)
def test_pruning_twice_removes_nothing_more(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """What was kept is kept again: a prune that runs every hour does not gnaw."""
    once = kept(decide(history, policy, now=now))
    assert kept(decide(once, policy, now=now)) == once


@given(histories, policies, instants)
def test_what_a_kept_log_continues_is_kept(
    history: list[RecoveryPoint], policy: Policy, now: datetime
) -> None:
    """A log without the full point it starts from restores nothing."""
    verdicts = decide(history, policy, now=now)
    for source in {p.source for p in history}:
        mine = [v for v in verdicts if v.point.source == source]
        for n, v in enumerate(mine):
            if v.keep and v.point.kind is PointKind.LOG:
                for before in reversed(mine[:n]):
                    assert before.keep
                    if before.point.kind is PointKind.FULL:
                        break


def test_thirty_days_of_failures_do_not_eat_the_last_good_points() -> None:
    """Backups stop succeeding; prune goes on every night. A rule in days counts back from the newest point."""
    good = daily(20)
    for policy in (Policy(within=timedelta(days=7)), Policy(daily=7), Policy(last=3), Policy(hourly=24)):
        at_first = kept(decide(good, policy, now=NOW))
        left = good
        for night in range(1, 31):
            left = kept(decide(left, policy, now=NOW + timedelta(days=night)))
        assert left == at_first
        assert len(left) >= 3


@pytest.mark.parametrize(
    "wrong", [timedelta(days=-1), timedelta(days=1), timedelta(days=3650), timedelta(days=-3650)]
)
def test_a_clock_that_is_wrong_when_pruning_removes_nothing_more(wrong: timedelta) -> None:
    """A day or ten years off, either way: what stays then holds all that should stay."""
    history = daily(30)
    policy = Policy(last=1, daily=7, weekly=4, within=timedelta(days=3))
    right = {p.id for p in kept(decide(history, policy, now=NOW))}
    assert right <= {p.id for p in kept(decide(history, policy, now=NOW + wrong))}


def test_a_clock_that_was_wrong_when_backing_up_does_not_cost_the_good_points() -> None:
    """A server came up in 2031 and made a point; with `last = 1` that one would be all that stays."""
    history = [*daily(5), point(datetime(2031, 1, 1, tzinfo=UTC))]
    verdicts = decide(history, Policy(last=1), now=NOW)
    assert kept(verdicts) == history[-2:]
    assert "clock" in verdicts[-1].reasons[0]


def test_points_are_ordered_by_time_and_not_by_id() -> None:
    """After an upgrade the server's own numbers begin anew; `keep the newest` must not keep the old ones."""
    old = [point(NOW - timedelta(days=n), id=f"ffff{n:08x}") for n in range(10, 20)]
    new = [point(NOW - timedelta(days=n), id=f"0000{n:08x}") for n in range(1, 4)]
    assert {p.id[:4] for p in kept(decide(old + new, Policy(last=3), now=NOW))} == {"0000"}


# --- the rules, as restic has them -------------------------------------------------------------------


def test_last_keeps_so_many() -> None:
    """Whenever they were made."""
    history = daily(10)
    assert kept(decide(history, Policy(last=3), now=NOW)) == history[-3:]


def test_daily_keeps_the_newest_of_each_day_that_has_one() -> None:
    """Days without a point do not count."""
    history = [
        point(datetime(2026, 11, day, hour, tzinfo=UTC)) for day in (1, 5, 9, 13) for hour in (3, 9, 21)
    ]
    assert [p.instant.strftime("%d %H") for p in kept(decide(history, Policy(daily=3), now=NOW))] == [
        "05 21", "09 21", "13 21",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("hourly", 48), ("daily", 3), ("weekly", 2), ("monthly", 1), ("yearly", 1)],
)
def test_each_rule_counts_its_own_kind_of_time(rule: str, expected: int) -> None:
    """48 hours from a Saturday noon, each half hour: hours, days, weeks, months and years that they touch."""
    start = datetime(2026, 11, 21, 12, tzinfo=UTC)
    history = [point(start + timedelta(minutes=30 * n)) for n in range(96)]
    policy = Policy(**{rule: -1})  # type: ignore[arg-type]
    found = kept(decide(history, policy, now=NOW + timedelta(days=1)))
    # the oldest point stays as well: a rule that has room keeps where the history begins
    assert len(found) - (history[0] in found) == expected
    assert history[0] in found


def test_a_rule_that_has_room_keeps_the_oldest_point() -> None:
    """A month of dailies under `monthly = 12`: the start of the history is a point of its own."""
    history = daily(10)
    verdicts = decide(history, Policy(monthly=12), now=NOW)
    assert kept(verdicts) == [history[0], history[-1]]
    assert verdicts[0].reasons == ("oldest monthly",)


def test_within_counts_from_the_newest_point() -> None:
    """Three days before the newest point, not before now."""
    history = daily(10, until=NOW - timedelta(days=100))
    assert kept(decide(history, Policy(within=timedelta(days=3)), now=NOW)) == history[-4:]


def test_rules_add_up_and_each_says_its_reason() -> None:
    """The union of what the rules keep; never the intersection."""
    history = daily(40)
    verdicts = decide(history, Policy(last=1, daily=3, weekly=2, monthly=2), now=NOW)
    assert verdicts[-1].reasons == ("last", "daily", "weekly", "monthly")
    assert len(kept(verdicts)) == 4  # three days, the Sunday before, the last day of October
    assert next(v.reasons for v in verdicts if not v.keep) == ("no rule keeps it",)


def test_a_day_begins_where_the_policy_says() -> None:
    """Points at 23:30 and 00:30 Berlin time are of two days there, and of one in UTC."""
    zone = ZoneInfo("Europe/Berlin")
    history = [
        point(datetime(2026, 6, 1, 23, 30, tzinfo=zone)),
        point(datetime(2026, 6, 2, 0, 30, tzinfo=zone)),
    ]
    before = [point(datetime(2026, 5, 1, tzinfo=UTC))]
    assert len(kept(decide(before + history, Policy(daily=2), now=NOW))) == 2
    assert kept(decide(before + history, Policy(daily=2, timezone="Europe/Berlin"), now=NOW)) == history
    assert history[0] not in kept(decide(before + history, Policy(daily=2), now=NOW))


def test_the_hour_that_comes_twice_is_two_hours() -> None:
    """At the end of summer time 02:30 is there twice; both are kept."""
    history = [point(datetime(2026, 10, 25, hour, 30, tzinfo=UTC)) for hour in (0, 1)]
    before = point(datetime(2026, 10, 24, tzinfo=UTC))
    policy = Policy(hourly=2, timezone="Europe/Berlin")
    assert kept(decide([before, *history], policy, now=NOW)) == history


def test_a_policy_that_cannot_be_is_refused() -> None:
    """Less than no limit, less than no time."""
    with pytest.raises(ValueError, match="daily"):
        Policy(daily=-2)
    with pytest.raises(ValueError, match="within"):
        Policy(within=timedelta(-1))
