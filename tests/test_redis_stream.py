"""A Redis replication stream: where its commands end, and where a restore to an instant lands. No server is needed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.chain import Need, chains, logs_for
from backupd.drivers.redis import RedisDriver, RedisSettings
from backupd.drivers.redis_aof import Course, Landing, Replay
from backupd.drivers.redis_pitr import RedisPitr, shortcomings
from backupd.drivers.redis_stream import Answer, complete, select
from backupd.errors import Damaged, RestoreFailed
from backupd.logs import LogWriter, anchored, compact_logs, read_logs
from backupd.model import Anchor, Json, LogSpan, PointKind, RecoveryPoint, Silence
from backupd.repository import Repository
from backupd.stores import MemoryStore

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def command(*words: bytes) -> bytes:
    """As RESP has it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


words = st.binary(max_size=20) | st.sampled_from([b"MULTI", b"EXEC", b"\r\n", b"*1\r\n$5\r\nMULTI\r\n"])
singles = st.lists(words, max_size=3).map(lambda rest: command(b"SET", *rest)) | st.sampled_from(
    [command(b"PING"), command(b"REPLCONF", b"GETACK", b"*"), select(3)]
)
transactions = st.lists(singles, max_size=3).map(
    lambda inside: command(b"MULTI") + b"".join(inside) + command(b"EXEC")
)
whole = st.lists(singles | transactions, max_size=8)


@given(units=whole, data=st.data())
def test_a_cut_is_the_end_of_the_last_unit_that_is_whole(units: list[bytes], data: st.DataObject) -> None:
    """Wherever a stream ends: no half command, no half transaction, and not one that is whole is left out."""
    stream = b"".join(units)
    ends = [0]
    for unit in units:
        ends.append(ends[-1] + len(unit))
    at = data.draw(st.integers(0, len(stream)))
    assert complete(stream[:at]) == max(end for end in ends if end <= at)
    start = data.draw(st.sampled_from(ends))
    assert complete(stream, start) == len(stream)


@pytest.mark.parametrize("spoiled", [b"SET a 1\r\n", b"*1\r\n+OK\r\n", b"*x\r\n", b"*1\r\n$2\r\nabcd\r\n"])
def test_what_is_no_command_is_told(spoiled: bytes) -> None:
    """Rather than guessed over."""
    with pytest.raises(Damaged, match="no command at byte"):
        complete(command(b"PING") + spoiled)


def test_answers_to_psync() -> None:
    """Two kinds, one of them after a failover; anything else is none."""
    new = "a" * 40
    assert Answer.of_line("+CONTINUE") == Answer(continues=True)
    assert Answer.of_line(f"+CONTINUE {new}") == Answer(continues=True, epoch=new)
    assert Answer.of_line(f"+FULLRESYNC {new} 17") == Answer(continues=False, epoch=new, position=17)
    assert Answer.of_line("+OK") is None


# --- where a restore lands -----------------------------------------------------------------------------------

history = st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([0, 0, 1, 30])), min_size=1, max_size=30)


@given(history=history, asked=st.integers(0, 100_000))
def test_a_restore_lands_at_the_last_anchor_before_it_and_nowhere_else(
    history: list[tuple[int, int]], asked: int
) -> None:
    """Nothing that was executed after T is in it, and no anchor between is passed by. Where the server stood still,
    it lands at T itself."""
    anchors, at, position = [], NOON, 100
    for milliseconds, size in history:
        at, position = at + timedelta(milliseconds=milliseconds), position + size
        anchors.append(Anchor(at, position))
    to = NOON + timedelta(milliseconds=asked)
    course = Course(to, Anchor(NOON, 100))
    course.note(anchors)
    landing = course.landing()
    known = [Anchor(NOON, 100), *anchors]
    before = [anchor for anchor in known if anchor.at <= to]
    after = [anchor for anchor in known if anchor.at > to]
    assert landing.position == before[-1].position
    if after and after[0].position == landing.position:
        assert landing == Landing(landing.position, to)
    else:
        assert landing == Landing(landing.position, before[-1].at, after[0].at if after else None)


def point(end: int) -> RecoveryPoint:
    """A base that begins at 100."""
    attributes: dict[str, Json] = {"epoch": "e", "start": 100, "end": end}
    return RecoveryPoint("p", "s", "redis", PointKind.FULL, NOON, NOON, NOON, 1, 1, 1, attributes=attributes)


def pieces(*parts: tuple[int, bytes, tuple[Anchor, ...]]) -> list[tuple[LogSpan, bytes]]:
    return [
        (LogSpan("s", "e", start, start + len(data), None, 0, anchors), data)
        for start, data, anchors in parts
    ]


def replayed(found: list[tuple[LogSpan, bytes]], end: int, at: datetime | None) -> tuple[bytes, Landing]:
    replay = Replay(point(end), at)
    log = b"".join(replay.chunks(found))
    landing = replay.landing()
    return log[: landing.position - replay.start], landing


