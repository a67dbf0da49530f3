"""A log is one running server's at a time: copies recorded under one name write nothing between each other's pieces."""

from __future__ import annotations

import pytest
from engine import Engine
from hypothesis import given
from hypothesis import strategies as st
from test_logs import EPOCH, Time, at, content, read_back

from backupd.errors import Locked, StoreError
from backupd.logs import Claim, LogWriter
from backupd.logs.claim import LOOK, SILENT
from backupd.model import Bytes
from backupd.stores import MemoryStore

KEY = "leases/log/db.json"


class CountingStore(MemoryStore):
    """Counts what is asked of it, and can be made to let something happen just before a put."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[str] = []
        self.gets: list[str] = []
        self.meanwhile: Claim | None = None

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        self.puts.append(key)
        if self.meanwhile is not None:
            other, self.meanwhile = self.meanwhile, None
            other.take(self.engine.repository, "other")
        super().put(key, data, overwrite=overwrite)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self.gets.append(key)
        return super().get(key, offset=offset, length=length)

    engine: Engine


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def engine(store: CountingStore) -> Engine:
    store.engine = Engine(store)
    return store.engine


class Recording:
    """A recorder's side of it: a server, and the writer it feeds."""

    def __init__(self, engine: Engine, time: Time, server: str) -> None:
        self.engine, self.time, self.server = engine, time, server
        self.claim = Claim("db", now=time)

    def start(self) -> LogWriter:
        """A new try of the same agent."""
        since = LogWriter(self.engine.repository, "db").since
        self.sink = LogWriter(self.engine.repository, "db", claim=self.claim, now=self.time)
        self.sink.claim(self.server)
        self.sink.begin(EPOCH, since.end if since else 0)
        return self.sink

    def end(self) -> None:
        """In good order."""
        self.sink.close()
        self.claim.release(self.engine.repository)

    def store(self, start: int, end: int) -> None:
        self.sink.anchor(at(end), end)
        self.sink.piece(start, end, content(start, end))


@pytest.fixture
def one(engine: Engine, time: Time) -> Recording:
    """Has stored its first piece."""
    made = Recording(engine, time, "one")
    made.start()
    made.store(0, 100)
    return made


@pytest.fixture
def copy(engine: Engine, time: Time) -> Recording:
    return Recording(engine, time, "copy")


def test_a_copy_is_refused_as_long_as_something_comes_from_the_first(
    one: Recording, copy: Recording, store: CountingStore, time: Time
) -> None:
    """However often it asks, and it marks nothing. Even an idle source is stored to once a minute."""
    before = len(store.puts)
    for minute in range(10):
        for second in range(0, 60, 5):
            time.now = minute * 60 + second
            one.sink.anchor(at(1000 + time.now), 100)
            with pytest.raises(Locked, match="another server is recorded as db now, by the agent ") as raised:
                copy.start()
            assert "another name" in raised.value.hint
    assert all(key.startswith("logs/db/") for key in store.puts[before:])
    assert one.engine.repository.logs("db")[1] == []


@given(st.lists(st.floats(0.1, 60), min_size=1, max_size=30))
def test_a_claim_falls_free_once_its_log_was_seen_to_stand_still_for_long_enough(pauses: list[float]) -> None:
    """And never before, whenever the next one asks; what it sees first may be a moment or a year old."""
    engine, time = Engine(), Time()
    Recording(engine, time, "one").start()
    next_one = Recording(engine, time, "two")
    began = time.now = 1000.0
    for pause in [0.0, *pauses]:
        time.now += pause
        if time.now - began < SILENT:
            with pytest.raises(Locked):
                next_one.start()
        else:
            next_one.start()
            return


def test_what_comes_meanwhile_begins_the_wait_anew(one: Recording, copy: Recording, time: Time) -> None:
    for second in (0, 80):
        time.now = second
        with pytest.raises(Locked):
            copy.start()
    one.store(100, 200)
    for second in (81, 170):
        time.now = second
        with pytest.raises(Locked):
            copy.start()
    time.now = 172
    copy.start()


def test_an_agent_started_again_on_the_same_running_server_waits_for_nothing(
    one: Recording, engine: Engine, time: Time
) -> None:
    """However the one before ended. Nor does the same agent, once its server was started anew."""
    again = Recording(engine, time, "one")
    again.start()
    again.store(100, 200)
    again.server = "one, started anew"
    again.start()
    again.store(200, 300)
    assert read_back(engine.repository) == {0: content(0, 300)}


def test_what_ended_in_good_order_is_let_go_at_once(one: Recording, copy: Recording) -> None:
    one.end()
    copy.start()
    copy.end()
    one.start()
    one.end()
    one.end()
    copy.start()


def test_one_that_stood_still_until_it_was_taken_over_finds_out_before_it_stores(
    one: Recording, copy: Recording, engine: Engine, time: Time
) -> None:
    """A host that was frozen for minutes. Its end lets nothing go that is another's."""
    with pytest.raises(Locked):
        copy.start()
    time.now = SILENT
    copy.start()
    copy.store(100, 150)
    with pytest.raises(Locked):
        one.store(100, 200)
    with pytest.raises(StoreError):
        one.sink.piece(100, 200, content(100, 200))
    one.end()
    copy.store(150, 180)
    with pytest.raises(Locked):
        one.start()
    assert read_back(engine.repository) == {0: content(0, 180)}


def test_two_that_come_in_one_instant_are_told_apart(
    engine: Engine, store: CountingStore, time: Time
) -> None:
    """The first ones ever, where the store keeps conditions."""
    first = Recording(engine, time, "first")
    store.meanwhile = Claim("db", now=time)
    with pytest.raises(Locked):
        first.start()
    assert engine.repository.logs("db") == ([], [])


def test_a_claim_that_was_removed_or_cannot_be_read_is_made_anew(
    one: Recording, copy: Recording, store: CountingStore, time: Time
) -> None:
    for broken in (None, b"no JSON", b'{"owner": "x"}', b"[]"):
        if broken is None:
            store.delete(KEY)
        else:
            store.put(KEY, broken, overwrite=True)
        time.now += LOOK
        one.sink.anchor(at(5000 + time.now), 100)
        one.store(one.sink.recorded.position, one.sink.recorded.position + 100)
        with pytest.raises(Locked):
            copy.start()


def test_what_another_stored_while_it_was_about_to_begin_is_not_stored_over(
    one: Recording, copy: Recording, engine: Engine
) -> None:
    """Between looking where the log ends and having it. The next try begins where it ends now."""
    sink = LogWriter(engine.repository, "db", claim=copy.claim)
    one.store(100, 200)
    one.end()
    with pytest.raises(StoreError, match="went on just now"):
        sink.claim("copy")
    sink.close()
    copy.start()
    copy.store(200, 300)
    assert read_back(engine.repository) == {0: content(0, 300)}


def test_a_claim_costs_a_put_at_the_start_and_one_at_the_end(
    one: Recording, store: CountingStore, time: Time
) -> None:
    """Nothing is put only to stay alive, and an idle one looks no oftener than it stores."""
    store.gets.clear()
    for second in range(3600):
        time.now = second
        one.sink.anchor(at(1000 + second), 100)
    assert store.puts.count(KEY) == 1
    assert store.gets.count(KEY) <= 60
    one.end()
    assert store.puts.count(KEY) == 2
