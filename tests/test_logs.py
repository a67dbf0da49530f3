"""A source's log: pieces are durable, continue each other, and are read back as they were written."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from engine import START, Engine
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.chain import Need, chains, logs_for, newest
from backupd.codec import ZstdCodec
from backupd.errors import Damaged, Locked, StoreError, UsageError
from backupd.logs import LogWriter, check_log, compact_logs, read_logs, read_span
from backupd.logs.piece import FRAME, Header, decode, decode_header, encode
from backupd.model import Anchor, Bytes, LogMark, LogSpan, Silence
from backupd.repository import Repository, log_key
from backupd.stores import LocalStore, MemoryStore

GOLDEN = Path(__file__).parent / "golden" / "logs-1"
EPOCH = "7300-1"


class Time:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class LossyStore(MemoryStore):
    """Stores, and loses the answer, when told to."""

    lose = False

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        super().put(key, data, overwrite=overwrite)
        if self.lose:
            self.lose = False
            raise StoreError("the answer was lost", transient=True)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def content(start: int, end: int) -> bytes:
    """The one log of these tests: every byte is known by its position."""
    whole = b"".join(b"%07x\n" % (n & 0xFFFFFFF) for n in range(start // 8, end // 8 + 1))
    return whole[start % 8 : start % 8 + end - start]


def write(engine: Engine, *ends: int, begin: int = 0) -> LogWriter:
    """Pieces up to these positions, an anchor a second with each."""
    sink = LogWriter(engine.repository, "db")
    since = newest(engine.repository.logs("db")[0])
    position = since.end if since else begin
    sink.begin(EPOCH, position)
    for end in ends:
        sink.anchor(at(end), end)
        sink.piece(position, end, content(position, end))
        position = end
    return sink


def read_back(repository: Repository) -> dict[int, bytes]:
    """Every chain: where it begins, and its bytes."""
    return {
        c.start: b"".join(data for _, data in read_logs(repository, c.spans))
        for c in chains(*repository.logs("db"))
    }


def keys(engine: Engine) -> list[str]:
    return [info.key for info in engine.store.list("logs/")]


@pytest.fixture
def engine() -> Engine:
    return Engine()


# --- keys ------------------------------------------------------------------------------------------------

positions = st.integers(0, 2**64 - 1)
times = st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))
names = st.from_regex(r"[A-Za-z0-9-]{1,40}", fullmatch=True)


@given(names, positions, positions, st.none() | times)
def test_a_listing_tells_everything_of_a_span(
    epoch: str, one: int, other: int, when: datetime | None
) -> None:
    store = MemoryStore()
    repository = Repository.create(store, clock=lambda: START)
    start, end = sorted([one, other])
    span = LogSpan("db", epoch, start, end, Anchor(when, end) if when else None, 3)
    repository.put_log(span, b"abc")
    marks = [LogMark("db", epoch, end, "other-1"), LogMark("db", epoch, end)]
    for mark in marks:
        repository.put_log(mark, b"")
    assert repository.logs("db") == ([span], marks)


@pytest.mark.parametrize("epoch", ["", "a/b", "a.b", "..", "a b", "ü"])
def test_an_epoch_that_cannot_be_part_of_a_key_is_refused(engine: Engine, epoch: str) -> None:
    with pytest.raises(UsageError):
        LogWriter(engine.repository, "db").begin(epoch, 0)


def test_what_is_not_ours_is_no_log(engine: Engine) -> None:
    for name in ("notes", "e/0-1-none.zst", f"e/{2:016x}-{1:016x}-none.zst", f"e/{1:016x}-{2:016x}-soon.zst"):
        engine.store.put(f"logs/db/{name}", b"mine")
    engine.store.put(f"logs/db/e/{1:016x}-{2:016x}-20261399T000000.000000Z.zst", b"no such day")
    assert engine.repository.logs("db") == ([], [])


# --- the format --------------------------------------------------------------------------------------------


@given(
    st.lists(st.binary(min_size=1, max_size=5000), max_size=5),
    st.lists(st.builds(Anchor, times, positions), max_size=5),
)
def test_an_object_is_read_as_it_was_written(chunks: list[bytes], anchors: list[Anchor]) -> None:
    codec = ZstdCodec()
    stored, size = encode(codec, chunks, anchors)
    assert size == sum(map(len, chunks))
    assert b"".join(decode(codec, stored)) == b"".join(chunks)
    header = decode_header(codec, stored)
    assert header.anchors == tuple(anchors)
    assert (header.stored, header.size) == (len(stored), size)


@settings(max_examples=200)
@given(st.data())
def test_no_flipped_bit_and_no_cut_gives_other_bytes(data: st.DataObject) -> None:
    codec = ZstdCodec()
    stored, _ = encode(codec, [content(0, 3000)], [Anchor(START, 5)])
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(stored) * 8 - 1))
        spoiled = bytearray(stored)
        spoiled[place // 8] ^= 1 << place % 8
    else:
        spoiled = bytearray(stored[: data.draw(st.integers(0, len(stored) - 1))])
    with contextlib.suppress(Damaged):
        assert b"".join(decode(codec, bytes(spoiled))) == content(0, 3000)


@given(st.binary(max_size=300))
def test_garbage_is_damage(garbage: bytes) -> None:
    with pytest.raises(Damaged):
        decode_header(ZstdCodec(), garbage)


def test_a_large_piece_is_read_in_parts(engine: Engine) -> None:
    end = FRAME + 1000
    write(engine, end)
    (span,) = engine.repository.logs("db")[0]
    assert [(s.start, s.end) for s, _ in read_span(engine.repository, span)] == [(0, FRAME), (FRAME, end)]
    assert read_back(engine.repository) == {0: content(0, end)}


def test_the_log_comes_back_with_what_the_repository_tells_to_type(tmp_path: Path) -> None:
    engine = Engine(LocalStore(tmp_path / "repository", create=True))
    sink = write(engine, 1000, 2000)
    sink.anchor(at(2500), 2000)
    sink.close()
    write(engine, 9000).gap("the end")
    told = (tmp_path / "repository" / "RECOVER.md").read_text()
    (command,) = (line for line in told.splitlines() if line.startswith("ls logs/"))
    command = command.replace("SOURCE", "db").replace("EPOCH", EPOCH)
    subprocess.run(["sh", "-ec", command], cwd=tmp_path / "repository", check=True)
    assert (tmp_path / "repository" / "log").read_bytes() == content(0, 9000)


def test_logs_of_format_1_are_read(tmp_path: Path) -> None:
    """Made by the first version that wrote any; never regenerated."""
    shutil.copytree(GOLDEN, tmp_path / "repository")
    repository = Repository.open(LocalStore(tmp_path / "repository"))
    spans, gaps = repository.logs("db")
    assert [(s.epoch, s.start, s.end, s.anchor and s.anchor.at) for s in spans] == [
        (EPOCH, 0x1000, 0x2000, at(0x2000)),
        (EPOCH, 0x2000, 0x2800, at(0x2800)),
        (EPOCH, 0x2800, 0x2800, at(0x2801)),
        (EPOCH, 0x3000, 0x3100, at(0x3100)),
    ]
    assert gaps == [LogMark("db", EPOCH, 0x2800)]
    assert read_back(repository) == {0x1000: content(0x1000, 0x2800), 0x3000: content(0x3000, 0x3100)}
    assert check_log(repository, spans[0]).anchors == (Anchor(at(0x2000), 0x2000),)


# --- the sink ------------------------------------------------------------------------------------------------


def test_pieces_are_stored_as_they_come_and_read_back_in_order(engine: Engine) -> None:
    sink = write(engine, 100, 250, 1000)
    assert read_back(engine.repository) == {0: content(0, 1000)}
    assert (sink.recorded.epoch, sink.recorded.position, sink.recorded.reach) == (EPOCH, 1000, at(1000))


def test_recording_goes_on_where_the_repository_ends(engine: Engine) -> None:
    write(engine, 100, 250)
    write(engine, 300)
    assert read_back(engine.repository) == {0: content(0, 300)}


@pytest.mark.parametrize(
    ("start", "end", "size"), [(101, 200, 99), (50, 150, 100), (100, 200, 99), (100, 100, 0)]
)
def test_a_piece_that_does_not_continue_the_one_before_is_refused(
    engine: Engine, start: int, end: int, size: int
) -> None:
    sink = write(engine, 100)
    with pytest.raises(StoreError):
        sink.piece(start, end, bytes(size))
    assert read_back(engine.repository) == {0: content(0, 100)}


def test_the_same_piece_again_is_no_mistake_but_another_in_its_place_is(engine: Engine) -> None:
    sink = write(engine, 100, 200)
    before = keys(engine)
    sink.piece(100, 200, content(100, 200))
    assert keys(engine) == before
    with pytest.raises(StoreError):
        sink.piece(100, 200, bytes(100))


def test_a_piece_whose_answer_was_lost_is_put_again_under_the_same_name() -> None:
    store = LossyStore()
    engine = Engine(store)
    sink = write(engine, 100)
    sink.anchor(at(200), 200)
    store.lose = True
    with pytest.raises(StoreError, match="lost"):
        sink.piece(100, 200, content(100, 200))
    sink.anchor(at(200.5), 200)
    sink.piece(100, 200, content(100, 200))
    assert len(keys(engine)) == 2
    sink.piece(200, 300, content(200, 300))
    assert sink.recorded.reach == at(200.5)


def test_a_recorder_that_was_started_again_after_a_lost_answer_goes_on(engine: Engine) -> None:
    store = LossyStore()
    engine = Engine(store)
    sink = write(engine, 100)
    store.lose = True
    with pytest.raises(StoreError):
        sink.piece(100, 200, content(100, 200))
    write(engine, 300)
    assert read_back(engine.repository) == {0: content(0, 300)}


def test_other_bytes_under_the_same_name_are_never_taken_for_ours(engine: Engine) -> None:
    one, other = write(engine, 100), LogWriter(engine.repository, "db")
    other.begin(EPOCH, 100)
    one.piece(100, 200, content(100, 200))
    with pytest.raises(StoreError):
        other.piece(100, 200, bytes(100))


def test_what_is_stored_last_can_be_compared_with_what_the_source_has(engine: Engine) -> None:
    """Of one piece, of several, of a large one that compaction made, and behind an anchor alone."""
    assert LogWriter(engine.repository, "db").tail(EPOCH, 10) == b""
    assert LogWriter(engine.repository, "db").last(lambda _: True) is None
    write(engine, 100, 250).close()
    assert LogWriter(engine.repository, "db").tail(EPOCH, 30) == content(220, 250)
    assert LogWriter(engine.repository, "db").tail(EPOCH, 0) == b""
    assert LogWriter(engine.repository, "db").tail(EPOCH, 200) == content(50, 250)
    assert LogWriter(engine.repository, "db").tail(EPOCH, 1000) == content(0, 250)
    assert LogWriter(engine.repository, "db").tail("another", 1000) == b""
    compact_logs(engine.repository, "db", progress=Silence())
    assert LogWriter(engine.repository, "db").tail(EPOCH, 1000) == content(0, 250)
    last = LogWriter(engine.repository, "db").last(lambda epoch: epoch == EPOCH)
    assert last
    assert last.end == 250


def test_a_writer_that_stood_still_while_another_took_over_tears_nothing(engine: Engine) -> None:
    """The source sends both the same; what both have stored overlaps, and reads as one."""
    slow = write(engine, 100)
    write(engine, 180, 320)
    slow.piece(100, 250, content(100, 250))
    slow.piece(250, 400, content(250, 400))
    assert read_back(engine.repository) == {0: content(0, 400)}
    compact_logs(engine.repository, "db", progress=Silence())
    assert read_back(engine.repository) == {0: content(0, 400)}


def test_an_anchor_counts_once_the_log_is_stored_up_to_it(engine: Engine) -> None:
    sink = write(engine, 100)
    sink.anchor(at(200), 180)
    sink.anchor(at(201), 220)
    assert sink.recorded.complete == at(100)
    sink.piece(100, 200, content(100, 200))
    assert sink.recorded.reach == sink.recorded.complete == at(200)
    sink.piece(200, 250, content(200, 250))
    assert sink.recorded.reach == at(201)
    assert chains(*engine.repository.logs("db"))[0].reach == at(201)


def test_a_piece_without_an_anchor_of_its_own_carries_the_one_before(engine: Engine) -> None:
    write(engine, 100).piece(100, 200, content(100, 200))
    sink = LogWriter(engine.repository, "db")
    sink.begin(EPOCH, 200)
    sink.piece(200, 300, content(200, 300))
    assert [s.anchor and s.anchor.at for s in engine.repository.logs("db")[0]] == [at(100)] * 3


def test_an_idle_source_gets_an_anchor_a_minute_and_one_at_the_end(engine: Engine) -> None:
    time = Time()
    sink = LogWriter(engine.repository, "db", now=time)
    sink.begin(EPOCH, 0)
    sink.piece(0, 100, content(0, 100))
    for second in range(150):
        time.now = second
        sink.anchor(at(second), 100)
        assert sink.recorded.complete == at(second)  # nothing would be lost, whatever was put
    assert [s.anchor and s.anchor.at for s in engine.repository.logs("db")[0]] == [None, at(60), at(120)]
    sink.close()
    sink.close()
    assert chains(*engine.repository.logs("db"))[0].reach == at(149)
    assert len(keys(engine)) == 4


def test_until_when_a_source_stood_still_is_stored_with_what_it_did_next(engine: Engine) -> None:
    """Else an instant of its rest would land at the rest's beginning, and what came after it would seem unknown."""
    sink = LogWriter(engine.repository, "db")
    sink.begin(EPOCH, 0)
    sink.piece(0, 100, content(0, 100))
    for second in range(30):
        sink.anchor(at(second), 100)
    sink.anchor(at(30), 150)
    sink.anchor(at(31), 200)
    sink.piece(100, 200, content(100, 200))
    *_, last = read_logs(engine.repository, engine.repository.logs("db")[0])
    known = [(at(0), 100), (at(29), 100), (at(30), 150), (at(31), 200)]
    assert [(anchor.at, anchor.position) for anchor in last[0].anchors] == known


