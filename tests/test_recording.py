"""A source whose log is recorded is restored to any instant of its window: base and log, in order, nothing else."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from recording import RECORD, Account, AccountDriver, AccountRecorder

from backupd import backup
from backupd.backup import back_up
from backupd.chain import chains, need_of, needs_base, newest
from backupd.errors import Damaged, NoRecoveryPoint, UsageError
from backupd.logs import LOG_FOLDER, LogWriter, compact_logs
from backupd.logs.piece import encode
from backupd.model import Container, ContainerSpec, LogSpan, RunStatus, Silence
from backupd.plan import LATEST, RestorePlan, plan_point, plan_restore, windows
from backupd.prune import PruneReport, prune
from backupd.repository import Repository, log_key
from backupd.restore import RestoreReport, Work, restore_to_directory, restore_to_sandbox
from backupd.retention import Policy, needless
from backupd.stores import MemoryStore
from backupd.verify import verify

SECOND = timedelta(seconds=1)


@dataclass
class FakeContainer:
    """As much of one as a restore without a service asks for."""

    name: str
    image: str = "account"
    running: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


class FakeSandbox:
    name = "fake"

    def __init__(self) -> None:
        self.made: list[str] = []

    def create(self, source: str, spec: ContainerSpec) -> Container:
        self.made.append(source)
        return cast("Container", FakeContainer(source))

    def wait_ready(self, container: Container, spec: ContainerSpec, **options: object) -> None: ...
    def destroy(self) -> None: ...


class Protected:
    """An account, recorded and backed up when a test says so."""

    def __init__(self) -> None:
        self.account = Account()
        self.driver = AccountDriver(self.account)
        self.repository = Repository.create(MemoryStore(), clock=lambda: self.account.now)
        self.sandbox = FakeSandbox()

    def record(self) -> None:
        """One stretch of recording, up to now."""
        since = newest(self.repository.logs("acc")[0])
        sink = LogWriter(self.repository, "acc")
        stop = threading.Event()
        stop.set()
        AccountRecorder(self.account).record(since, sink, stop)
        sink.close()

    def base(self) -> RunStatus:
        run = back_up("acc", self.driver, self.repository, clock=lambda: self.account.now, progress=Silence(),
                      stop=threading.Event())  # fmt: skip
        return run.status

    def plan(self, at: datetime) -> RestorePlan:
        return plan_restore(self.repository.points(), at, ["acc"], logs=chains(*self.repository.logs("acc")))

    def restore(self, plan: RestorePlan, **target: str) -> RestoreReport:
        work = Work(self.repository, lambda: self.account.now, target=target)
        return restore_to_sandbox(plan, lambda _: self.driver, self.sandbox, work)

    def restored(self, at: datetime) -> list[int]:
        self.restore(self.plan(at))
        return self.driver.restored["acc"]


@pytest.fixture
def protected(monkeypatch: pytest.MonkeyPatch) -> Protected:
    """A base in the middle of five movements before it and twenty after."""
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)  # nobody else records here
    made = Protected()
    for _ in range(5):
        made.account.move()
    made.record()
    made.base()
    for _ in range(20):
        made.account.move()
        made.record()
    return made


def test_every_instant_of_the_window_brings_back_exactly_what_was_there(protected: Protected) -> None:
    """Before and after compaction, between any two movements."""
    moments = [datetime.fromisoformat("2026-03-01T12:00:00Z") + n * SECOND for n in range(1, 27)]
    for _ in range(2):
        for number, moment in enumerate(moments):
            for at in (moment + SECOND / 2, moment + timedelta(microseconds=1)):
                if at <= protected.plan(LATEST).at and number >= 5:
                    assert protected.restored(at) == list(range(number + 1))
        compact_logs(protected.repository, "acc", progress=Silence())


def test_latest_is_the_end_of_the_log(protected: Protected) -> None:
    plan = protected.plan(LATEST)
    assert (plan.steps[0].replay_to, plan.at) == (None, protected.account.now + timedelta(microseconds=1))
    assert protected.restored(LATEST) == list(range(26))


def test_a_newer_base_leaves_less_to_replay(protected: Protected) -> None:
    before = protected.plan(LATEST)
    protected.base()
    protected.record()
    after = protected.plan(LATEST)
    assert after.steps[0].point.id != before.steps[0].point.id
    assert len(after.steps[0].logs) < len(before.steps[0].logs)
    assert protected.restored(LATEST) == list(range(27))
    assert protected.plan(before.at).steps[0].point.id == before.steps[0].point.id


def test_instants_outside_are_refused_with_what_can_be_had(protected: Protected) -> None:
    last, first = protected.plan(LATEST).at, protected.repository.points()[0].instant
    with pytest.raises(NoRecoveryPoint, match="after the last instant") as raised:
        protected.plan(last + timedelta(microseconds=1))
    assert last.isoformat().replace("+00:00", "Z") in raised.value.hint
    with pytest.raises(NoRecoveryPoint, match="before the first recovery point") as raised:
        protected.plan(first - timedelta(microseconds=1))
    assert first.isoformat().replace("+00:00", "Z") in raised.value.hint


def test_an_instant_in_a_hole_is_refused_and_both_sides_are_named(protected: Protected) -> None:
    before = protected.plan(LATEST).at
    for _ in range(3):
        protected.account.move()
    protected.account.kept = len(protected.account.log)  # the slot was lost meanwhile
    protected.record()
    protected.account.move()
    protected.record()
    inside = protected.account.now
    protected.base()
    protected.record()
    protected.account.move()
    protected.record()
    after = protected.repository.points()[-1].instant
    with pytest.raises(NoRecoveryPoint, match="hole") as raised:
        protected.plan(inside)
    for end in (before, after):
        assert end.isoformat().replace("+00:00", "Z") in raised.value.hint
    assert protected.restored(LATEST) == list(range(32))
    assert protected.restored(before) == list(range(26))


def test_a_base_whose_log_is_not_stored_is_made_with_a_warning_and_is_no_point_yet(
    protected: Protected,
) -> None:
    newest_before = protected.plan(LATEST).steps[0].point.id
    assert protected.base() is RunStatus.WARNED
    assert protected.plan(LATEST).steps[0].point.id == newest_before
    protected.record()
    assert protected.plan(LATEST).steps[0].point.id != newest_before


def test_a_base_alone_is_restored_with_the_log_that_it_needs(protected: Protected) -> None:
    point = protected.repository.points()[0]
    protected.restore(plan_point(point, chains(*protected.repository.logs("acc"))))
    assert protected.driver.restored["acc"] == list(range(6))
    with pytest.raises(NoRecoveryPoint, match="log that it needs"):
        plan_point(point, [])


def test_without_any_log_nothing_can_be_restored_and_it_is_said(protected: Protected) -> None:
    with pytest.raises(NoRecoveryPoint, match="the log that it needs is not there"):
        plan_restore(protected.repository.points(), LATEST, ["acc"])


def test_a_target_replaces_the_instant(protected: Protected) -> None:
    protected.restore(protected.plan(LATEST), lsn="0/2A")
    assert protected.driver.targets == [{"lsn": "0/2A"}]
    with pytest.raises(UsageError):
        protected.restore(protected.plan(LATEST), lsn="0/2A", xid="7")


def test_a_damaged_log_is_told_before_the_restore_begins(protected: Protected) -> None:
    store, spans = protected.repository.store, protected.repository.logs("acc")[0]
    plan = protected.plan(LATEST)
    store.put(log_key(spans[-1]), store.get(log_key(spans[-1]))[:-3], overwrite=True)
    with pytest.raises(Damaged, match="damaged"):
        protected.restore(protected.plan(LATEST))
    store.delete(log_key(spans[-2]))
    with pytest.raises(Damaged, match="hole"):
        protected.restore(plan)
    assert protected.sandbox.made == []


@pytest.mark.parametrize("place", ["header", "content"])
def test_a_flipped_byte_anywhere_in_the_log_is_told_before_the_restore_begins(
    protected: Protected, place: str
) -> None:
    """With the last instant before it, to which a restore still comes."""
    store = protected.repository.store
    spans = [span for span in protected.plan(LATEST).steps[0].logs if span.start < span.end]
    key = log_key(spans[5])
    stored = store.get(key)
    at = 20 if place == "header" else len(stored) - 6
    store.put(key, stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :], overwrite=True)
    with pytest.raises(Damaged, match=rf"{key} is damaged") as raised:
        protected.restore(protected.plan(LATEST))
    assert protected.sandbox.made == []
    assert spans[4].anchor
    assert f"restores come up to {spans[4].anchor.at:%Y-%m-%d %H:%M:%S.%f}" in raised.value.hint
    protected.restore(protected.plan(spans[4].anchor.at - 2 * SECOND))
    assert all(key in problem for problem in sound(protected) or [""])


def test_a_log_that_is_stored_twice_and_differs_is_told_before_the_restore_begins(
    protected: Protected,
) -> None:
    """Which of both is right is not known here. Where both hold the same, nothing is wrong."""
    repository, log = protected.repository, bytes(protected.account.log)
    for content, differs in ((log[-64:-16], False), (bytes(48), True)):
        stored, size = encode(repository.codec, [content], [])
        end = len(log) - 16
        repository.put_log(LogSpan("acc", "acc-1", end - size, end, None, len(stored)), stored)
        if not differs:
            assert protected.restored(LATEST) == list(range(26))
            repository.store.delete(log_key(LogSpan("acc", "acc-1", end - size, end, None, 0)))
    protected.sandbox.made.clear()
    with pytest.raises(Damaged, match="different bytes"):
        protected.restore(protected.plan(LATEST))
    assert protected.sandbox.made == []


def test_another_cluster_under_the_same_name_is_ordered_by_time_and_never_mixed(
    protected: Protected,
) -> None:
    """Its positions begin anew, lower than the old one's: an upgrade, a new server. Each instant is restored from the
    cluster that was there; retention keeps the newest by time."""
    old, at_old = list(range(26)), protected.plan(LATEST).at
    account = protected.account
    fresh = Account(epochs=[("new-1", 0)], now=account.now + timedelta(hours=1))
    protected.account = protected.driver.account = fresh
    fresh.move()
    protected.record()
    protected.base()
    protected.record()
    fresh.move()
    protected.record()
    newest_point = max(protected.repository.points(), key=lambda point: point.instant)
    assert newest_point.attributes["epoch"] == "new-1"
    assert protected.restored(LATEST) == [0, 1, 2]
    assert protected.restored(at_old) == old
    with pytest.raises(NoRecoveryPoint, match="hole"):
        protected.plan(at_old + timedelta(minutes=30))
    compact_logs(protected.repository, "acc", progress=Silence())
    assert protected.restored(at_old) == old
    assert sound(protected) == []
    fresh.now += 2 * DAY
    prune_now(protected, last=1)
    assert protected.repository.points() == [newest_point]
    assert {span.epoch for span in protected.repository.logs("acc")[0]} == {"new-1"}
    assert protected.restored(LATEST) == [0, 1, 2]
    assert sound(protected) == []


def test_a_plan_made_before_compaction_is_still_carried_out(protected: Protected) -> None:
    plan = protected.plan(LATEST)
    compact_logs(protected.repository, "acc", progress=Silence())
    protected.restore(plan)
    assert protected.driver.restored["acc"] == list(range(26))


def test_into_a_directory_the_log_lies_beside_the_files(protected: Protected, tmp_path: Path) -> None:
    plan = protected.plan(LATEST)
    report = restore_to_directory(plan, tmp_path, Work(protected.repository, lambda: protected.account.now))
    (file,) = (tmp_path / "acc" / LOG_FOLDER).iterdir()
    first = plan.steps[0].logs[0].start
    assert file.read_bytes() == bytes(protected.account.log[first:])
    assert report.warned
    assert LOG_FOLDER in report.restored[0].warnings[0]


def test_a_new_epoch_that_continues_the_one_before_is_no_hole(protected: Protected) -> None:
    """A new timeline: while it is recorded, and while nobody was there."""
    account = protected.account
    for _ in range(2):
        account.promote()
        account.move()
        protected.record()
        account.move()
        account.promote()
        protected.record()
    assert protected.restored(LATEST) == list(range(30))
    plan = protected.plan(LATEST)
    assert list(dict.fromkeys(s.epoch for s in plan.steps[0].logs)) == ["acc-1", "acc-2", "acc-4"]
    assert (
        len(windows(protected.repository.points(), chains(*protected.repository.logs("acc")))["acc"].bars)
        == 1
    )
    compact_logs(protected.repository, "acc", progress=Silence())
    assert protected.restored(LATEST) == list(range(30))
    protected.restore(plan)
    assert protected.driver.restored["acc"] == list(range(30))
    found = chains(*protected.repository.logs("acc"))
    assert not needs_base(protected.repository.points(), found, "acc-5", len(account.log))
    assert sound(protected) == []


def test_an_epoch_behind_a_gap_continues_nothing(protected: Protected) -> None:
    account, repository = protected.account, protected.repository
    sink = LogWriter(repository, "acc")
    sink.begin("acc-1", len(account.log))
    sink.gap("another cluster")
    sink.begin("other-1", len(account.log))
    sink.piece(len(account.log), len(account.log) + 16, bytes(16))
    assert [c.epoch for c in chains(*repository.logs("acc"))] == ["acc-1", "other-1"]


def test_a_first_object_of_a_new_epoch_that_is_lost_is_named(protected: Protected) -> None:
    protected.account.promote()
    for _ in range(2):
        protected.account.move()
        protected.record()
    first = next(s for s in protected.repository.logs("acc")[0] if s.epoch == "acc-2")
    protected.repository.store.delete(log_key(first))
    assert any(f"acc-2 is missing from {first.start:x}" in problem for problem in sound(protected))


def test_whatever_happens_meanwhile_what_was_acknowledged_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Movements, recordings, bases and compactions in any order, lost slots; then any instant of the window."""
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)
    for seed in range(15):
        dice, made = random.Random(seed), Protected()
        for _ in range(60):
            match dice.randrange(10):
                case 0:
                    made.base()
                case 1:
                    compact_logs(made.repository, "acc", progress=Silence())
                case 2 if seed % 3 == 0:
                    made.account.kept = len(made.account.log)
                case 2 if seed % 3 == 1:
                    made.account.promote()
                case 3 | 4 | 5:
                    made.record()
                case _:
                    made.account.move()
        made.base()
        made.record()
        records: list[Any] = list(RECORD.iter_unpack(bytes(made.account.log)))
        refused = 0
        for micros, number in records:
            at = datetime.fromtimestamp(micros / 1e6, tz=made.account.now.tzinfo)
            try:
                assert made.restored(at) == list(range(number + 1))
            except NoRecoveryPoint:
                refused += 1
        assert refused < len(records)


