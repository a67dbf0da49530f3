"""PostgreSQL's log and base backups as bytes: what is made of them, whatever the pieces they come in."""

from __future__ import annotations

import io
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from captured import Held
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.drivers.postgres_base import one_tar
from backupd.drivers.postgres_physical import PhysicalSource, PostgresPhysical
from backupd.drivers.postgres_recorder import beginning, comparable, fork_of
from backupd.drivers.postgres_recovery import (
    Replayed,
    Target,
    configuration,
    replaying,
    syncing,
    wal_files,
)
from backupd.drivers.postgres_replication import (
    ServerRefused,
    System,
    base_backup_command,
    position_of,
    position_text,
    server_from_url,
)
from backupd.drivers.postgres_slot import slot_name
from backupd.drivers.postgres_wal import (
    PAGE,
    Ended,
    Segments,
    Transactions,
    history,
    segment_name,
    segment_position,
)
from backupd.errors import CaptureFailed, ContainerError, Damaged, RestoreFailed
from backupd.model import Anchor, LogSpan, PointKind, RecoveryPoint

MIB = 1 << 20
SEGMENT = MIB
BEGIN = datetime(2026, 11, 26, 12, tzinfo=UTC)
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


# --- a log, written as the server's headers say -----------------------------------------------------------


def record(*, transaction: int, manager: int, info: int, data: bytes) -> bytes:
    """One record, without its checksum, padded to a multiple of 8."""
    mark = struct.pack("<BB", 255, len(data)) if len(data) < 256 else struct.pack("<BI", 254, len(data))
    length = 24 + len(mark) + len(data)
    whole = struct.pack("<IIQBBxxI", length, transaction, 0, info, manager, 0) + mark + data
    return whole + bytes(-len(whole) % 8)


def commit(transaction: int, at: datetime, info: int = 0) -> bytes:
    """A commit or abort with its time."""
    microseconds = round((at - EPOCH) / timedelta(microseconds=1))
    return record(transaction=transaction, manager=1, info=info, data=struct.pack("<q", microseconds))


def other(size: int) -> bytes:
    """A record of something else."""
    return record(transaction=7, manager=10, info=0, data=b"\x5a" * size)


def written(records: Sequence[bytes], start: int = 0, timeline: int = 1) -> bytes:
    """The records as a server lays them on pages, from a segment's front on."""
    out = bytearray()
    for one in records:
        left = memoryview(one)
        while left:
            if len(out) % PAGE == 0:
                rest = len(left) if len(left) < len(one) else 0
                info = (2 if len(out) % SEGMENT == 0 else 0) | (1 if rest else 0)
                out += struct.pack("<HHIQI4x", 0xD113, info, timeline, start + len(out), rest)
                out += struct.pack("<QII", 4711, SEGMENT, PAGE) if info & 2 else b""
            room = PAGE - len(out) % PAGE
            out += left[:room]
            left = left[room:]
    return bytes(out)


