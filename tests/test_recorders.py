"""The agent records: a thread a source, begun again when it fails, and what it tells of itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from recording import Account, AccountDriver
from test_logs import LossyStore

from backupd.agent import Agent, build
from backupd.agent.recording import RecorderState, Recordings, lag_limit
from backupd.agent.serving import gauges_of, health_of, jobs_of
from backupd.agent.status import protections
from backupd.catalog import Catalog
from backupd.chain import chain_of, chains, needs_base
from backupd.config import load
from backupd.config.load import parse
from backupd.config.mistakes import ConfigInvalid
from backupd.errors import Locked
from backupd.logs import read_logs
from backupd.metrics import exposition
from backupd.model import Capture, Driver, LogMark, LogSink, LogSpan, PointKind, RecoveryPoint, Silence
from backupd.repository import Repository
from backupd.retained import MUCH, Retained, worry
from backupd.scheduler import Health
from backupd.stores import MemoryStore

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
GIB = 1 << 30


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


class Setup:
    """One account, recorded every ten milliseconds."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.account = Account()
        self.driver: Driver = AccountDriver(self.account)
        self.repository = Repository.create(store or MemoryStore(), clock=lambda: NOW)
        self.begun: list[tuple[str, str, int]] = []

    def recordings(self) -> Recordings:
        return Recordings(
            {"acc": timedelta(milliseconds=10)}, driver=lambda _: self.driver, repository=lambda: self.repository,
            clock=lambda: self.account.now, on_begin=lambda *stretch: self.begun.append(stretch), pause=0.01,
            look_every=0.01,
        )  # fmt: skip

    @contextmanager
    def recording(self) -> Iterator[Callable[[], RecorderState]]:
        with self.recordings() as made:
            yield lambda: made.states()[0]

    def stored(self) -> list[bytes]:
        found = chains(*self.repository.logs("acc"))
        return [b"".join(data for _, data in read_logs(self.repository, c.spans)) for c in found]


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_what_happens_is_stored_while_the_agent_runs_and_flushed_when_it_stops(setup: Setup) -> None:
    with setup.recording() as state:
        for _ in range(5):
            setup.account.move()
            until(lambda: state().position == len(setup.account.log))
        assert (state().state, state().epoch, state().error) == ("recording", "acc-1", "")
        until(lambda: state().rpo is not None)
        setup.account.move()
    assert setup.stored() == [bytes(setup.account.log)]
    assert chains(*setup.repository.logs("acc"))[0].reach == setup.account.now + timedelta(microseconds=1)
    assert setup.begun == [("acc", "acc-1", 0)]


def test_a_recorder_that_fails_is_begun_again_and_misses_nothing(setup: Setup) -> None:
    with setup.recording() as state:
        setup.account.move()
        until(lambda: state().position == 16)
        setup.account.breaks = "the server went away"
        until(lambda: state().failures > 2)
        assert (state().state, state().error) == ("failing", "RuntimeError: the server went away")
        setup.account.move()
        setup.account.breaks = ""
        until(lambda: state().position == 32)
        assert (state().state, state().error, state().failures) == ("recording", "", 0)
    assert setup.stored() == [bytes(setup.account.log)]


def test_a_store_that_lost_an_answer_costs_nothing() -> None:
    store = LossyStore()
    setup = Setup(store)
    with setup.recording() as state:
        for number in range(1, 6):
            store.lose = True
            setup.account.move()
            until(lambda: state().position == 16 * number)  # noqa: B023
    assert setup.stored() == [bytes(setup.account.log)]


def test_a_lost_slot_is_a_gap_and_a_new_stretch(setup: Setup) -> None:
    for _ in range(2):
        with setup.recording() as state:
            setup.account.move()
            until(lambda: state().position == len(setup.account.log))
        setup.account.move()
        setup.account.kept = len(setup.account.log)
    assert [len(stored) for stored in setup.stored()] == [16, 16]
    assert setup.begun[-1] == ("acc", "acc-1", 32)


def test_a_recorder_that_ends_by_itself_has_failed(setup: Setup) -> None:
    class Quitter(AccountDriver):
        def recorder(self, *, interval: float) -> Quitter:  # type: ignore[override]
            return self

        def record(self, since: LogSpan | None, sink: LogSink, stop: object) -> None:
            sink.begin("acc-1", 0)

    setup.driver = Quitter(setup.account)
    with setup.recording() as state:
        until(lambda: state().failures)
        assert "ended by itself" in state().error


