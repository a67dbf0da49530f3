"""What is due when: across daylight saving, after downtime, while the one before is still at work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.catalog import DIED, Catalog
from backupd.errors import CaptureFailed, Interrupted, Locked, StoreError, UsageError
from backupd.model import Run, RunStatus
from backupd.scheduler import Job, Schedule, Scheduler, due_now, loop, overdue

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# --- the schedule ------------------------------------------------------------------------------------------

TRANSITIONS = [  # the local day on which the clocks change
    ("Europe/Berlin", date(2026, 3, 29)),
    ("Europe/Berlin", date(2026, 10, 25)),
    ("US/Pacific", date(2026, 3, 8)),
    ("US/Pacific", date(2026, 11, 1)),
    ("America/Santiago", date(2026, 9, 6)),  # at midnight: the day begins at 01:00
    ("America/Santiago", date(2026, 4, 4)),
]


@pytest.mark.parametrize(("zone", "change"), TRANSITIONS)
@pytest.mark.parametrize("half_hour", range(48))
def test_a_daily_job_runs_once_on_each_local_day_around_a_change_of_the_clocks(
    zone: str, change: date, half_hour: int
) -> None:
    """No day lost and none doubled, as the timer asks for it: fire time after fire time."""
    schedule = Schedule.parse(f"{half_hour % 2 * 30} {half_hour // 2} * * *", zone)
    trigger = loop._trigger_class()(schedule)
    tz = ZoneInfo(zone)
    now = datetime(change.year, change.month, change.day, tzinfo=tz).astimezone(UTC) - 4 * DAY
    end = now + 8 * DAY
    fired: list[datetime] = []
    previous = None
    while (fire := trigger.get_next_fire_time(previous, now)) <= end:
        assert fire > now
        fired.append(fire)
        previous, now = fire, fire + timedelta(milliseconds=3)
    days = [f.astimezone(tz).date() for f in fired]
    assert days == [days[0] + n * DAY for n in range(len(days))]
    assert len(days) in (7, 8, 9) and change in days
    for fire in fired:
        local = fire.astimezone(tz)
        if local.date() != change:
            assert (local.hour, local.minute) == (half_hour // 2, half_hour % 2 * 30)


def test_within_an_hour_that_comes_twice_the_next_time_is_not_one_that_has_passed() -> None:
    """Berlin, 25 October: 02:45 came at 00:45 UTC; at 01:10 UTC the clocks show 02:10 again."""
    schedule = Schedule.parse("45 2 * * *", "Europe/Berlin")
    assert schedule.after(at("2026-10-25T00:10")) == at("2026-10-25T00:45")
    assert schedule.after(at("2026-10-25T01:10")) == at("2026-10-26T01:45")
    assert schedule.previous(at("2026-10-25T01:50")) == at("2026-10-25T00:45")


def test_a_machine_that_slept_for_a_month_fires_once() -> None:
    trigger = loop._trigger_class()(Schedule("* * * * *", "UTC"))
    fire = trigger.get_next_fire_time(at("2026-04-01T00:00"), at("2026-05-01T00:00"))
    assert fire == at("2026-05-01T00:01")


expressions = st.sampled_from(
    ["0 2 * * *", "30 22 * * MON-FRI", "*/15 * * * *", "0 */6 * * *", "15,45 1-3 * * *", "0 0 1 * *",
     "59 23 L * *", "0 3 * * SUN#1", "7 * * * *", "0 0 29 2 *", "* * * * *", "30 2 25-31 3,10 SUN"]
)  # fmt: skip
zones = st.sampled_from(["UTC", "Europe/Berlin", "US/Pacific", "America/Santiago", "Australia/Lord_Howe"])
instants = st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))


@settings(max_examples=150, deadline=None)
@given(expressions, zones, instants)
def test_a_due_time_is_the_same_seen_from_before_and_from_after(text: str, zone: str, now: datetime) -> None:
    schedule = Schedule.parse(text, zone)
    previous, coming = schedule.previous(now), schedule.after(now)
    assert previous is not None
    assert previous <= now < coming
    assert schedule.after(previous) == coming
    assert schedule.previous(coming) == coming
    assert schedule.previous(coming - timedelta(microseconds=1)) == previous


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["0 2 * * *", "*/15 * * * *", "15,45 1-3 * * *", "0 */6 * * *"]),
    zones,
    st.sampled_from([change for _, change in TRANSITIONS]),
    st.integers(0, 3 * 24 * 60),
)
def test_no_due_time_is_jumped_over_near_a_change_of_the_clocks(
    text: str, zone: str, change: date, minutes: int
) -> None:
    """Stepping through the days a quarter of an hour at a time finds what following the due times finds."""
    schedule = Schedule.parse(text, zone)
    begin = datetime(change.year, change.month, change.day, tzinfo=UTC) - DAY + timedelta(minutes=minutes)
    end = begin + 6 * HOUR
    followed, due = set(), schedule.after(begin)
    while due <= end:
        followed.add(due)
        due = schedule.after(due)
    stepped = {schedule.after(begin + n * timedelta(minutes=5)) for n in range(72)}
    assert {d for d in stepped if d <= end} <= followed
    assert followed - stepped == set()


@settings(max_examples=80, deadline=None)
@given(expressions, zones, instants, st.integers(1, 200))
def test_jitter_delays_each_due_time_the_same_after_every_restart_and_swaps_none(
    text: str, zone: str, now: datetime, minutes: int
) -> None:
    schedule = Schedule.parse(text, zone, jitter=timedelta(minutes=minutes), seed="orders")
    due = schedule.after(now)
    fire = schedule.fires(due)
    assert due <= fire < due + timedelta(minutes=minutes)
    assert fire == Schedule.parse(text, zone, jitter=timedelta(minutes=minutes), seed="orders").fires(due)
    assert fire < schedule.after(due)
    assert schedule.fired(fire) == due
    assert schedule.fired(fire - timedelta(microseconds=1)) == schedule.previous(
        due - timedelta(microseconds=1)
    )
    assert schedule.next_fire(fire - timedelta(microseconds=1)) == fire
    assert schedule.next_fire(fire) > fire


def test_sources_with_jitter_do_not_all_start_together() -> None:
    due = at("2026-05-01T02:00")
    fires = {Schedule.parse("0 2 * * *", jitter=HOUR, seed=f"source{n}").fires(due) for n in range(50)}
    assert len(fires) == 50
    assert max(fires) - min(fires) > HOUR / 2


def test_a_daily_time_is_that_of_its_zone() -> None:
    berlin = Schedule.parse("0 2 * * *", "Europe/Berlin")
    assert berlin.after(at("2026-01-10T12:00")) == at("2026-01-11T01:00")
    assert berlin.after(at("2026-07-10T12:00")) == at("2026-07-11T00:00")


def test_weekdays_by_name_are_those_of_the_calendar() -> None:
    friday = Schedule.parse("0 12 * * fri")
    assert friday.after(at("2026-05-01T00:00")) == at("2026-05-01T12:00")  # 1 May 2026 is a Friday
    assert Schedule.parse("0 12 * * 5").after(at("2026-04-30T13:00")) == at("2026-05-01T12:00")
    assert Schedule.parse("0 12 * * 0").after(at("2026-04-30T13:00")) == at("2026-05-03T12:00")


@pytest.mark.parametrize(
    "text",
    ["", "0 2 * *", "61 2 * * *", "0 2 30 2 *", "0 2 * * FREITAG", "daily", "@reboot", "0 2 * * * * *", "a"],
)
def test_a_schedule_that_cannot_be_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Schedule.parse(text)
    assert "0 2 * * *" in raised.value.hint
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "/etc/passwd", "../UTC", "Europe", "CET\0"])
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(UsageError, match="unknown time zone"):
        Schedule.parse("0 2 * * *", zone)


# --- what must be caught up, what is overdue ---------------------------------------------------------------

DAILY = Schedule("0 2 * * *", "UTC")


@pytest.mark.parametrize(
    ("last_ok", "now", "due"),
    [
        ("2026-05-03T02:00", "2026-05-03T12:00", None),
        ("2026-05-03T02:00", "2026-05-04T01:59", None),
        ("2026-05-03T02:00", "2026-05-04T02:00", "2026-05-04T02:00"),
        ("2026-05-03T02:00", "2026-05-04T09:00", "2026-05-04T02:00"),
        ("2026-04-01T02:00", "2026-05-04T09:00", "2026-05-04T02:00"),  # a month away: once, for the last
        ("2026-05-04T01:00", "2026-05-04T09:00", "2026-05-04T02:00"),  # one by hand before it was due
        ("2026-05-04T03:00", "2026-05-04T09:00", None),  # one by hand after it was due
        ("2026-05-09T03:00", "2026-05-04T09:00", None),  # the clock went back
        (None, "2026-05-04T09:00", "2026-05-04T02:00"),
    ],
)
def test_what_is_due_now(last_ok: str | None, now: str, due: str | None) -> None:
    assert due_now(DAILY, at(last_ok) if last_ok else None, at(now)) == (at(due) if due else None)


@given(st.integers(0, 60 * 24 * 400), st.integers(0, 60 * 24 * 400), zones)
def test_what_was_caught_up_is_not_due_again(last: int, now: int, zone: str) -> None:
    schedule = Schedule.parse("30 2 * * *", zone)
    begin = at("2026-01-01T00:00")
    moment = begin + timedelta(minutes=now)
    due = due_now(schedule, begin + timedelta(minutes=last), moment)
    if due is not None:
        assert begin + timedelta(minutes=last) < due <= moment
        assert due_now(schedule, moment, moment) in (None, moment)
        assert due_now(schedule, moment, moment + timedelta(seconds=1)) is None


@pytest.mark.parametrize(
    ("last_ok", "now", "late"),
    [
        ("2026-05-03T02:00", "2026-05-04T07:59", None),  # six hours of tolerance for a daily job
        ("2026-05-03T02:00", "2026-05-04T08:00", "2026-05-04T02:00"),
        ("2026-05-04T02:01", "2026-05-04T20:00", None),
        (None, "2026-05-04T03:00", "2026-05-03T02:00"),
    ],
)
def test_what_is_overdue(last_ok: str | None, now: str, late: str | None) -> None:
    assert overdue(DAILY, at(last_ok) if last_ok else None, at(now)) == (at(late) if late else None)


def test_the_tolerance_follows_the_distance_of_the_due_times() -> None:
    now = at("2026-05-04T03:00")
    assert Schedule.parse("*/5 * * * *").tolerance(now) == timedelta(minutes=10)
    assert Schedule.parse("0 * * * *").tolerance(now) == timedelta(minutes=30)
    assert Schedule.parse("0 3 * * *").tolerance(now) == timedelta(hours=6)
    assert Schedule.parse("0 3 1 * *").tolerance(now) == timedelta(hours=6)


# --- the loop ----------------------------------------------------------------------------------------------


class Clock:
    """The real time, moved to a chosen beginning."""

    def __init__(self, start: str) -> None:
        self.shift = at(start) - datetime.now(UTC)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.shift


def ok(name: str = "backup", source: str = "orders", **fields: object) -> Run:
    now = datetime.now(UTC)
    return Run("own", name, source, RunStatus.OK, now, now, **fields)  # type: ignore[arg-type]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite")
    yield catalog
    catalog.close()


Start = Callable[..., Scheduler]


@pytest.fixture
def start(catalog: Catalog) -> Iterator[Start]:
    """Starts schedulers, and stops them after the test."""
    started: list[Scheduler] = []

    def start(*jobs: Job, now: str = "2026-05-04T09:00", **options: object) -> Scheduler:
        scheduler = Scheduler(jobs, catalog, clock=Clock(now), **options)  # type: ignore[arg-type]
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield start
    for scheduler in started:
        scheduler.stop(grace=0, abandon=5)


def statuses(catalog: Catalog) -> list[str]:
    return [run.status.value for run in reversed(catalog.runs())]


def test_a_job_runs_when_it_is_due_and_is_on_record(catalog: Catalog, start: Start) -> None:
    dues: list[datetime | None] = []

    def work(_stop: threading.Event, due: datetime | None) -> Run:
        dues.append(due)
        return ok(point=f"p{len(dues)}")

    catalog.record(Run("r0", "backup", "orders", RunStatus.OK, datetime.now(UTC) - 2 * timedelta(seconds=1)))
    jobs = Job("backup", "orders", work, Schedule.parse("* * * * * *"))
    start(jobs, now=datetime.now(UTC).replace(tzinfo=None).isoformat())
    until(lambda: len(dues) >= 2)
    until(lambda: len([r for r in catalog.runs() if r.point and r.status is RunStatus.OK]) >= 2)
    run = next(r for r in catalog.runs() if r.point == "p2")
    assert run.due == dues[1] and run.due is not None and run.due.microsecond == 0
    assert run.finished is not None and run.id != "own"


def test_what_was_missed_is_recorded_and_caught_up_once(catalog: Catalog, start: Start) -> None:
    catalog.record(
        Run("r0", "backup", "orders", RunStatus.OK, at("2026-05-01T02:00"), at("2026-05-01T02:05"))
    )
    start(Job("backup", "orders", lambda stop, due: ok(), DAILY))
    until(lambda: statuses(catalog) == ["ok", "missed", "ok"])
    missed, caught_up = catalog.runs()[1], catalog.runs()[0]
    assert missed.due == caught_up.due == at("2026-05-04T02:00")
    assert "not there" in missed.message
    start(Job("backup", "orders", lambda stop, due: ok(), DAILY), now="2026-05-04T09:30")
    assert statuses(catalog) == ["ok", "missed", "ok"]  # a restart does not do it again


def test_a_source_that_was_never_backed_up_is_at_once_and_nothing_was_missed(
    catalog: Catalog, start: Start
) -> None:
    start(Job("backup", "orders", lambda stop, due: ok(), DAILY))
    until(lambda: statuses(catalog) == ["ok"])


def test_a_verify_that_was_never_done_waits_for_its_time_and_is_not_overdue(
    catalog: Catalog, start: Start
) -> None:
    """Only a source without any backup is in danger; a young repository need not be verified at once."""
    job = Job("verify", "", lambda stop, due: ok("verify", ""), Schedule("30 4 * * SUN", "UTC"), eager=False)
    scheduler = start(job, now="2026-05-04T09:00", starting=timedelta())
    assert catalog.runs() == [] and scheduler.health().healthy
    catalog.record(
        Run("r0", "backup", "orders", RunStatus.OK, at("2026-05-04T10:00"))
    )  # its first sign of life
    start(job, now="2026-05-08T09:00")
    assert statuses(catalog) == ["ok"]
    start(job, now="2026-05-11T09:00")  # and was off on Sunday
    until(lambda: statuses(catalog) == ["ok", "ok"])


def test_an_agent_killed_by_its_own_backup_does_not_try_for_ever(catalog: Catalog, start: Start) -> None:
    """Out of memory, restarted, out of memory: after three times it waits for the next due time, overdue."""
    due = at("2026-05-04T02:00")
    for n in range(3):
        began = due + timedelta(minutes=n)
        catalog.record(Run(f"r{n}", "backup", "orders", RunStatus.ABANDONED, began, began, due, message=DIED))
    scheduler = start(
        Job("backup", "orders", lambda stop, due: ok(), DAILY), starting=timedelta(), now="2026-05-04T09:00"
    )
    assert statuses(catalog) == ["abandoned"] * 3
    assert [p["problem"] for p in scheduler.health().problems] == ["overdue"]
    later = start(Job("backup", "orders", lambda stop, due: ok(), DAILY), now="2026-05-05T09:00")
    until(lambda: statuses(catalog)[-1] == "ok")
    assert later.health().healthy


def test_one_that_failed_or_was_stopped_is_tried_at_every_start(catalog: Catalog, start: Start) -> None:
    """Who mends the password and restarts the agent need not wait for tomorrow."""
    due = at("2026-05-04T02:00")
    for n, status in enumerate([RunStatus.FAILED, RunStatus.ABANDONED] * 3):
        began = due + timedelta(minutes=n)
        catalog.record(Run(f"r{n}", "backup", "orders", status, began, began, due))
    start(Job("backup", "orders", lambda stop, due: ok(), DAILY))
    until(lambda: statuses(catalog)[-1] == "ok")


def test_a_run_that_comes_while_the_one_before_is_at_work_is_refused_and_recorded(
    catalog: Catalog, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    release, working = threading.Event(), threading.Semaphore(0)

    def work(_stop: threading.Event, _due: datetime | None) -> Run:
        working.release()
        release.wait(10)
        return ok()

    scheduler = start(Job("backup", "orders", work), Job("backup", "vectors", work))
    assert scheduler.run_now("backup", "orders") is True
    assert working.acquire(timeout=30)
    assert scheduler.run_now("backup", "orders") is False
    assert scheduler.run_now("backup", "vectors") is True  # another source is not kept from its own
    release.set()
    until(lambda: sorted(statuses(catalog)) == ["ok", "ok", "refused"])
    refused = next(run for run in catalog.runs() if run.status is RunStatus.REFUSED)
    assert "still at work" in refused.message and refused.finished is not None
    assert "refused" in caplog.text
    until(lambda: scheduler.run_now("backup", "orders"))


def test_a_due_time_during_a_long_run_is_refused_by_the_timer_too(catalog: Catalog, start: Start) -> None:
    def work(stop: threading.Event, _due: datetime | None) -> Run:
        stop.wait(10)
        raise Interrupted("told to stop")

    now = datetime.now(UTC).replace(tzinfo=None).isoformat()
    scheduler = start(Job("backup", "orders", work, Schedule.parse("* * * * * *")), now=now)
    until(lambda: statuses(catalog).count("refused") >= 2)
    scheduler.stop(grace=0)
    dues = [run.due for run in catalog.runs() if run.status is RunStatus.REFUSED]
    assert len(dues) == len(set(dues)) and None not in dues
    assert "abandoned" in statuses(catalog)


def test_no_more_backups_at_a_time_than_the_repository_is_given(start: Start) -> None:
    most, at_work, lock = 0, 0, threading.Lock()

    def work(_stop: threading.Event, _due: datetime | None) -> Run:
        nonlocal most, at_work
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1
        return ok()

    scheduler = start(*(Job("backup", f"s{n}", work, DAILY) for n in range(8)), parallel=3)
    until(lambda: not scheduler._active)
    assert most == 3


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CaptureFailed("pg_dump ended with 1", hint="look"), "failed", "pg_dump ended with 1; hint: look"),
        (RuntimeError("a bug"), "failed", "RuntimeError: a bug"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (MemoryError(), "failed", "MemoryError: "),
    ],
)  # fmt: skip
def test_no_error_of_a_job_ends_the_loop(
    catalog: Catalog, start: Start, caplog: pytest.LogCaptureFixture,
    error: BaseException, status: str, message: str,
) -> None:  # fmt: skip
    errors = [error]

    def work(_stop: threading.Event, _due: datetime | None) -> Run:
        if errors:
            raise errors.pop()
        return ok()

    scheduler = start(Job("backup", "orders", work), starting=timedelta())
    scheduler.run_now("backup", "orders")
    until(lambda: statuses(catalog) == [status] and not scheduler._active)
    assert catalog.runs()[0].message == message
    assert [r.levelno for r in caplog.records if "failed" in r.message] == [logging.ERROR]
    assert [(p["problem"], p["message"]) for p in scheduler.health().problems] == [("failing", message)]
    assert not scheduler.health().healthy
    assert scheduler.run_now("backup", "orders")
    until(lambda: statuses(catalog) == [status, "ok"])
    assert scheduler.health().healthy


@pytest.mark.parametrize("error", [Locked("held"), StoreError("no answer", transient=True)])
def test_what_met_a_locked_or_absent_repository_has_another_try_soon(
    catalog: Catalog, start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The lease of a killed agent falls free after a minute: its successor must not wait a day for that."""
    monkeypatch.setattr(loop, "_AGAIN_AFTER", (0.05, 0.1))
    errors = [error, error]

    def work(_stop: threading.Event, _due: datetime | None) -> Run:
        if errors:
            raise errors.pop()
        return ok()

    start(Job("backup", "orders", work, DAILY))
    until(lambda: statuses(catalog)[-1:] == ["ok"])
    assert len(catalog.runs()) == 3
    assert {run.due for run in catalog.runs()} == {at("2026-05-04T02:00")}


