"""Redis dumps: whole ones pass, anything else is refused, and what they hold is counted."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers import rdb
from backupd.drivers.rdb import RdbCheck, crc64
from backupd.errors import CaptureFailed


def length(n: int) -> bytes:
    if n < 64:
        return bytes([n])
    if n < 1 << 14:
        return bytes([0x40 | n >> 8, n & 0xFF])
    return b"\x80" + struct.pack(">I", n)


def string(data: bytes) -> bytes:
    return length(len(data)) + data


def dump(databases: dict[int, dict[bytes, bytes]], *, expiring: int = 0, checksum: bool = True) -> bytes:
    """An RDB with string keys, the first `expiring` of each database with a time to live."""
    out = bytearray(b"REDIS0010" + b"\xfa" + string(b"redis-ver") + string(b"7.0.15"))
    out += b"\xfa" + string(b"ctime") + b"\xc2" + struct.pack("<i", 1_700_000_000)
    for number, keys in databases.items():
        out += b"\xfe" + length(number) + b"\xfb" + length(len(keys)) + length(min(expiring, len(keys)))
        for index, (key, value) in enumerate(keys.items()):
            if index < expiring:
                out += b"\xfc" + struct.pack("<Q", 1_900_000_000_000)
            out += b"\x00" + string(key) + string(value)
    out += b"\xff"
    return bytes(out) + (struct.pack("<Q", crc64(bytes(out))) if checksum else bytes(8))


def fed(data: bytes, *sizes: int) -> rdb.RdbSummary:
    check, at = RdbCheck(), 0
    for size in sizes:
        check.feed(data[at : at + size])
        at += size
    check.feed(data[at:])
    return check.finish()


TWO = dump({0: {b"a": b"1", b"b": b"x" * 300}, 7: {b"c": b"3"}}, expiring=1)
keyspaces = st.dictionaries(
    st.integers(0, 70),
    st.dictionaries(st.binary(min_size=1, max_size=80), st.binary(max_size=400), max_size=8),
    max_size=4,
)


def test_the_checksum_is_the_one_redis_computes() -> None:
    """The check value of CRC-64/Jones."""
    assert crc64(b"123456789") == 0xE9C6D914C4B8D9CA


@given(keyspaces, st.lists(st.integers(0, 40), max_size=30))
def test_a_whole_dump_passes_in_pieces_of_any_size(
    spaces: dict[int, dict[bytes, bytes]], sizes: list[int]
) -> None:
    """However the bytes arrive, the dump is found whole and its keys are counted."""
    summary = fed(dump(spaces, expiring=1), *sizes)
    assert summary.complete and summary.checksum and summary.version == 10
    assert {n: d.keys for n, d in summary.databases.items()} == {n: len(k) for n, k in spaces.items()}
    assert summary.empty == (not any(spaces.values()))
    assert summary.aux["redis-ver"] == "7.0.15"
    assert summary.created is not None and summary.created.timestamp() == 1_700_000_000


@given(st.integers(0, len(TWO) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_found(at: int, bit: int) -> None:
    """Anywhere: magic, version, content, end marker or checksum."""
    damaged = bytearray(TWO)
    damaged[at] ^= 1 << bit
    with pytest.raises(CaptureFailed):
        fed(bytes(damaged), 7, 100)


@given(st.integers(0, len(TWO) - 1))
def test_a_dump_that_is_cut_off_is_found(size: int) -> None:
    """At any byte."""
    with pytest.raises(CaptureFailed):
        fed(TWO[:size], 11)


def test_bytes_after_the_end_are_found() -> None:
    """A dump with something appended is not the dump that was made."""
    with pytest.raises(CaptureFailed):
        fed(TWO + b"more")


def test_a_dump_without_checksum_passes_and_says_so() -> None:
    """`rdbchecksum no` writes zeros."""
    assert not fed(dump({0: {b"a": b"1"}}, checksum=False)).checksum


def test_what_is_no_dump_is_refused_at_once() -> None:
    """An error page, an AOF, a directory listing: told by its first bytes."""
    with pytest.raises(CaptureFailed, match="no RDB"):
        RdbCheck().feed(b"*2\r\n$6\r\nSELECT")


def test_expiring_keys_are_told_apart() -> None:
    """They may be gone after a restore, so they are counted on their own."""
    assert fed(TWO).databases == {0: rdb.Database(2, 1), 7: rdb.Database(1, 1)}


def test_an_unknown_type_ends_the_counting_and_not_the_check() -> None:
    """A dump of a newer server is still checked to its last byte."""
    body = b"REDIS0099\xfe\x00\xfb\x01\x00" + b"\x63" + string(b"key") + b"\x01\x02"
    summary = fed(body + b"\xff" + struct.pack("<Q", crc64(body + b"\xff")))
    assert not summary.complete
    assert summary.databases == {0: rdb.Database(1, 0)}


def test_counting_gives_up_where_no_further_database_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stepping over keys costs microseconds each; the first database needs none of it."""
    monkeypatch.setattr(rdb, "COUNT_AT_MOST", 5)
    data = dump({0: {b"%d" % n: b"v" for n in range(9)}, 3: {b"k": b"v"}})
    assert fed(data).databases.keys() == {0}
    check = RdbCheck(expected=[0, 3])
    check.feed(data)
    assert check.finish().databases.keys() == {0, 3}


def test_a_million_keys_take_seconds() -> None:
    """Measured: 4 microseconds a key; the bound is loose, to see only a change for the quadratic."""
    keys = {b"key:%07d" % n: b"value" for n in range(100_000)}
    data = dump({0: keys, 1: {b"k": b"v"}})
    begun = time.process_time()
    assert fed(data, *([1 << 14] * 160)).complete
    assert time.process_time() - begun < 3