# --- keeping and removing ------------------------------------------------------------------------------

DAY = timedelta(days=1)


def days(protected: Protected, count: int) -> list[datetime]:
    """A base a day, movements every few hours, all recorded; the instants of the bases."""
    for _ in range(count):
        for _ in range(4):
            protected.account.move(protected.account.now + DAY / 4)
            protected.record()
        protected.base()
        protected.record()
    return [point.instant for point in protected.repository.points()]


def prune_now(protected: Protected, **policy: Any) -> PruneReport:
    return prune(
        protected.repository,
        {"acc": Policy(**policy)},
        clock=lambda: protected.account.now,
        progress=Silence(),
    )


def sound(protected: Protected) -> list[str]:
    return verify(protected.repository, sources=None, data_percent=100, progress=Silence()).problems


def test_every_instant_of_the_kept_window_stays_and_what_is_older_goes(protected: Protected) -> None:
    bases = days(protected, 12)
    newest_instant = protected.plan(LATEST).at
    report = prune_now(protected, pitr=timedelta(days=7))
    assert report.bytes_freed > 0
    for hours in range(0, 7 * 24, 5):
        at = newest_instant - timedelta(hours=hours)
        assert protected.restored(at)[-1] == sum(
            micros <= (at - datetime(1970, 1, 1, tzinfo=at.tzinfo)) // timedelta(microseconds=1)
            for micros, _ in RECORD.iter_unpack(bytes(protected.account.log))
        ) - 1  # fmt: skip
    assert len(protected.repository.points()) < len(bases)
    with pytest.raises(NoRecoveryPoint):
        protected.plan(newest_instant - timedelta(days=9))
    assert sound(protected) == []
    assert prune_now(protected, pitr=timedelta(days=7)).objects_removed == 0