def cut(data: bytes, sizes: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Pieces of the given sizes, over and over."""
    at = number = 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        yield at, data[at : at + size]
        at, number = at + size, number + 1


# --- transactions ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 20_000), st.none()), max_size=30),
    st.lists(st.integers(20, 30_000), min_size=1, max_size=5),
)
def test_every_end_of_a_transaction_is_found_however_the_log_is_cut(
    plan: list[int | None], sizes: list[int]
) -> None:
    """A number is a record of that much other data, None a commit."""
    records, expected = [], []
    for number, size in enumerate(plan):
        if size is None:
            expected.append(Ended(number, BEGIN + timedelta(milliseconds=number), True))
            records.append(commit(number, expected[-1].at))
        else:
            records.append(other(size))
    start = 5 * SEGMENT
    reader = Transactions()
    found = [one for at, data in cut(written(records, start), sizes) for one in reader.feed(start + at, data)]
    assert found == expected


def test_reading_takes_hold_again_behind_a_hole() -> None:
    """From the next page on, also in the middle of a long record."""
    log = written([other(20_000), commit(1, BEGIN), other(20_000), commit(2, BEGIN)])
    reader = Transactions()
    assert [one.transaction for one in reader.feed(9000, log[9000:])] == [1, 2]
    reader = Transactions()
    assert reader.feed(0, log[:100]) == []
    assert [one.transaction for one in reader.feed(3 * PAGE, log[3 * PAGE :])] == [2]


def test_aborts_and_prepared_transactions_end_too_and_others_do_not() -> None:
    log = written([commit(n, BEGIN, info) for n, info in enumerate((0x80, 0x10, 0x20, 0x30, 0x40, 0x50))])
    found = [(one.transaction, one.committed) for one in Transactions().feed(0, log)]
    assert found == [(0, True), (2, False), (3, True), (4, False)]


def test_zeros_behind_a_switch_of_segments_hold_nothing() -> None:
    log = written([commit(1, BEGIN)])
    log += bytes(SEGMENT - len(log))
    reader = Transactions()
    assert [one.transaction for one in reader.feed(0, log)] == [1]
    assert [one.transaction for one in reader.feed(SEGMENT, written([commit(2, BEGIN)], SEGMENT))] == [2]


# --- segments -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1000, 700_000), min_size=1, max_size=5), st.integers(1, 3 * SEGMENT))
def test_pieces_become_whole_segments(sizes: list[int], length: int) -> None:
    """Whatever their sizes; the last one is filled up with zeros."""
    data = bytes(range(256)) * (length // 256) + bytes(length % 256)
    start = 3 * SEGMENT
    segments = Segments(SEGMENT, 16)
    made = [
        (name, bytes(content))
        for at, piece in cut(data, sizes)
        for name, content in segments.add("4711-1", start + at, piece)
    ]
    made += [(name, bytes(content)) for name, content in segments.finish()]
    assert [name for name, _ in made] == [
        segment_name(1, start + n * SEGMENT, SEGMENT) for n in range(-(-length // SEGMENT))
    ]
    whole = b"".join(content for _, content in made)
    assert whole[:length] == data
    assert not any(whole[length:])


def test_a_segment_has_the_name_the_server_gives_it() -> None:
    assert segment_name(1, position_of("16/B374D848"), 16 * MIB) == "0000000100000016000000B3"
    assert segment_name(10, position_of("2/1000000"), 64 * MIB) == "0000000A0000000200000000"
    assert position_text(position_of("16/B374D848")) == "16/B374D848"


def test_a_log_that_begins_inside_a_segment_gets_the_headers_that_are_read_before_it() -> None:
    """Of the segment's first page, and of the page the log begins in."""
    log = written([other(90_000)])
    begin = 3 * PAGE + 100
    segments = Segments(SEGMENT, 16)
    assert list(segments.add("4711-1", begin, log[begin:])) == []
    ((_, made),) = segments.finish()
    assert made[:40] == log[:40]
    magic, info, timeline, address, left = struct.unpack_from("<HHIQI", made, 3 * PAGE)
    assert (magic, info, timeline, address, left) == (0xD113, 0, 1, 3 * PAGE, 0)
    assert made[begin : len(log)] == log[begin:]


def test_a_hole_in_the_log_and_another_clusters_log_are_refused() -> None:
    segments = Segments(SEGMENT, 16)
    list(segments.add("4711-1", 0, bytes(100)))
    with pytest.raises(Damaged, match="hole"):
        list(segments.add("4711-1", 108, bytes(8)))
    with pytest.raises(Damaged, match="another cluster"):
        list(segments.add("4712-1", 100, bytes(8)))


def test_a_new_timeline_begins_with_what_the_segment_held() -> None:
    """The old one's segment stands as it is; the history file tells where it ended."""
    segments = Segments(SEGMENT, 16)
    list(segments.add("4711-1", 0, b"a" * 100))
    ((old, before),) = ((name, bytes(one)) for name, one in segments.add("4711-2", 100, b"b" * 50))
    ((new, after),) = segments.finish()
    assert (old, new) == (segment_name(1, 0, SEGMENT), segment_name(2, 0, SEGMENT))
    assert before == b"a" * 100 + bytes(SEGMENT - 100)
    assert after[:150] == b"a" * 100 + b"b" * 50
    text = history("", segments.switches)
    assert fork_of(text, 1) == 100
    assert fork_of(history(text, [(2, 300)]), 1) == 100


# --- where recording begins -------------------------------------------------------------------------------


def since(end: int, epoch: str = "4711-1") -> LogSpan:
    return LogSpan("s", epoch, 0, end, None, end)


NOW = System("4711", 2, 900 * MIB)


def test_recording_goes_on_exactly_where_the_repository_ends() -> None:
    begun = beginning(since(100, "4711-2"), NOW, 0, SEGMENT, lambda _: None)
    assert (begun.epoch, begun.position, begun.gap) == ("4711-2", 100, "")


def test_recording_begins_at_the_front_of_the_segment_that_the_slot_holds() -> None:
    begun = beginning(None, NOW, 5 * SEGMENT + 17, SEGMENT, lambda _: None)
    assert (begun.epoch, begun.position, begun.gap) == ("4711-2", 5 * SEGMENT, "")


def test_an_older_timeline_is_recorded_to_its_end_first() -> None:
    begun = beginning(since(100), NOW, 0, SEGMENT, {1: 200}.get)
    assert (begun.epoch, begun.position, begun.gap) == ("4711-1", 100, "")


@pytest.mark.parametrize(
    ("span", "told"),
    [
        (since(300), "left timeline 1"),
        (since(100, "4711-3"), "left timeline 3"),
        (since(100, "4712-2"), "another cluster"),
    ],
)
def test_what_does_not_continue_the_repository_is_a_gap(span: LogSpan, told: str) -> None:
    begun = beginning(span, NOW, 7 * SEGMENT, SEGMENT, {1: 200}.get)
    assert told in begun.gap
    assert (begun.epoch, begun.position) == ("4711-2", 7 * SEGMENT)


def test_a_server_that_is_not_as_far_as_it_was_is_refused() -> None:
    """Its positions would mean two things; a standby that lags comes there by itself."""
    with pytest.raises(ServerRefused, match="before what was recorded") as raised:
        beginning(since(901 * MIB, "4711-2"), NOW, 7 * SEGMENT, SEGMENT, {1: 200}.get)
    assert "promote" in raised.value.hint


@given(st.integers(SEGMENT, 200 * SEGMENT), st.integers(SEGMENT, 200 * SEGMENT))
def test_only_what_the_server_still_has_is_compared_where_its_slot_proves_nothing(
    position: int, held: int
) -> None:
    """The slot's own segment and all behind it; of what the slot left behind, the segment before and no more."""
    sizes = comparable(position, held, SEGMENT)
    assert sizes == sorted(sizes)
    first = held if held <= position else position - SEGMENT
    assert position - sizes[-1] >= min(first // SEGMENT, (position - 1) // SEGMENT) * SEGMENT
    assert sizes[-1] > 0 or held == position


def test_at_a_segments_front_what_lies_before_it_is_compared_unless_the_slot_stands_there() -> None:
    front = 5 * SEGMENT
    assert comparable(front, front, SEGMENT) == [0]
    assert comparable(front, front - 1, SEGMENT) == [0, 8192, SEGMENT]
    assert comparable(front, 3 * SEGMENT + 5, SEGMENT) == [0, 8192, 2 * SEGMENT]
    assert comparable(front, front + 40, SEGMENT) == [0, 8192, SEGMENT]
    assert comparable(front + 100, front + 100, SEGMENT) == [100]
    assert comparable(front + 9000, front - 1, SEGMENT) == [8192, 8192, SEGMENT + 9000]
    assert comparable(9 << 30, 5, SEGMENT)[-1] == 32 * MIB


def test_a_slot_is_named_after_its_source_and_no_two_sources_share_one() -> None:
    assert slot_name("orders") == "backupd_orders"
    assert slot_name("my-orders") != slot_name("my_orders")
    assert all(len(slot_name(name)) < 64 for name in ("x" * 200, "Ü-ber", ""))


def test_why_a_server_was_not_reached_is_told_in_one_line() -> None:
    """libpq adds a question, and a line for each address it tried."""
    with pytest.raises(ServerRefused, match=r"port 1 failed: .*[Rr]efused$"):
        server_from_url("postgresql://u@127.0.0.1:1/d?connect_timeout=2").connect()


# --- targets --------------------------------------------------------------------------------------------

POINT = RecoveryPoint(
    id="p", source="s", driver="postgres", kind=PointKind.FULL, instant=BEGIN, started=BEGIN, finished=BEGIN,
    size=1, stored=1, members=1,
    attributes={"epoch": "4711-1", "start": 0, "end": 200, "major": 16, "wal_segment_size": SEGMENT},
)  # fmt: skip


def seconds(number: float) -> datetime:
    return BEGIN + timedelta(seconds=number)


def replay(at: datetime | None, *records: bytes) -> Replayed:
    """What the log of these records says."""
    log = written([other(300), *records])
    seen = Replayed(at)
    span = LogSpan("s", "4711-1", 0, len(log), None, len(log))
    list(wal_files([(span, log)], POINT, seen))
    return seen


def test_a_time_is_a_target_only_where_a_transaction_ended_after_it() -> None:
    """Else PostgreSQL replays all and then refuses: its target was not reached."""
    log = [commit(1, seconds(1)), commit(2, seconds(2))]
    assert Target(seconds(1.5)).setting(POINT, replay(seconds(1.5), *log)) == {
        "recovery_target_time": "2026-11-26 12:00:01.500000+00"
    }
    assert Target(seconds(2)).setting(POINT, replay(seconds(2), *log)) == {}
    assert Target(seconds(9)).setting(POINT, replay(seconds(9), *log)) == {}


def test_what_is_lost_is_known_before_the_server_starts() -> None:
    seen = replay(seconds(1.5), commit(1, seconds(1)), commit(2, seconds(2), 0x20), commit(3, seconds(3)))
    assert seen.last == Ended(1, seconds(1), True)
    assert seen.stop == Ended(2, seconds(2), False)
    assert seen.left_out == Ended(3, seconds(3), True)


def test_a_position_at_the_end_of_the_log_is_no_target_and_one_behind_it_is_refused() -> None:
    seen = replay(None, commit(1, BEGIN))
    assert Target(lsn=position_text(seen.end)).setting(POINT, seen) == {}
    assert Target(lsn="0/F0").setting(POINT, seen) == {"recovery_target_lsn": "0/F0"}
    with pytest.raises(RestoreFailed, match="log ends at"):
        Target(lsn=position_text(seen.end + 8)).setting(POINT, seen)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (Target(seconds(-1)), "consistent"),
        (Target(lsn="0/10"), "before the end of the base"),
        (Target(lsn="here"), "no position"),
        (Target(xid="x"), "no transaction"),
        (Target(BEGIN, xid="5"), "one target"),
    ],
)
def test_a_target_that_cannot_be_is_refused(target: Target, told: str) -> None:
    with pytest.raises(RestoreFailed, match=told) as failure:
        target.refuse(POINT)
    assert failure.value.hint