def test_the_log_is_replayed_from_the_base_to_the_landing_and_not_a_byte_more() -> None:
    """Also where a piece begins before the base, and where the end of the log is half a command."""
    a, b, c = command(b"SET", b"a", b"1"), command(b"INCR", b"b"), command(b"INCR", b"c")
    early = command(b"PING")
    log = pieces(
        (100 - len(early), early + a, ()),
        (100 + len(a), b + c[:5], (Anchor(NOON + SECOND, 100 + len(a + b)),)),
        (100 + len(a + b) + 5, c[5:] + b"*1\r\n", (Anchor(NOON + 2 * SECOND, 100 + len(a + b + c)),)),
    )
    end = 100 + len(a)
    assert replayed(log, end, NOON) == (a, Landing(end, NOON, NOON + SECOND))
    assert replayed(log, end, NOON + SECOND)[0] == a + b
    assert replayed(log, end, NOON + 9 * SECOND)[0] == a + b + c
    assert replayed(log, end, None) == (a + b + c, Landing(100 + len(a + b + c), NOON + 2 * SECOND))
    last = 100 + len(a + b + c)
    idle = pieces(
        (last - len(c) + 5, c[5:], log[2][0].anchors), (last, b"", (Anchor(NOON + 20 * SECOND, last),))
    )
    assert replayed(log[:2] + idle, end, NOON + 9 * SECOND)[1] == Landing(last, NOON + 9 * SECOND)
    later = pieces((log[-1][0].end, b"$4\r\nPING\r\n*1\r\n$4\r\nPI", ()))
    unknown = Landing(100 + len(a + b + c + early), None, until=NOON + 2 * SECOND)
    assert replayed(log + later, end, None) == (a + b + c + early, unknown)
    assert unknown.known == NOON + 2 * SECOND


@given(units=st.lists(singles | transactions, min_size=1, max_size=8), data=st.data())
def test_however_the_log_was_cut_into_pieces_the_same_comes_back(
    units: list[bytes], data: st.DataObject
) -> None:
    """Anchors lie where they lay, with the piece that reached them or the next; half a command may end the log."""
    ends = [100]
    for unit in units:
        ends.append(ends[-1] + len(unit))
    stream = b"".join(units) + data.draw(st.sampled_from([b"", b"*1\r\n$4"]))
    marks = data.draw(st.lists(st.sampled_from(ends[1:]), unique=True, max_size=4).map(sorted))
    anchors = [Anchor(NOON + n * SECOND, position) for n, position in enumerate(marks, 1)]
    cuts = data.draw(st.lists(st.integers(1, len(stream)), max_size=6, unique=True).map(sorted))
    log, left, before = [], list(anchors), 0
    for cut in [*cuts, len(stream)]:
        if cut > before:
            late = data.draw(st.booleans())
            known = tuple(a for a in left if a.position < 100 + cut + (not late) or cut == len(stream))
            left = left[len(known) :]
            log += pieces((100 + before, stream[before:cut], known))
            before = cut
    assert replayed(log, 100, None)[0] == b"".join(units)
    for n in range(len(anchors) + 1):
        end = [100, *marks][n]
        assert replayed(log, 100, NOON + n * SECOND + SECOND / 2)[0] == stream[: end - 100]


@given(
    history=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 3000), st.booleans()), min_size=1, max_size=20
    ),
    asked=st.integers(0, 30_000),
    compacted=st.booleans(),
)
def test_a_plan_knows_where_its_restore_will_land(
    history: list[tuple[int, int, bool]], asked: int, compacted: bool
) -> None:
    """By the headers of an object or two; also where the source stood still, and where objects were put together."""
    repository = Repository.create(MemoryStore(), clock=lambda: NOON)
    writer, now, position = LogWriter(repository, "s"), NOON, 100
    writer.begin("e", position)
    for pings, milliseconds, anchored_here in [(1, 1, False), *history]:
        data, now = command(b"PING") * pings, now + timedelta(milliseconds=milliseconds)
        if anchored_here:
            writer.anchor(now, position + len(data))
        if data:
            writer.piece(position, position + len(data), data)
        position += len(data)
    writer.close()
    if compacted:
        compact_logs(repository, "s", progress=Silence())
    (chain,) = chains(*repository.logs("s"))
    base, to = point(100), min(NOON + timedelta(milliseconds=asked), chain.reach or NOON)
    spans = logs_for(chain, Need("e", 100, 100), to)
    replay = Replay(base, to)
    for _ in replay.chunks(read_logs(repository, spans)):
        pass
    driver = RedisPitr(RedisDriver(RedisSettings()))
    assert driver.lands_at(base, anchored(repository, spans, to), to) == replay.landing().at


def test_a_log_that_does_not_reach_is_refused() -> None:
    """Too short, begun too late, with a hole, or of something else."""
    a = command(b"SET", b"a", b"1")
    for log in (
        [],
        pieces((101, a, ())),
        pieces((100, a[:9], ())),
        pieces((100, a[:9], ()), (110, a[10:], ())),
    ):
        with pytest.raises(RestoreFailed, match="this restore needs it from 100"):
            replayed(log, 100 + len(a), NOON)
    with pytest.raises(Damaged, match="no command begins at 100"):
        replayed(pieces((100, b"x" * 50, ())), 120, NOON)
    with pytest.raises(Damaged, match="no command begins at 120"):
        replayed(pieces((100, b"*" * 50, ())), 120, NOON)


# --- what check says -------------------------------------------------------------------------------------------


def test_what_a_server_lacks_is_told_with_its_fix() -> None:
    """All at once; a server that is set up well has none."""
    good = {"redis_version": "7.2.4"}, {"role": "master", "repl_backlog_size": str(64 << 20)}
    limits = {
        "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60"
    }
    assert shortcomings(*good, limits) == []
    assert shortcomings(*good, {}) == []  # the user may not ask
    bad = shortcomings(
        {"redis_version": "5.0.1"},
        {"role": "slave", "repl_backlog_size": "1048576"},
        {"client-output-buffer-limit": "replica 1048576 0 0", "min-replicas-to-write": "1"},
    )
    assert [problem.fatal for problem in bad] == [True, False, False, False, False]
    assert all(problem.hint for problem in bad)
    assert "repl-backlog-size is 1024 KiB" in bad[1].message