def test_a_driver_that_cannot_record_is_told(setup: Setup) -> None:
    class Dump:
        kind = "dump"

    setup.driver = Dump()  # type: ignore[assignment]
    with setup.recording() as state:
        until(lambda: "cannot record" in state().error)


def test_a_base_waits_until_the_log_is_recorded(setup: Setup) -> None:
    setup.account.breaks = "not yet"
    with setup.recordings() as made:
        begun = time.monotonic()
        made.wait_begun("acc", made.stopping, seconds=0.3)
        made.wait_begun("other", made.stopping)
        assert 0.3 <= time.monotonic() - begun < 5
        setup.account.breaks = ""
        made.wait_begun("acc", made.stopping)
        assert made.states()[0].state == "recording"


def test_a_copy_of_a_server_under_its_name_is_refused_and_closes_no_window(setup: Setup) -> None:
    """A restored sandbox with an agent of its own: neither its log nor a base of it comes between, nor while the first
    server is started anew. When its agent has ended, the copy may go on."""
    setup.account.move()
    with setup.recording() as first:
        until(lambda: first().position == 16)
        copy = Setup()
        copy.repository = setup.repository
        copy.account.server, copy.account.epochs = "copy", [("acc-9", 0)]
        copy.account.move()
        with copy.recordings() as second:
            until(lambda: second.states()[0].failures > 1)
            assert "another server is recorded as acc now" in second.states()[0].error
            with pytest.raises(Locked, match="another server"):
                second.wait_begun("acc", second.stopping)
            setup.account.breaks = "it is started anew"
            until(lambda: first().failures)
            refusals = second.states()[0].failures
            until(lambda: second.states()[0].failures > refusals + 1)
        setup.account.server, setup.account.breaks = "one, started anew", ""
        setup.account.move()
        until(lambda: first().position == 32)
    assert setup.repository.logs("acc")[1] == []
    assert setup.stored() == [bytes(setup.account.log)]
    with copy.recordings() as second:
        until(lambda: second.states()[0].state == "recording")


# --- what is told ------------------------------------------------------------------------------------------


def test_a_log_that_lags_makes_the_agent_unhealthy_and_one_failure_does_not(setup: Setup) -> None:
    well = Health("ok", True, True)
    with setup.recording() as state:
        setup.account.move()
        until(lambda: state().position == 16)
        good, document = health_of(well, [state()])
        assert good
        assert document["recorders"]["acc"]["rpo_seconds"] == -0.0  # type: ignore[index, call-overload]
        setup.account.breaks = "the server went away"
        until(lambda: state().failures)
        assert health_of(well, [state()])[0]
        setup.account.now += lag_limit(timedelta(seconds=1)) + timedelta(seconds=1)
        good, document = health_of(well, [state()])
        assert not good
        assert document["status"] == "failing"  # type: ignore[index, call-overload]
        assert "the server went away" in str(document["problems"])  # type: ignore[index, call-overload]


class Keeping(AccountDriver):
    """An account whose server keeps what is not stored."""

    keeps: Retained | None = Retained(3 * GIB, 2 * GIB)

    def retained(self, since: LogSpan | None) -> Retained | None:
        return self.keeps


def test_what_the_server_keeps_makes_the_agent_unhealthy_before_it_is_too_much(setup: Setup) -> None:
    """Also where nothing can be recorded: then it grows."""
    driver = setup.driver = Keeping(setup.account)
    setup.account.breaks = "the store is full"
    well = Health("ok", True, True)
    with setup.recording() as state:
        until(lambda: state().retained == driver.keeps)
        assert health_of(well, [state()])[0]
        driver.keeps = Retained(4 * GIB, GIB)
        until(lambda: state().retained == driver.keeps)
        good, document = health_of(well, [state()])
        assert not good
        assert json.loads(json.dumps(document))["problems"][0]["problem"] == "retaining"
        told = exposition(gauges_of([state()])).decode()
    found = {
        sample.name: (sample.labels, sample.value)
        for family in text_string_to_metric_families(told)
        for sample in family.samples
    }
    assert found["backupd_log_retained_bytes"] == ({"source": "acc"}, 4 * GIB)
    assert found["backupd_log_retained_room_bytes"] == ({"source": "acc"}, GIB)
    assert found["backupd_recorder_up"] == ({"source": "acc"}, 0)
    assert "backupd_recovery_point_age_seconds" not in found  # nothing is known, which is not 0


