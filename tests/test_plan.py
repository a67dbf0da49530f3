"""The restore plan: what lands where, what is refused and how; and instants as people write them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.chain import chains, cover, need_of
from backupd.errors import NoRecoveryPoint, UsageError
from backupd.model import Anchor, Json, LogMark, LogSpan, PointKind, RecoveryPoint
from backupd.plan import (
    LATEST,
    format_instant,
    landed_early,
    parse_at,
    plan_point,
    plan_restore,
    refuse_skew,
    windows,
)

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")
_numbers = itertools.count()


def point(
    source: str, instant: datetime, *, kind: PointKind = PointKind.FULL, size: int = 10
) -> RecoveryPoint:
    return RecoveryPoint(
        f"{next(_numbers):012x}", source, "volume", kind, instant, instant, instant, size, 1, 1
    )


def at(hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 11, 22, hour, minute, second, tzinfo=UTC)


# --- what lands where --------------------------------------------------------------------------------


def test_each_source_lands_on_its_newest_point_before_the_instant() -> None:
    """And the plan says how much earlier that is."""
    points = [point("a", at(1)), point("a", at(3)), point("a", at(5)), point("b", at(2, 30), size=7)]
    plan = plan_restore(points, at(4), ["a", "b"])
    assert [(s.source, s.lands_at, s.skew) for s in plan.steps] == [
        ("a", at(3), timedelta(hours=1)),
        ("b", at(2, 30), timedelta(hours=1, minutes=30)),
    ]
    assert (plan.size, plan.effective, plan.spread) == (17, at(2, 30), timedelta(minutes=30))


def test_a_point_at_the_very_instant_is_taken() -> None:
    """What `list` shows can be handed back."""
    assert plan_restore([point("a", at(3))], at(3), ["a"]).steps[0].skew == timedelta(0)


def test_latest_is_the_newest_point_even_if_a_server_dated_it_ahead_of_us() -> None:
    """Its skew counts from the newest instant reached."""
    points = [point("a", NOW + timedelta(seconds=2)), point("b", NOW - timedelta(seconds=8))]
    plan = plan_restore(points, LATEST, ["a", "b"])
    assert plan.at == NOW + timedelta(seconds=2)
    assert [s.skew.total_seconds() for s in plan.steps] == [0, 10]


instants = st.datetimes(datetime(2026, 1, 1), datetime(2026, 2, 1), timezones=st.just(UTC))
histories = st.lists(st.builds(point, st.sampled_from("abc"), instants), max_size=30)


@given(histories, instants, st.lists(st.sampled_from("abc"), max_size=4))
def test_a_plan_never_lands_after_the_instant_and_never_leaves_a_source_out(
    points: list[RecoveryPoint], instant: datetime, sources: list[str]
) -> None:
    """Every source asked for is in it, at its newest point not after the instant; or the plan is refused."""
    try:
        plan = plan_restore(points, instant, sources)
    except UsageError:
        assert not sources
        return
    except NoRecoveryPoint:
        assert any(not [p for p in points if p.source == s and p.instant <= instant] for s in sources)
        return
    assert {s.source for s in plan.steps} == set(sources)
    for step in plan.steps:
        assert step.lands_at <= instant
        assert not [p for p in points if p.source == step.source and step.lands_at < p.instant <= instant]


# --- what is refused ---------------------------------------------------------------------------------


def test_an_instant_before_the_first_point_is_refused_with_the_window() -> None:
    """And with the earliest instant that would do for all."""
    points = [point("a", at(1)), point("b", at(5)), point("b", at(9))]
    with pytest.raises(NoRecoveryPoint) as raised:
        plan_restore(points, at(3), ["a", "b"])
    assert "b can be restored from 2026-11-22T05:00:00Z to 2026-11-22T09:00:00Z" in raised.value.message
    assert "--at 2026-11-22T05:00:00Z" in raised.value.hint
    assert raised.value.exit_code == 21


def test_a_source_without_any_point_is_refused_by_name() -> None:
    """Never left out in silence."""
    with pytest.raises(NoRecoveryPoint, match="b has no recovery point"):
        plan_restore([point("a", at(1))], at(3), ["a", "b"])


def test_nothing_asked_for_is_refused() -> None:
    """Restored: nothing, success: no."""
    with pytest.raises(UsageError):
        plan_restore([point("a", at(1))], at(3), [])


def test_a_log_alone_restores_nothing() -> None:
    """It continues a full point that is not there."""
    with pytest.raises(NoRecoveryPoint):
        plan_restore([point("a", at(1), kind=PointKind.LOG)], at(3), ["a"])


def test_more_skew_than_allowed_is_refused() -> None:
    """Naming who lands too early."""
    points = [point("a", at(3)), point("b", at(1))]
    plan = plan_restore(points, at(3), ["a", "b"])
    refuse_skew(plan, timedelta(hours=2))
    with pytest.raises(NoRecoveryPoint, match="b lands at 2026-11-22T01:00:00Z"):
        refuse_skew(plan, timedelta(hours=1))


def test_one_point_is_a_plan() -> None:
    """At its own instant."""
    p = point("a", at(1))
    assert plan_point(p).at == at(1)


def test_the_window_of_a_source_is_its_points() -> None:
    """By source, sorted by time."""
    found = windows([point("b", at(2)), point("a", at(9)), point("a", at(1))])
    assert [(w.source, w.first, w.last) for w in found.values()] == [("a", at(1), at(9)), ("b", at(2), at(2))]


# --- instants as people write them -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-03-01T14:30:00Z", datetime(2026, 3, 1, 14, 30, tzinfo=UTC)),
        ("2026-03-01T14:30:00.250+02:00", datetime(2026, 3, 1, 12, 30, 0, 250000, tzinfo=UTC)),
        ("2026-03-01 14:30 Z", datetime(2026, 3, 1, 14, 30, tzinfo=UTC)),
        ("2026-03-01 14:30", datetime(2026, 3, 1, 13, 30, tzinfo=UTC)),
        ("2026-07-01 14:30", datetime(2026, 7, 1, 12, 30, tzinfo=UTC)),
        ("2026-03-01", datetime(2026, 2, 28, 23, tzinfo=UTC)),
        ("2 hours ago", NOW - timedelta(hours=2)),
        ("90m ago", NOW - timedelta(minutes=90)),
        ("1 day and 2 hours ago", NOW - timedelta(hours=26)),
        ("yesterday 14:30", datetime(2026, 11, 22, 13, 30, tzinfo=UTC)),
        ("today 9:05", datetime(2026, 11, 23, 8, 5, tzinfo=UTC)),
        ("now", NOW),
        ("latest", LATEST),
        ("  LATEST ", LATEST),
        ("2026-10-25T02:30+01:00", datetime(2026, 10, 25, 1, 30, tzinfo=UTC)),
    ],
)
def test_an_instant_is_read_as_it_is_meant(text: str, instant: datetime) -> None:
    """A time without a zone is one of the configured zone, in summer as in winter."""
    assert parse_at(text, now=NOW, timezone=BERLIN) == instant


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2026", "14:30", "2026-13-01", "2026-02-30", "3 moons ago", "ago", "99999999999 weeks ago",
     "0001-01-01", "2026-03-01T25:00", "last tuesday", "-1 hours ago", "2 hours", "2 hours ago ago"],
)  # fmt: skip
def test_nonsense_is_refused_with_examples(text: str) -> None:
    """One line, a hint, exit code 2."""
    with pytest.raises(UsageError) as raised:
        parse_at(text, now=NOW, timezone=BERLIN)
    assert raised.value.hint
    assert "\n" not in raised.value.message


def test_the_future_is_refused() -> None:
    """An unreachable target must not quietly become the newest point."""
    with pytest.raises(UsageError, match="in the future"):
        parse_at("2027-01-01", now=NOW, timezone=UTC)


def test_a_time_that_the_clock_skipped_is_refused_with_its_neighbours() -> None:
    """There was no 02:30 in Berlin on 29 March 2026."""
    with pytest.raises(UsageError, match="there was no") as raised:
        parse_at("2026-03-29 02:30", now=NOW, timezone=BERLIN)
    assert "2026-03-29T01:30:00+01:00 or 2026-03-29T03:30:00+02:00" in raised.value.hint


def test_a_time_that_was_twice_is_refused_with_both_readings() -> None:
    """Which 02:30 was meant on 25 October 2026 is not ours to guess."""
    with pytest.raises(UsageError, match="twice") as raised:
        parse_at("2026-10-25 02:30", now=NOW, timezone=BERLIN)
    for reading in ("2026-10-25T02:30:00+02:00", "2026-10-25T02:30:00+01:00"):
        assert reading in raised.value.hint
        assert parse_at(reading, now=NOW, timezone=BERLIN)


@given(st.datetimes(datetime(1990, 1, 1), datetime(2026, 11, 1), timezones=st.just(UTC)))
def test_what_is_shown_can_be_handed_back(instant: datetime) -> None:
    """To the microsecond: cut to the second it would miss the point it was copied from."""
    assert parse_at(format_instant(instant), now=NOW, timezone=BERLIN) == instant


@given(
    st.datetimes(datetime(1990, 1, 1), datetime(2026, 11, 1)),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "Pacific/Apia"]),
)
def test_a_time_of_a_zone_is_that_time_there_or_refused(naive: datetime, zone: str) -> None:
    """Never another time of day than the one written."""
    try:
        instant = parse_at(naive.isoformat(), now=NOW, timezone=ZoneInfo(zone))
    except UsageError as error:
        assert "clock" in error.message
        return
    assert instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None, fold=0) == naive


@given(st.text(max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever is written after --at, the answer is an instant or a UsageError."""
    try:
        assert parse_at(text, now=NOW, timezone=BERLIN).tzinfo is UTC
    except UsageError as error:
        assert error.hint