def test_how_long_a_source_stood_still_is_known_behind_a_restart_of_the_agent_too(engine: Engine) -> None:
    """Stored alone when it stopped, and read where the log goes on."""
    for start in (0, 100):
        sink = LogWriter(engine.repository, "db")
        sink.begin(EPOCH, start)
        sink.piece(start, start + 100, content(start, start + 100))
        for second in (1, 5, 9):
            sink.anchor(at(start + second), start + 100)
        sink.close()
    (chain,) = chains(*engine.repository.logs("db"))
    read = read_logs(engine.repository, logs_for(chain, Need(EPOCH, 0, 10), at(500)))
    assert [(piece.end, [anchor.at for anchor in piece.anchors]) for piece, _ in read] == [
        (100, []), (100, [at(1), at(9)]), (200, []), (200, [at(101), at(109)]),
    ]  # fmt: skip


def test_a_source_that_never_wrote_anything_has_anchors_too(engine: Engine) -> None:
    sink = LogWriter(engine.repository, "db")
    sink.begin(EPOCH, 100)
    sink.anchor(at(7), 100)
    sink.close()
    (chain,) = chains(*engine.repository.logs("db"))
    assert (chain.start, chain.end, chain.reach) == (100, 100, at(7))
    assert [data for _, data in read_logs(engine.repository, chain.spans)] == [b""]