def test_tries_come_to_an_end_and_what_failed_for_good_has_none(
    catalog: Catalog, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_AGAIN_AFTER", (0.02, 0.02))

    def locked(_stop: threading.Event, _due: datetime | None) -> Run:
        raise Locked("held")

    def refused(_stop: threading.Event, _due: datetime | None) -> Run:
        raise StoreError("access denied")

    start(Job("backup", "a", locked, DAILY), Job("backup", "b", refused, DAILY))
    until(lambda: len(catalog.runs("a")) == 3)
    time.sleep(0.2)
    assert [run.status for run in catalog.runs("a")] == [RunStatus.REFUSED] * 3
    assert [run.status for run in catalog.runs("b")] == [RunStatus.FAILED]


def test_each_failing_job_is_seen_whatever_the_others_do(catalog: Catalog, start: Start) -> None:
    """One good job never hides a bad one: every job of a failing round is named."""

    def fail(_stop: threading.Event, _due: datetime | None) -> Run:
        raise CaptureFailed("no")

    prune = Job("prune", "a", fail, lane="prune")
    jobs = [
        Job("backup", "a", lambda stop, due: ok(), DAILY, then=prune),
        Job("backup", "b", fail, DAILY),
        Job("backup", "c", lambda stop, due: ok(source="c"), DAILY),
    ]
    scheduler = start(*jobs, starting=timedelta())
    until(lambda: len(catalog.runs()) == 4 and not scheduler._active)
    assert {(p["job"], p["source"]) for p in scheduler.health().problems} == {("prune", "a"), ("backup", "b")}


def test_a_prune_follows_a_good_backup_as_a_run_of_its_own_and_no_failed_one(
    catalog: Catalog, start: Start
) -> None:
    outcome: list[Exception] = []

    def work(_stop: threading.Event, _due: datetime | None) -> Run:
        if outcome:
            raise outcome.pop()
        return ok()

    prune = Job("prune", "orders", lambda stop, due: ok("prune"), lane="prune")
    scheduler = start(Job("backup", "orders", work, then=prune))
    scheduler.run_now("backup", "orders")
    until(lambda: not scheduler._active and len(catalog.runs()) == 2)
    assert [run.job for run in catalog.runs()] == ["prune", "backup"]
    outcome.append(CaptureFailed("no"))
    scheduler.run_now("backup", "orders")
    until(lambda: not scheduler._active and len(catalog.runs()) >= 3)
    assert [run.job for run in catalog.runs()] == ["backup", "prune", "backup"]


def test_prunes_go_one_by_one(start: Start) -> None:
    at_work = threading.Lock()
    overlaps = []

    def prune(_stop: threading.Event, _due: datetime | None) -> Run:
        if not at_work.acquire(blocking=False):
            overlaps.append(1)
            return ok("prune")
        time.sleep(0.05)
        at_work.release()
        return ok("prune")

    jobs = [
        Job("backup", f"s{n}", lambda stop, due: ok(), DAILY, then=Job("prune", f"s{n}", prune, lane="prune"))
        for n in range(4)
    ]
    scheduler = start(*jobs, parallel=4)
    until(lambda: not scheduler._active)
    assert overlaps == []


def test_two_jobs_of_one_name_are_refused(catalog: Catalog) -> None:
    job = Job("backup", "orders", lambda stop, due: ok())
    with pytest.raises(UsageError):
        Scheduler([job, job], catalog, clock=Clock("2026-05-04T09:00"))


# --- stopping ----------------------------------------------------------------------------------------------


def test_stopping_lets_the_work_at_hand_finish_and_starts_nothing_more(
    catalog: Catalog, start: Start
) -> None:
    working, second = threading.Event(), []

    def slow(_stop: threading.Event, _due: datetime | None) -> Run:
        working.set()
        time.sleep(0.3)
        return ok()

    then = Job("prune", "a", lambda stop, due: second.append(1) or ok("prune"), lane="prune")  # type: ignore[func-returns-value]
    waiting = Job("backup", "b", lambda stop, due: second.append(1) or ok(), DAILY)  # type: ignore[func-returns-value]
    scheduler = start(Job("backup", "a", slow, DAILY, then=then), waiting, parallel=1)
    assert working.wait(30)
    assert scheduler.stop(grace=5) is True
    assert statuses(catalog) == ["ok"]
    assert second == []
    assert scheduler.health().status == "stopping" and not scheduler.health().healthy
    assert scheduler.run_now("backup", "b") is False


def test_work_that_outlasts_the_grace_is_told_to_stop_and_is_abandoned(
    catalog: Catalog, start: Start
) -> None:
    working = threading.Event()

    def work(stop: threading.Event, _due: datetime | None) -> Run:
        working.set()
        assert stop.wait(10)
        raise Interrupted("told to stop")

    scheduler = start(Job("backup", "a", work, DAILY))
    assert working.wait(30)
    began = time.monotonic()
    assert scheduler.stop(grace=0.2) is True
    assert 0.2 <= time.monotonic() - began < 9  # of the ten that the work would have waited
    assert [(run.status.value, run.message) for run in catalog.runs()] == [("abandoned", "told to stop")]


def test_work_that_does_not_listen_is_cut_off_and_on_record(catalog: Catalog, start: Start) -> None:
    working, release = threading.Event(), threading.Event()

    def deaf(_stop: threading.Event, _due: datetime | None) -> Run:
        working.set()
        release.wait(20)
        return ok()

    scheduler = start(Job("backup", "a", deaf, DAILY))
    assert working.wait(30)
    assert scheduler.stop(grace=0, abandon=0.2) is False
    run = catalog.runs()[0]
    assert (run.status, run.due) == (RunStatus.ABANDONED, at("2026-05-04T02:00"))
    assert "cut off" in run.message
    release.set()


# --- health ------------------------------------------------------------------------------------------------


def test_an_overdue_source_is_a_problem_once_the_start_is_over(catalog: Catalog) -> None:
    catalog.record(
        Run("r0", "backup", "orders", RunStatus.OK, at("2026-05-02T02:00"), at("2026-05-02T02:05"))
    )
    job = Job("backup", "orders", lambda stop, due: ok(), DAILY)
    fresh = Scheduler([job], catalog, clock=Clock("2026-05-04T09:00"), starting=timedelta(minutes=2))
    assert (fresh.health().status, fresh.health().healthy) == ("starting", True)
    assert len(fresh.health().problems) == 1
    settled = Scheduler([job], catalog, clock=Clock("2026-05-04T09:00"), starting=timedelta())
    health = settled.health()
    assert (health.status, health.healthy, health.alive) == ("failing", False, True)
    problem = health.problems[0]
    assert (problem["problem"], problem["source"]) == ("overdue", "orders")
    assert "2026-05-04T02:00" in str(problem["message"]) and "2026-05-02T02:00" in str(problem["message"])


def test_what_fails_just_after_the_start_counts_at_once(catalog: Catalog, start: Start) -> None:
    def fail(_stop: threading.Event, _due: datetime | None) -> Run:
        raise CaptureFailed("no")

    scheduler = start(Job("backup", "orders", fail, DAILY), starting=timedelta(minutes=2))
    until(lambda: statuses(catalog) == ["failed"] and not scheduler._active)
    assert (scheduler.health().status, scheduler.health().healthy) == ("failing", False)


def test_a_source_that_is_just_being_caught_up_is_not_called_overdue_until_that_takes_too_long(
    catalog: Catalog, start: Start
) -> None:
    """Else an orchestrator that restarts what is unhealthy would end every catch-up."""

    def work(stop: threading.Event, _due: datetime | None) -> Run:
        stop.wait(10)
        raise Interrupted("told to stop")

    scheduler = start(Job("backup", "orders", work, DAILY), starting=timedelta())
    assert scheduler.health().healthy
    scheduler._clock = Clock("2026-05-04T15:01")  # six hours later it is still at work
    assert [p["problem"] for p in scheduler.health().problems] == ["overdue"]


def test_a_loop_that_does_not_tick_is_not_alive(catalog: Catalog) -> None:
    scheduler = Scheduler([], catalog, clock=Clock("2026-05-04T09:00"))
    scheduler._ticked = time.monotonic() - 61
    health = scheduler.health()
    assert (health.alive, health.healthy) == (False, False)
    assert [p["problem"] for p in health.problems] == ["stuck"]


def test_status_tells_what_is_next_and_what_was_last(catalog: Catalog) -> None:
    catalog.record(Run("r1", "backup", "orders", RunStatus.FAILED, at("2026-05-04T02:00"), message="no room"))
    schedule = Schedule.parse("0 2 * * *", "Europe/Berlin")
    scheduler = Scheduler(
        [Job("backup", "orders", lambda stop, due: ok(), schedule)], catalog, clock=Clock("2026-05-04T09:00")
    )
    jobs = scheduler.status()["jobs"]
    assert isinstance(jobs, list) and len(jobs) == 1
    job = jobs[0]
    assert isinstance(job, dict)
    assert job["next"] == "2026-05-05T00:00:00+00:00"
    assert job["last"]["message"] == "no room"  # type: ignore[index, call-overload]
    assert job["last_ok"] is None and job["doing"] is None