# --- sources with a log ------------------------------------------------------------------------------


def based(source: str, instant: datetime, start: int, end: int, epoch: str = "e") -> RecoveryPoint:
    attributes: dict[str, Json] = {"epoch": epoch, "start": start, "end": end}
    return replace(point(source, instant), attributes=attributes)


def span(start: int, end: int, until: datetime | None, epoch: str = "e", source: str = "a") -> LogSpan:
    return LogSpan(source, epoch, start, end, Anchor(until, end) if until else None, 1)


def test_a_log_brings_its_base_to_the_very_instant() -> None:
    logs = chains([span(0, 10, at(1)), span(10, 20, at(3)), span(20, 30, at(5))])
    plan = plan_restore([based("a", at(1), 2, 8), point("b", at(2))], at(2), ["a", "b"], logs=logs)
    a, b = plan.steps
    assert (a.lands_at, a.replay_to, a.skew) == (at(2), at(2), timedelta(0))
    assert [s.start for s in a.logs] == [0, 10]
    assert (b.lands_at, b.logs, plan.spread) == (at(2), (), timedelta(0))


def test_anchors_alone_go_along_with_a_log() -> None:
    """Where a span ends, the oldest and the newest: they say from when until when nothing more was done."""
    spans = [span(0, 100, at(2)), *(span(100, 100, at(hour)) for hour in (3, 4, 5)), span(100, 150, at(9))]
    (step,) = plan_restore([based("a", at(1), 10, 20)], at(4), ["a"], logs=chains(spans[:4])).steps
    assert step.logs == (spans[0], spans[1], spans[3])
    (step,) = plan_restore([based("a", at(1), 10, 20)], at(4), ["a"], logs=chains(spans)).steps
    assert step.logs == (spans[0], spans[1], spans[3], spans[4])
    (early,) = plan_restore([based("a", at(1), 10, 20)], at(1), ["a"], logs=chains(spans)).steps
    assert early.logs == (spans[0],)