def test_after_a_gap_nothing_comes_before_it_begins_anew(engine: Engine) -> None:
    told: list[str] = []
    sink = LogWriter(engine.repository, "db", on_begin=lambda: told.append("begun"))
    sink.begin(EPOCH, 0)
    sink.piece(0, 100, content(0, 100))
    sink.gap("the slot was lost")
    with pytest.raises(StoreError):
        sink.piece(100, 200, content(100, 200))
    sink.begin(EPOCH, 100)
    sink.piece(100, 200, content(100, 200))
    assert read_back(engine.repository) == {0: content(0, 100), 100: content(100, 200)}
    assert (told, sink.recorded.gap) == (["begun", "begun"], "the slot was lost")


def test_a_recorder_that_finds_its_place_lost_can_say_so_before_it_begins(engine: Engine) -> None:
    write(engine, 100)
    sink = LogWriter(engine.repository, "db")
    sink.gap("the slot was lost")
    sink.begin(EPOCH, 100)
    sink.piece(100, 200, content(100, 200))
    assert len(chains(*engine.repository.logs("db"))) == 2


def test_an_anchor_right_behind_a_gap_never_prolongs_the_window_before_it(engine: Engine) -> None:
    time = Time()
    sink = LogWriter(engine.repository, "db", now=time)
    sink.begin(EPOCH, 0)
    sink.anchor(at(1), 100)
    sink.piece(0, 100, content(0, 100))
    sink.gap("lost")
    sink.begin(EPOCH, 100)
    time.now = 1000
    sink.anchor(at(500), 100)
    assert sink.recorded.complete == at(1)
    sink.close()
    assert [c.reach for c in chains(*engine.repository.logs("db"))] == [at(1)]