def test_how_far_a_log_has_come_is_measured(setup: Setup) -> None:
    """What would be lost is the age of what is not stored: of an idle source nothing, though nothing is put. It grows
    once the source cannot be asked any more."""

    def values() -> dict[str, float | None]:
        return {gauge.name: gauge.values["acc"] for gauge in gauges_of([state()])}

    with setup.recording() as state:
        setup.account.move()
        until(lambda: state().reach)
        reach = state().reach
        setup.account.now += timedelta(seconds=30)
        until(lambda: (values()["backupd_recovery_point_age_seconds"] or 30) < 1)
        assert reach
        assert values()["backupd_restorable_until_timestamp_seconds"] == reach.timestamp()
        assert values()["backupd_log_retained_bytes"] is None
        setup.account.breaks = "the server went away"
        until(lambda: state().failures)
        setup.account.now += timedelta(seconds=5)
        assert values()["backupd_recovery_point_age_seconds"] == pytest.approx(5, abs=0.001)


@pytest.mark.parametrize(
    ("retained", "told"),
    [
        (None, ""),
        (Retained(0, None), ""),
        (Retained(MUCH - 1, None), ""),
        (Retained(MUCH, None), "until it is full: set max_slot_wal_keep_size"),
        (Retained(3 * GIB, GIB), ""),
        (Retained(3 * GIB, GIB - 4), "gives it up after 1,024 MiB more"),
        (Retained(0, 0), ""),
        (Retained(0, None, lost=True), "gave up"),
    ],
)
def test_what_a_server_keeps_is_told_once_little_room_is_left(retained: Retained | None, told: str) -> None:
    """A quarter of its limit; or some gigabytes where it has none."""
    assert told in worry(retained)
    assert bool(told) == bool(worry(retained))


def test_a_source_without_a_log_tells_nothing_new() -> None:
    assert health_of(Health("ok", True, True), []) == (True, {"status": "ok", "alive": True, "problems": []})


def test_a_stretch_without_a_base_needs_one() -> None:
    base = RecoveryPoint("1", "a", "d", PointKind.FULL, NOW, NOW, NOW, 1, 1, 1,
                         attributes={"epoch": "e", "start": 2, "end": 8})  # fmt: skip
    held = chains([LogSpan("a", "e", 0, 10, None, 1), LogSpan("a", "e", 20, 30, None, 1)])
    assert needs_base([base], held, "e", 30)
    assert not needs_base([base], held, "e", 10)
    assert needs_base([base], held, "f", 10)
    assert needs_base([], held, "e", 10)
    assert not needs_base([base], held, "e", 9)  # it went on meanwhile
    assert not needs_base([base], [], "e", 2)  # made before anything was recorded: it is continued from there
    assert needs_base([base], [], "e", 3)
    assert needs_base([base], [], "f", 2)


def test_what_follows_a_gap_at_the_very_place_needs_a_base_and_one() -> None:
    """A clock that was set back: nothing is missing of the log, and no restore goes across."""
    before, after = (
        RecoveryPoint(name, "a", "d", PointKind.FULL, NOW, NOW, NOW, 1, 1, 1,
                      attributes={"epoch": "e", "start": start, "end": start + 5})
        for name, start in (("1", 2), ("2", 12))
    )  # fmt: skip
    marks = [LogMark("a", "e", 10)]
    held = chains([LogSpan("a", "e", 0, 10, None, 1)], marks)
    assert needs_base([before], held, "e", 10, marks)
    assert not needs_base([before, after], held, "e", 10, marks)
    held = chains([LogSpan("a", "e", 0, 10, None, 1), LogSpan("a", "e", 10, 30, None, 1)], marks)
    assert needs_base([before], held, "e", 20, marks)
    assert not needs_base([before, after], held, "e", 20, marks)
    other = [LogMark("a", "f", 10), LogMark("a", "e", 10, after="f")]
    assert not needs_base([before], chains([LogSpan("a", "e", 0, 10, None, 1)], other), "e", 10, other)