def test_a_landing_earlier_than_planned_is_told() -> None:
    """Where the restored server says so itself, and by more than is rounded away."""
    found = chains([span(0, 100, at(2)), span(100, 200, at(4))])
    (step,) = plan_restore([based("a", at(1), 10, 20)], at(3), ["a"], logs=found).steps
    for as_of in (None, at(3).isoformat(), (at(3) - timedelta(seconds=0.9)).isoformat()):
        assert landed_early(step, as_of) == []
    (told,) = landed_early(step, at(2).isoformat())
    assert "3600.0 s before" in told
    (whole,) = plan_restore([based("a", at(1), 10, 20)], LATEST, ["a"], logs=found).steps
    assert landed_early(whole, at(2).isoformat()) == []


def test_a_landing_that_is_known_before_counts_as_skew_and_is_followed_to_all_the_same() -> None:
    """Where the log has no times of its own, the restore ends at an anchor; it is asked for the instant itself."""
    found = chains([span(0, 100, at(2)), span(100, 200, at(4))])
    plan = plan_restore([based("a", at(1), 10, 20)], at(3), ["a"], logs=found)
    known = replace(plan, steps=tuple(step.landing_at(at(2)) for step in plan.steps))
    (step,) = known.steps
    assert (step.lands_at, step.replay_to, step.skew) == (at(2), at(3), timedelta(hours=1))
    assert known.effective == at(2)
    refuse_skew(plan, timedelta(0))
    with pytest.raises(NoRecoveryPoint, match="a lands at"):
        refuse_skew(known, timedelta(minutes=59))
    assert step.landing_at(at(2)) == step


def test_a_little_more_of_the_log_is_replayed_from_than_the_anchors_ask_for() -> None:
    """A commit takes its time before it is written: it may lie behind the anchor."""
    logs = chains([span(0, 10, at(1)), span(10, 20, at(3)), span(20, 30, at(3, 0, 1)), span(30, 40, at(5))])
    plan = plan_restore([based("a", at(1), 0, 10)], at(3), ["a"], logs=logs)
    assert [s.end for s in plan.steps[0].logs] == [10, 20, 30]