def test_beginning_further_on_leaves_a_mark_and_further_back_is_refused(engine: Engine) -> None:
    write(engine, 100)
    sink = LogWriter(engine.repository, "db")
    with pytest.raises(StoreError, match="goes back"):
        sink.begin(EPOCH, 50)
    sink.begin(EPOCH, 300)
    assert engine.repository.logs("db")[1] == [LogMark("db", EPOCH, 100)]


def test_a_new_epoch_may_begin_anywhere(engine: Engine) -> None:
    sink = write(engine, 100)
    sink.begin("7300-2", 60)
    sink.anchor(at(300), 80)
    sink.piece(60, 90, content(60, 90))
    assert [(c.epoch, c.start, c.reach) for c in chains(*engine.repository.logs("db"))] == [
        (EPOCH, 0, at(100)),
        ("7300-2", 60, at(300)),
    ]
    span = newest(engine.repository.logs("db")[0])
    assert span
    assert (span.epoch, span.end) == ("7300-2", 90)


def test_a_clock_that_was_set_back_closes_the_window(engine: Engine) -> None:
    sink = write(engine, 100)
    sink.anchor(at(99.5), 100)  # a little: two clocks of one machine
    sink.piece(100, 200, content(100, 200))
    assert engine.repository.logs("db")[1] == []
    sink.anchor(at(50), 250)
    sink.piece(200, 300, content(200, 300))
    assert [(c.start, c.reach) for c in chains(*engine.repository.logs("db"))] == [
        (0, at(100)),
        (200, at(50)),
    ]