def test_a_base_that_failed_is_asked_for_again(setup: Setup) -> None:
    with setup.recordings() as made:
        made.wait_begun("acc", made.stopping)
        setup.account.move()
        until(lambda: made.states()[0].position == 16)
        made.ask_for_base("acc")
        made.ask_for_base("other")
    assert setup.begun == [("acc", "acc-1", 0), ("acc", "acc-1", 16)]


CONFIG = """
[repository]
location = "{location}"
[sources.db]
driver = "postgres"
url = "postgresql://backup@db/x"
mode = "pitr"
schedule = "0 2 * * *"
[sources.other]
driver = "volume"
path = "/data"
"""


def configured(location: str = "./backups") -> str:
    return CONFIG.format(location=location)


def test_how_often_the_log_is_stored_depends_on_the_store(tmp_path: Path) -> None:
    for location, seconds in (("./backups", 1), ("s3://bucket/prefix", 10)):
        config = parse(configured(location), origin="x", base=tmp_path, env={})
        assert config.sources["db"].recorded_every == timedelta(seconds=seconds)
        assert config.sources["other"].recorded_every is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('mode = "pitr"\nlog_interval = "10ms"', "too short"),
        ('mode = "pitr"\ndatabases = ["x"]', "exclude each other"),
        ('log_interval = "5s"', 'needs mode = "pitr"'),
        ('max_rate = "5MB/s"', 'max_rate needs mode = "pitr"'),
        ("verify = false", 'verify needs mode = "pitr"'),
        ('mode = "pitr"\nmax_rate = "5kB/s"', "too low"),
        ('mode = "pitr"\nmax_rate = 5', "5 has no unit"),
        ('mode = "pitr"\nmax_rate = "5 apples"', "not a rate"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    text = configured().replace('mode = "pitr"', lines)
    with pytest.raises(ConfigInvalid, match=message):
        parse(text, origin="x", base=tmp_path, env={})


def test_how_far_back_every_instant_is_kept_is_part_of_the_retention(tmp_path: Path) -> None:
    text = configured() + '[defaults]\nretention = { pitr = "7d", daily = 14 }\n'
    config = parse(text, origin="x", base=tmp_path, env={})
    assert config.policies["db"].pitr == timedelta(days=7)
    with pytest.raises(ConfigInvalid, match="not a duration"):
        parse(text.replace('"7d"', '"seven"'), origin="x", base=tmp_path, env={})


def test_a_log_is_put_together_every_hour(tmp_path: Path) -> None:

    (tmp_path / "backupd.toml").write_text(configured())
    jobs = jobs_of(build(load(tmp_path / "backupd.toml", {})))
    assert [job.source for job in jobs if job.name == "compact"] == ["db"]
    (job,) = (job for job in jobs if job.name == "compact")
    assert job.lane == "repository"
    assert not job.eager


def test_status_tells_how_much_would_be_lost_now(tmp_path: Path) -> None:
    config = parse(configured(), origin="x", base=tmp_path, env={})
    catalog = Catalog(tmp_path / "catalog.sqlite")
    point = RecoveryPoint("1", "db", "postgres", PointKind.FULL, NOW, NOW, NOW, 1, 1, 1)
    for reached, rpo, lagging in (({}, None, True), ({"db": NOW - timedelta(seconds=2)}, 2.0, False),
                                  ({"db": NOW - timedelta(hours=1)}, 3600.0, True)):  # fmt: skip
        db, other = protections(config, [point, replace(point, source="other")], catalog, NOW, reached)
        assert (db.rpo and db.rpo.total_seconds(), db.lagging) == (rpo, lagging)
        assert (other.rpo, other.lagging) == (None, False)
        assert db.good != lagging


# --- the whole agent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ['schedule = "0 2 * * *"\n', ""])
def test_serve_records_makes_the_first_base_and_flushes_when_told_to_stop(
    tmp_path: Path, schedule: str
) -> None:
    """And a slot that was lost while it was not there leads to a new base at once. A source that is recorded needs no
    schedule."""
    from backupd.agent.serving import serve
    from backupd.plan import LATEST, plan_restore

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = configured().replace('schedule = "0 2 * * *"\n', schedule)
    (tmp_path / "backupd.toml").write_text(text + f'[serve]\nlisten = "127.0.0.1:{port}"\n')
    account = Account(now=datetime.now(UTC))
    for bases in (1, 2):
        agent = build(load(tmp_path / "backupd.toml", {"BACKUPD_STATE": str(tmp_path / "state")}))
        agent.ensure_repository()
        agent._drivers["db"] = AccountDriver(account)
        seen: list[object] = []

        def user(agent: Agent = agent, bases: int = bases, seen: list[object] = seen) -> None:
            try:
                until(lambda: len(agent.repository().points("db")) == bases, 20)
                account.move(datetime.now(UTC))
                until(lambda: len(account.log) == reached(agent.repository()), 20)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                    seen.append(json.load(answer)["recorders"]["db"]["state"])
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    seen.append('backupd_recorder_up{source="db"} 1.0' in answer.read().decode())
                account.move(datetime.now(UTC))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=user)
        thread.start()
        assert serve(agent) == 0
        thread.join()
        assert seen == ["recording", True]
        repository = agent.repository()
        assert reached(repository) == len(account.log)
        plan = plan_restore(repository.points("db"), LATEST, ["db"], logs=chains(*repository.logs("db")))
        assert plan.steps[0].logs[-1].end == len(account.log)
        account.move(datetime.now(UTC))
        account.kept = len(account.log)