def test_a_window_is_cut_at_holes_gaps_and_epochs() -> None:
    spans = [
        span(0, 10, at(1)),
        span(10, 20, at(2)),
        span(20, 30, at(4)),
        span(50, 60, at(8)),
        span(0, 9, at(11), "f"),
    ]
    points = [
        based("a", at(1), 0, 10),
        based("a", at(3), 20, 25),
        based("a", at(7), 50, 55),
        based("a", at(10), 1, 9, "f"),
    ]
    found = windows(points, chains(spans, [LogMark("a", "e", 20)]))["a"]
    assert found.bars == ((at(1), at(2)), (at(3), at(4)), (at(7), at(8)), (at(10), at(11)))
    for hour in (2, 3, 4, 7, 8, 10, 11):
        assert found.at(at(hour))
    for hour in (0, 5, 6, 9, 12):
        assert found.at(at(hour)) is None
    assert (found.before(at(6)), found.after(at(6)), found.after(at(12))) == (at(4), at(7), None)


def test_bars_of_bases_that_share_a_log_are_one() -> None:
    logs = chains([span(0, 10, at(1)), span(10, 30, at(9))])
    points = [based("a", at(1), 0, 5), based("a", at(5), 12, 20)]
    assert windows(points, logs)["a"].bars == ((at(1), at(9)),)
    assert plan_restore(points, at(4), ["a"], logs=logs).steps[0].point is points[0]
    assert plan_restore(points, at(6), ["a"], logs=logs).steps[0].point is points[1]


def test_behind_the_end_of_a_log_no_older_dump_is_taken_instead() -> None:
    """It would lose hours that nobody said may be lost."""
    points = [point("a", at(1)), based("a", at(3), 0, 5)]
    logs = chains([span(0, 10, at(4))])
    assert plan_restore(points, at(2), ["a"], logs=logs).steps[0].lands_at == at(1)
    with pytest.raises(NoRecoveryPoint, match="after the last instant"):
        plan_restore(points, at(5), ["a"], logs=logs)
    assert plan_restore([*points, point("a", at(5))], at(6), ["a"], logs=logs).steps[0].lands_at == at(5)


def test_a_hole_of_one_source_is_refused_with_instants_that_hold_for_all() -> None:
    spans = [
        span(0, 10, at(4)),
        span(20, 30, at(9)),
        span(0, 10, at(3), source="b"),
        span(20, 30, at(12), source="b"),
    ]
    points = [
        based("a", at(1), 0, 5),
        based("a", at(8), 20, 25),
        based("b", at(1), 0, 5),
        based("b", at(6), 20, 25),
    ]
    with pytest.raises(NoRecoveryPoint, match="hole") as raised:
        plan_restore(points, at(5), ["a", "b"], logs=chains(spans))
    assert "--at 2026-11-22T03:00:00Z before, --at 2026-11-22T08:00:00Z after" in raised.value.hint


spans = st.builds(
    lambda start, length, hour: span(start, start + length, at(hour)),
    st.integers(0, 40), st.integers(0, 15), st.integers(0, 23),
)  # fmt: skip


@given(st.lists(spans, max_size=25), st.sets(st.integers(0, 50), max_size=3))
def test_chains_hold_every_span_once_and_a_cover_has_no_hole(held: list[LogSpan], cuts: set[int]) -> None:
    """Whatever overlaps or lies in one another; and no two chains of an epoch touch but at a cut."""
    found = chains(held, [LogMark("a", "e", cut) for cut in cuts])
    assert sorted(s.start for c in found for s in c.spans) == sorted(s.start for s in held)
    for one, other in itertools.pairwise(found):
        assert one.end < other.start or (one.end == other.start and one.end in cuts)
    for chain in found:
        position = chain.start
        for piece in cover(chain.spans, chain.start):
            assert piece.start <= position < piece.end
            position = piece.end
        assert position == chain.end


@given(
    st.lists(spans, max_size=15),
    st.lists(st.builds(lambda hour, start, length: based("a", at(hour), start, start + length),
                       st.integers(0, 23), st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(0, 23),
)  # fmt: skip
def test_a_plan_with_a_log_lands_on_the_instant_or_is_refused(
    held: list[LogSpan], bases: list[RecoveryPoint], hour: int
) -> None:
    """Never earlier, never with a hole in what is replayed; and what a refusal names is not refused."""
    logs = chains(held)
    window = windows(bases, logs)["a"]
    try:
        plan = plan_restore(bases, at(hour), ["a"], logs=logs)
    except NoRecoveryPoint:
        assert window.at(at(hour)) is None
        for nearest in (window.before(at(hour)), window.after(at(hour))):
            assert nearest is None or plan_restore(bases, nearest, ["a"], logs=logs).at == nearest
        return
    (step,) = plan.steps
    need = need_of(step.point)
    assert need
    assert step.lands_at == at(hour) >= step.point.instant
    position = need.start
    for piece in step.logs:
        assert piece.start <= position <= piece.end
        position = piece.end
    assert position >= need.end