# --- reading back -------------------------------------------------------------------------------------------


def test_a_reader_whose_pieces_were_put_together_meanwhile_reads_on(engine: Engine) -> None:
    ends = range(100, 1100, 100)
    write(engine, *ends)
    spans = engine.repository.logs("db")[0]
    reading = read_logs(engine.repository, spans)
    got = [next(reading), next(reading)]
    compact_logs(engine.repository, "db", progress=Silence())
    got += reading
    assert b"".join(data for _, data in got) == content(0, 1000)
    edges = [(s.start, s.end) for s, _ in got]
    ahead = [(at, at + 100) for at in range(200, edges[-1][0], 100)]
    assert len(ahead) <= 2  # were read before
    assert edges == [(0, 100), (100, 200), *ahead, (200 + 100 * len(ahead), 1000)]


def test_a_missing_piece_is_a_hole_and_never_the_end(engine: Engine) -> None:
    write(engine, 100, 200, 300)
    spans = engine.repository.logs("db")[0]
    engine.store.delete(log_key(spans[1]))
    with pytest.raises(Damaged, match="hole at 0000000000000064"):
        list(read_logs(engine.repository, spans))


def test_a_torn_object_is_known_by_its_header(engine: Engine) -> None:
    write(engine, 50_000)
    (span,) = engine.repository.logs("db")[0]
    assert isinstance(check_log(engine.repository, span), Header)
    stored = engine.repository.read_log(span)
    for torn in (stored[:-10], stored[:20], b"", stored + b"x"):
        engine.store.put(log_key(span), torn, overwrite=True)
        (listed,) = engine.repository.logs("db")[0]
        with pytest.raises(Damaged, match=r"-1/.*damaged"):
            check_log(engine.repository, listed)
    engine.store.put(log_key(replace(span, end=span.end + 1)), stored)
    with pytest.raises(Damaged, match="of the log instead of"):
        check_log(engine.repository, engine.repository.logs("db")[0][1])


# --- compaction ---------------------------------------------------------------------------------------------