def test_an_old_point_keeps_the_log_that_it_needs_and_no_more(protected: Protected) -> None:
    days(protected, 12)
    oldest = protected.repository.points()[0]
    before = len(protected.repository.logs("acc")[0])
    prune_now(protected, pitr=timedelta(days=3), daily=100)
    spans, gaps = protected.repository.logs("acc")
    assert len(spans) < before
    assert gaps
    assert oldest in protected.repository.points()
    for point in protected.repository.points():
        protected.restore(plan_point(point, chains(spans, gaps)))
    assert sound(protected) == []
    with pytest.raises(NoRecoveryPoint, match="hole"):
        protected.plan(oldest.instant + timedelta(hours=8))
    prune_now(protected, pitr=timedelta(days=3), last=1)
    assert sound(protected) == []
    assert len(protected.repository.logs("acc")[1]) < len(gaps)


def test_without_pitr_the_log_stays_from_the_oldest_kept_point_on(protected: Protected) -> None:
    days(protected, 6)
    prune_now(protected, last=3)
    first = protected.repository.points()[0].instant
    for hours in range(0, 48, 5):
        assert protected.restored(first + timedelta(hours=hours))
    assert protected.repository.logs("acc")[0][0].start > 0


def test_an_agent_that_stood_still_ages_nothing_out(protected: Protected) -> None:
    days(protected, 5)
    prune_now(protected, pitr=timedelta(days=7))
    before = protected.repository.logs("acc")
    protected.account.now += timedelta(days=300)
    assert prune_now(protected, pitr=timedelta(days=7)).objects_removed == 0
    assert protected.repository.logs("acc") == before