def test_a_log_that_does_not_cover_the_base_is_refused() -> None:
    late = LogSpan("s", "4711-1", 8, 400, None, 392)
    early = LogSpan("s", "4711-1", 0, 100, None, 100)
    with pytest.raises(RestoreFailed, match="is not there"):
        list(wal_files([(late, bytes(392))], POINT, Replayed(None)))
    with pytest.raises(RestoreFailed, match="ends at 0/64"):
        list(wal_files([(early, bytes(100))], POINT, Replayed(None)))


def test_only_the_log_around_the_target_is_searched() -> None:
    """A span whose anchor is long before the target holds no stop."""
    seen = Replayed(seconds(60))
    spans = [LogSpan("s", "4711-1", 0, 1, Anchor(seconds(at), 1), 1) for at in (10, 54, 55, 70)]
    assert [seen.matters(span) for span in spans] == [False, False, True, True]


def test_the_target_that_is_set_comes_last_in_the_configuration() -> None:
    """PostgreSQL takes them one by one, and refuses a second one that is set."""
    text = configuration("recovery_target_xid = '5'\nwork_mem = '8MB'", {"recovery_target_name": "it's"})
    lines = text.splitlines()
    assert lines[1] == "work_mem = '8MB'"
    assert lines[-1] == "recovery_target_name = 'it''s'"
    assert lines.index("recovery_target_xid = ''") > lines.index("recovery_target_xid = '5'")
    assert "archive_mode = 'off'" in lines