def test_an_hour_of_pieces_becomes_one_object_with_its_anchors(engine: Engine) -> None:
    write(engine, *range(100, 10_100, 100))
    assert compact_logs(engine.repository, "db", progress=Silence()) == 99
    (span,) = engine.repository.logs("db")[0]
    assert (span.start, span.end, span.anchor and span.anchor.at) == (0, 10_000, at(10_000))
    assert read_back(engine.repository) == {0: content(0, 10_000)}
    assert len(check_log(engine.repository, span).anchors) == 100
    assert compact_logs(engine.repository, "db", progress=Silence()) == 0


def test_no_object_gets_larger_than_the_limit_and_no_gap_is_bridged(engine: Engine) -> None:
    sink = write(engine, *range(100, 1100, 100))
    sink.gap("lost")
    sink.begin(EPOCH, 1000)
    for start in range(1000, 2000, 100):
        sink.piece(start, start + 100, content(start, start + 100))
    compact_logs(engine.repository, "db", progress=Silence(), large=350)
    spans = engine.repository.logs("db")[0]
    assert max(s.end - s.start for s in spans) <= 350
    assert len(spans) < 12
    assert read_back(engine.repository) == {0: content(0, 1000), 1000: content(1000, 2000)}


def test_compaction_that_dies_at_any_step_opens_no_hole(engine: Engine) -> None:
    for step in range(12):
        engine = Engine()
        write(engine, *range(100, 1100, 100))
        put, delete = engine.store.put, engine.store.delete
        left = step

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        def dying_put(key: str, data: Bytes, *, overwrite: bool = False) -> None:
            if key.startswith("logs/"):
                count()
            put(key, data, overwrite=overwrite)  # noqa: B023

        def dying_delete(key: str) -> None:
            count()
            delete(key)  # noqa: B023

        engine.store.put, engine.store.delete = dying_put, dying_delete  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            compact_logs(engine.repository, "db", progress=Silence())
        engine.store.put, engine.store.delete = put, delete  # type: ignore[method-assign]
        assert read_back(engine.repository) == {0: content(0, 1000)}
        compact_logs(engine.repository, "db", progress=Silence())
        assert len(keys(engine)) == 1
        assert read_back(engine.repository) == {0: content(0, 1000)}


def test_compaction_waits_for_nobody(engine: Engine) -> None:
    write(engine, 100, 200)
    with engine.repository.lease("db"), pytest.raises(Locked):
        compact_logs(engine.repository, "db", progress=Silence())


def test_a_damaged_piece_is_never_put_together_with_others(engine: Engine) -> None:
    write(engine, 100, 200, 300)
    spans = engine.repository.logs("db")[0]
    engine.store.put(log_key(spans[1]), engine.repository.read_log(spans[0]), overwrite=True)
    before = keys(engine)
    engine.store.put(log_key(spans[1]), b"garbage", overwrite=True)
    with pytest.raises(Damaged):
        compact_logs(engine.repository, "db", progress=Silence())
    assert keys(engine) == before


def steps() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 60), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=4), st.integers(60, 200), st.integers(1, 50))
def test_whatever_was_recorded_and_put_together_reads_the_same(
    hours: list[list[int]], large: int, small: int
) -> None:
    """Pieces, idle anchors and gaps; compacted after each hour: same bytes, same reach, no more objects than before."""
    engine = Engine()
    clock = Time()
    for hour in hours:
        sink = LogWriter(engine.repository, "db", idle=0, now=clock)
        since = newest(engine.repository.logs("db")[0])
        position = since.end if since else 0
        sink.begin(EPOCH, position)
        for length in hour:
            clock.now += 1
            sink.anchor(at(clock.now), position + length)
            if length == 60:
                sink.gap("lost")
                sink.begin(EPOCH, position)
            elif length:
                sink.piece(position, position + length, content(position, position + length))
                position += length
        sink.close()
        before = (
            {c.start: c.reach for c in chains(*engine.repository.logs("db"))},
            read_back(engine.repository),
        )
        count = len(keys(engine))
        compact_logs(engine.repository, "db", progress=Silence(), large=large, small=small)
        after = (
            {c.start: c.reach for c in chains(*engine.repository.logs("db"))},
            read_back(engine.repository),
        )
        assert after == before
        assert len(keys(engine)) <= count
        for span in engine.repository.logs("db")[0]:
            check_log(engine.repository, span)