class Torn(AccountDriver):
    """Its account becomes another while the first base is read."""

    def __init__(self, account: Account, tear: Callable[[int], None]) -> None:
        super().__init__(account)
        self.tear = tear

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:
        with super().capture(since) as capture:
            if self.account.epoch == "acc-1":
                self.tear(len(self.account.log))
            yield capture


def test_a_log_that_was_torn_while_a_base_was_made_gets_another_at_once(tmp_path: Path) -> None:
    """Not within the hour: until then nothing of the new stretch could be restored."""
    (tmp_path / "backupd.toml").write_text(configured())
    agent = build(load(tmp_path / "backupd.toml", {"BACKUPD_STATE": str(tmp_path / "state")}))
    agent.ensure_repository()
    account, begun = Account(now=datetime.now(UTC)), list[str]()
    recordings = Recordings(
        {"db": timedelta(milliseconds=10)}, driver=agent.driver, repository=agent.repository, clock=agent.clock,
        on_begin=lambda _source, epoch, _position: begun.append(epoch), pause=0.01,
    )  # fmt: skip

    def tear(end: int) -> None:
        until(lambda: reached(agent.repository()) == end)
        account.epochs, account.kept, account.breaks = [("other", end)], end, "the server went away"
        until(lambda: recordings.states()[0].failures)
        account.breaks = ""
        until(lambda: begun[-1] == "other")

    agent._drivers["db"] = Torn(account, tear)
    (job,) = (job for job in jobs_of(agent, recordings) if job.key == ("backup", "db"))
    with recordings:
        job.work(threading.Event(), None)
    points = agent.repository().points("db")
    assert [point.attributes["epoch"] for point in points] == ["acc-1", "other"]


def test_a_base_made_by_hand_before_anything_was_recorded_is_continued_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its capture began to keep is recorded from before its start on."""
    from backupd import backup
    from backupd.agent.serving import _back_up_new_stretch
    from backupd.scheduler import Scheduler

    monkeypatch.setattr(backup, "_LOG_PATIENCE", 0.0)
    (tmp_path / "backupd.toml").write_text(configured().replace('schedule = "0 2 * * *"\n', ""))
    agent = build(load(tmp_path / "backupd.toml", {"BACKUPD_STATE": str(tmp_path / "state")}))
    agent.ensure_repository()
    account = Account(now=datetime.now(UTC))
    agent._drivers["db"] = AccountDriver(account)
    account.move()
    run = agent.back_up("db", Silence())
    scheduler = Scheduler(jobs_of(agent), agent.catalog, clock=agent.clock)
    asked: list[bool] = []

    def on_begin(source: str, epoch: str, position: int) -> None:
        _back_up_new_stretch(agent, scheduler, source, epoch, position)
        asked.append(scheduler.is_busy("backup", "db"))

    with Recordings(
        {"db": timedelta(milliseconds=10)}, driver=agent.driver, repository=agent.repository, clock=agent.clock,
        on_begin=on_begin,
    ):  # fmt: skip
        until(lambda: reached(agent.repository()) == len(account.log))
    assert asked == [False]
    (point,) = agent.repository().points("db")
    assert point.id == run.point
    assert chain_of(point, chains(*agent.repository().logs("db")))


def reached(repository: Repository) -> int:
    return max((span.end for span in repository.logs("db")[0]), default=0)