@pytest.mark.parametrize(
    ("major", "kernel", "at_once"),
    [(13, (6, 1), False), (14, (5, 7), False), (14, (5, 8), True), (18, (6, 12), True), (18, (), False)],
)
def test_files_are_synced_at_once_where_failures_are_told(
    major: int, kernel: tuple[int, ...], at_once: bool
) -> None:
    """Version 13 does not know the setting, Linux before 5.8 says nothing of a write that failed."""
    assert bool(syncing(major, kernel)) == at_once


# --- how a base backup is asked for -------------------------------------------------------------------------


@given(st.sampled_from([130000, 140000, 150000, 170000, 180000]), st.integers(0, 1 << 45), st.booleans())
def test_a_base_backup_is_limited_as_far_as_a_server_takes_it(version: int, rate: int, verify: bool) -> None:
    """32 kB to 1 GB a second; each version in its own syntax."""
    text = base_backup_command(version, label="x", verify=verify, max_rate=rate)
    words = re.split(r"[ ,()]+", text)
    if "MAX_RATE" in words:
        kilobytes = int(words[words.index("MAX_RATE") + 1])
        assert 32 <= kilobytes <= 1 << 20
        assert kilobytes << 10 <= max(rate, 32 << 10)
    else:
        assert rate == 0 or rate > 1 << 30
    assert ("(" in text) == (version >= 150000)
    assert ("NOVERIFY_CHECKSUMS" in text or "VERIFY_CHECKSUMS false" in text) != verify