def test_no_policy_no_point_and_a_dry_run_remove_nothing(protected: Protected) -> None:
    days(protected, 5)
    before = protected.repository.logs("acc")
    prune_now(protected)
    told = prune(protected.repository, {"acc": Policy(pitr=DAY)}, clock=lambda: protected.account.now, dry_run=True,
                 progress=Silence())  # fmt: skip
    assert protected.repository.logs("acc") == before
    done = prune_now(protected, pitr=DAY)
    assert (done.logs_removed, done.bytes_freed) == (told.logs_removed, told.bytes_freed)
    assert needless([], Policy(pitr=DAY), chains(*before), now=protected.account.now + 100 * DAY) == []


def test_a_prune_that_dies_at_any_step_breaks_no_point_and_looks_like_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)
    for step in range(40):
        made = Protected()
        made.record()
        for _ in range(3):
            days(made, 2)
            made.account.promote()
        store, left = made.repository.store, step
        delete, put = store.delete, store.put

        def dying(key: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            delete(key)  # noqa: B023

        store.delete = dying  # type: ignore[method-assign]
        ended = False
        try:
            prune_now(made, pitr=timedelta(days=2), daily=100, last=1)
            ended = True
        except KeyboardInterrupt:
            pass
        store.delete, store.put = delete, put  # type: ignore[method-assign]
        assert sound(made) == []
        if ended:
            return
    raise AssertionError("it never came to its end")


# --- what verify finds ---------------------------------------------------------------------------------------


def test_a_missing_object_is_named_with_the_last_instant_before_it(protected: Protected) -> None:
    spans = [s for s in protected.repository.logs("acc")[0] if s.start < s.end]
    protected.repository.store.delete(log_key(spans[10]))
    (problem,) = sound(protected)
    assert f"missing from {spans[10].start:x} to {spans[10].end:x}" in problem
    assert spans[9].anchor
    assert f"{spans[9].anchor.at:%H:%M:%S}" in problem


def test_a_point_whose_log_is_lost_is_named(protected: Protected) -> None:
    (point,) = protected.repository.points()
    need = need_of(point)
    assert need
    for span in protected.repository.logs("acc")[0]:
        if span.start <= need.start < span.end:
            protected.repository.store.delete(log_key(span))
    assert any(point.id in problem and "cannot be restored" in problem for problem in sound(protected))


def test_a_torn_object_is_named_with_the_last_instant_before_it(protected: Protected) -> None:
    store = protected.repository.store
    spans = [s for s in protected.repository.logs("acc")[0] if s.start < s.end]
    store.put(log_key(spans[10]), store.get(log_key(spans[10]))[:-5], overwrite=True)
    problems = verify(protected.repository, sources=None, progress=Silence()).problems
    assert len(problems) == 1
    assert log_key(spans[10]) in problems[0]
    assert spans[9].anchor
    assert f"{spans[9].anchor.at:%H:%M:%S}" in problems[0]


def test_a_flipped_byte_is_found_when_data_is_read(protected: Protected) -> None:
    store = protected.repository.store
    key = log_key([s for s in protected.repository.logs("acc")[0] if s.start < s.end][7])
    stored = store.get(key)
    store.put(key, stored[:-6] + bytes([stored[-6] ^ 1]) + stored[-5:], overwrite=True)
    assert verify(protected.repository, sources=None, progress=Silence()).problems == []
    assert len(sound(protected)) == 1


def test_doubled_objects_are_told_and_those_that_disagree_are_damage(protected: Protected) -> None:
    spans = [s for s in protected.repository.logs("acc")[0] if s.start < s.end]
    last, log = spans[-1], bytes(protected.account.log)
    repository = protected.repository
    for content, problems in ((log[spans[-3].start : last.end], 0), (bytes(last.end - spans[-4].start), 1)):
        stored, size = encode(repository.codec, [content], [])
        double = LogSpan("acc", last.epoch, last.end - size, last.end, None, len(stored))
        repository.put_log(double, stored)
        report = verify(repository, sources=None, progress=Silence())
        assert "lie in others" in report.notes[0]
        assert bool(report.problems) == bool(problems)
    assert "hold different bytes" in report.problems[0]