# --- a base backup's tars ---------------------------------------------------------------------------------


def server_tar(files: dict[str, bytes], *, ended: bool) -> bytes:
    """As the server writes one; before version 15 it has no end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid = len(content), 999, 998
            tar.addfile(info, io.BytesIO(content))
        end = out.tell()
    return out.getvalue()[:end] + (bytes(1024) if ended else b"")


@settings(deadline=None)
@given(st.lists(st.integers(20, 3000), min_size=1, max_size=4), st.booleans())
def test_the_servers_tars_become_one(sizes: list[int], ended: bool) -> None:
    """However their bytes come; tablespaces lie below pg_tblspc."""
    parts = {
        "16400": server_tar({"PG_16_1/5/1": b"x" * 9000, "PG_16_1/5/2": b""}, ended=ended),
        "": server_tar({"PG_VERSION": b"16\n", "base/5/1": b"y" * 8192}, ended=ended),
        "backup_manifest": b"{}",
    }
    messages = [(part, data) for part, whole in parts.items() for _, data in cut(whole, sizes)]
    made = b"".join(one_tar(messages, {"pg_wal/00000002.history": "1\t0/1\tx\n", "no": ""}))
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
        owners = {(one.uid, one.gid) for one in tar}
    assert found == {
        "pg_tblspc/16400/PG_16_1/5/1": b"x" * 9000, "pg_tblspc/16400/PG_16_1/5/2": b"", "PG_VERSION": b"16\n",
        "base/5/1": b"y" * 8192, "pg_wal/00000002.history": b"1\t0/1\tx\n", "backup_manifest": b"{}",
    }  # fmt: skip
    assert owners == {(999, 998)}


@given(st.integers(1, 2 * 512 + 8192 - 1))
def test_a_tar_that_is_cut_short_is_no_base_backup(length: int) -> None:
    whole = server_tar({"base/5/1": b"y" * 8192, "b": b""}, ended=False)
    if length % 512 or length == 512:
        with pytest.raises(CaptureFailed, match="cut short"):
            list(one_tar([("", whole[:length])], {}))


# --- while it recovers ------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 33), st.sampled_from([1, 16, 64, 1024]), st.integers(1, 99))
def test_a_segments_name_says_where_it_begins(position: int, mebibytes: int, timeline: int) -> None:
    size = mebibytes * MIB
    assert (
        segment_position(segment_name(timeline, position * 1000, size), size)
        == position * 1000 // size * size
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "150 57 postgres: startup recovering 000000010000000000000004   \n",
            "replayed 42 of 50 MB of the log, 2 s",
        ),
        (
            "0 1 postgres: main: startup   recovering 000000010000000000000004\n",
            "replayed 42 of 50 MB of the log, 0 s",
        ),
        ("0 1 postgres: startup recovering 0000000100000000000000FF\n", "replayed 50 of 50 MB"),
        ("150 57 postgres: startup \n", "starting, 2 s"),
        ("", ""),
    ],
)
def test_a_recovering_server_says_how_far_it_is(said: str, told: str) -> None:
    report = '{"log_start": "0/1800000", "log_end": "0/47B0080", "segment": 16777216}\n'
    assert replaying(said + report).startswith(told)
    assert bool(replaying(said + report)) == bool(told)


@given(st.text())
def test_whatever_a_container_prints_is_no_failure(said: str) -> None:
    replaying(said)
    replaying(f"1 1 postgres: startup recovering {said}\n{said}")


# --- into a container -------------------------------------------------------------------------------------


class Still:
    """A container that was never started: what is written into it, by path."""

    name = "still"
    env: ClassVar = {"PGDATA": "/var/lib/postgresql/18/docker"}
    kernel = (6, 1)

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int, int]] = {}
        self.order: list[str] = []

    def mount(self, destination: str, *, whole: bool = False) -> None:
        """Out of reach."""

    def read(self, path: str) -> Iterator[bytes]:
        if path != "/etc/passwd":
            raise ContainerError(f"{path} is not there")
        yield server_tar({"passwd": b"root:x:0:0::/:\npostgres:x:70:71::/:/bin/sh\n"}, ended=True)

    def write(self, path: str, tar: Iterator[bytes]) -> None:
        with tarfile.open(fileobj=io.BytesIO(b"".join(tar))) as reading:
            for entry in reading:
                content = reading.extractfile(entry)
                name = f"{path}/{entry.name}"
                self.files[name] = (content.read() if content else b"/", entry.uid, entry.mode)
                self.order.append(name)


def test_a_base_and_its_log_lie_where_a_fresh_server_looks() -> None:
    """Its own user owns all; tablespaces are inside; PG_VERSION, which makes it a cluster, is written last."""
    parts = {
        "16400": server_tar({"PG_16_1/5/1": b"x" * 9000}, ended=True),
        "": server_tar(
            {
                "PG_VERSION": b"18\n", "base/5/1": b"y" * 8192, "standby.signal": b"", "backup_label": b"label",
                "tablespace_map": b"16400 /mnt/fast\n", "postgresql.auto.conf": b"work_mem = '8MB'\n",
            },
            ended=True,
        ),
    }  # fmt: skip
    made = b"".join(one_tar(list(parts.items()), {}))
    log = written([other(300), commit(1, seconds(1)), commit(2, seconds(3))])
    span = LogSpan("s", "4711-1", 0, len(log), None, len(log))
    container = Still()
    driver = PostgresPhysical(PhysicalSource("s", lambda: pytest.fail("a restore needs no source")))
    driver.load_to(Held(POINT, {}, made), iter([(span, log)]), seconds(2), container)  # type: ignore[arg-type]
    data = "/var/lib/postgresql/18/docker"
    assert {uid for _, uid, _ in container.files.values()} == {70}
    assert container.files[f"{data}/"[:-1]][2] == 0o700
    assert container.files[f"{data}/base/5/1"][0] == b"y" * 8192
    assert container.files[f"{data}/backupd_tablespaces/16400/PG_16_1/5/1"][0] == b"x" * 9000
    assert (
        container.files[f"{data}/tablespace_map"][0] == f"16400 {data}/backupd_tablespaces/16400\n".encode()
    )
    assert container.files[f"{data}/pg_wal/{segment_name(1, 0, SEGMENT)}"][0][: len(log)] == log
    assert f"{data}/standby.signal" not in container.files
    assert f"{data}/recovery.signal" in container.files
    assert f"{data}/postgresql.conf" in container.files
    auto = container.files[f"{data}/postgresql.auto.conf"][0].decode()
    assert auto.startswith("work_mem = '8MB'\n")
    assert auto.endswith("recovery_target_time = '2026-11-26 12:00:02.000000+00'\n")
    assert "recovery_target_timeline = '1'\n" in auto
    assert container.order[-1] == f"{data}/PG_VERSION"
