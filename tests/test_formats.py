"""The parts of the repository format, each on its own: read as written, and damage is called damage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.archive.cut import ContentCutter, Cutter, FixedCutter, block_size, is_paged
from backupd.archive.known import KnownContent
from backupd.archive.pack import BLOB, PackBuilder, decode_directory, directory_length
from backupd.archive.page import decode_page, encode_page, pieces_of
from backupd.codec import ZstdCodec
from backupd.errors import Damaged

CODEC = ZstdCodec()


# --- codec --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=5000))
def test_what_is_encoded_is_decoded(data: bytes) -> None:
    stored = CODEC.encode(data)
    assert CODEC.decode(stored, len(data)) == data
    assert CODEC.decode_unsized(stored, limit=5000) == data


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_in_a_frame_is_damage_or_changes_nothing(data: bytes, draw: st.DataObject) -> None:
    stored = bytearray(CODEC.encode(data))
    at = draw.draw(st.integers(0, len(stored) * 8 - 1))
    stored[at // 8] ^= 1 << at % 8
    with contextlib.suppress(Damaged):
        assert CODEC.decode(bytes(stored), len(data)) == data


def test_a_frame_that_promises_the_moon_is_not_believed() -> None:
    stored = CODEC.encode(bytes(1 << 20))
    with pytest.raises(Damaged):
        CODEC.decode_unsized(stored, limit=1000)
    with pytest.raises(Damaged):
        CODEC.decode(stored, 1 << 19)


# --- packs ----------------------------------------------------------------------------------------------------

frames = st.lists(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=6), max_size=5)


@given(frames)
def test_a_pack_tells_what_lies_in_it(contents: list[list[bytes]]) -> None:
    builder = PackBuilder("00/0000")
    for blobs in contents:
        rows, at = [], 0
        for blob in blobs:
            rows.append(BLOB.pack(at, len(blob), CODEC.digest(blob)))
            at += len(blob)
        builder.add_frame(CODEC.encode(b"".join(blobs)), at, rows)
        builder.add_page(CODEC.encode(b"{}"))
    view, length = builder.finish(CODEC)
    data = bytes(view)
    assert directory_length(data[-16:]) == length
    directory = decode_directory(data[-length:], CODEC)
    assert directory.count == sum(len(blobs) for blobs in contents)
    for number, blobs in enumerate(contents):
        frame = directory.frames[number]
        plain = CODEC.decode(data[frame.offset : frame.offset + frame.length], frame.size)
        first = directory.starts()[number]
        for index, blob in enumerate(blobs):
            offset, size, digest = BLOB.unpack_from(directory.blobs, (first + index) * BLOB.size)
            assert plain[offset : offset + size] == blob
            assert CODEC.digest(blob) == digest


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_directory_is_called_damage(draw: st.DataObject) -> None:
    builder = PackBuilder("00/0000")
    builder.add_frame(CODEC.encode(b"content"), 7, [BLOB.pack(0, 7, CODEC.digest(b"content"))])
    view, length = builder.finish(CODEC)
    data = bytes(view)
    frame = bytearray(data[-length:])
    at = draw.draw(st.integers(0, len(frame) * 8 - 1))
    frame[at // 8] ^= 1 << at % 8
    try:
        decode_directory(bytes(frame), CODEC)
    except Damaged:
        return
    # zstd's header has a few bits that mean nothing; whatever passes must say the same.
    assert decode_directory(bytes(frame), CODEC).blobs == decode_directory(data[-length:], CODEC).blobs


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_directory(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode_directory(data, CODEC)


# --- index pages ------------------------------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=20).map(
    lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_"))
).filter(lambda name: name not in (".", ".."))  # fmt: skip
pieces = st.lists(
    st.tuples(st.sampled_from(["a/0000", "b/0001"]), st.integers(0, 9), st.integers(1, 9)).map(list)
)


@given(st.lists(st.tuples(names, pieces), max_size=5), st.lists(names, max_size=3))
def test_a_page_is_read_as_it_was_written(
    members: list[tuple[str, list[list[object]]]], path: list[str]
) -> None:
    rows = [[name, 0o100644, 1, 2, 3, 4, 5, 6, 1, content] for name, content in members]
    data, packs = encode_page([("/".join(path), None, rows)])
    page = decode_page(data)
    assert page.packs == packs
    ((where, own, found),) = page.dirs
    assert (where, own) == ("/".join(path), None)
    assert [(row[0], pieces_of(row, page.packs)) for row in found] == [
        (n, list(map(list, c))) for n, c in members
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../etc/passwd", "/etc", "a\0b"])
def test_a_name_that_leads_elsewhere_is_damage(name: str) -> None:
    row = [name, 0o100644, 0, 0, 0, 0, 0, 0, 1, []]
    with pytest.raises(Damaged):
        decode_page(json.dumps({"packs": [], "dirs": [["", None, [row]]]}).encode())


@pytest.mark.parametrize("first", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_a_hard_link_to_elsewhere_is_damage(first: str) -> None:
    row = ["name", 0o100644, 0, 0, 0, 0, 0, 0, 2, None, {"hardlink": first}]
    with pytest.raises(Damaged):
        decode_page(json.dumps({"packs": [], "dirs": [["", None, [row]]]}).encode())


@pytest.mark.parametrize("path", ["..", "a/../b", "/etc", "a//b", "a/", "./a"])
def test_a_path_that_leads_elsewhere_is_damage(path: str) -> None:
    with pytest.raises(Damaged):
        decode_page(json.dumps({"packs": [], "dirs": [[path, None, []]]}).encode())


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i))
)
def test_any_other_json_is_no_page(data: object) -> None:
    with pytest.raises(Damaged):
        decode_page(json.dumps(data).encode())


# --- cutting and finding ----------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 45))
def test_blobs_grow_with_the_position_and_still_fit_into_a_frame(position: int) -> None:
    size = block_size(position)
    assert 16384 <= size <= 262144
    assert size & (size - 1) == 0


@pytest.mark.parametrize("make", [FixedCutter, ContentCutter])
@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 70_001, 2 << 20])
def test_cuts_lose_no_byte(make: type[FixedCutter] | type[ContentCutter], size: int) -> None:
    cutter: Cutter = make()
    view = memoryview(random.Random(size).randbytes(size))
    lengths = cutter.cut(view, 0, last=True)
    assert sum(lengths) == size
    assert all(lengths)
    assert sum(make().cut(view, 0, last=False)) <= size


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=400, unique=True))
def test_content_is_found_again_by_its_digest_and_no_other(digests: list[bytes]) -> None:
    half = len(digests) // 2
    known = KnownContent()
    for number, digest in enumerate(digests[:half]):
        known.add_pack(f"p{number % 3}", BLOB.pack(0, 1, digest), number)
    for number, digest in enumerate(digests[:half]):
        assert known.find(digest) == (f"p{number % 3}", number)
    for digest in digests[half:]:
        assert known.find(digest) is None


def test_the_table_of_known_content_stays_within_its_bound() -> None:
    known = KnownContent(limit=1000)
    rows = b"".join(BLOB.pack(0, 1, random.Random(number).randbytes(16)) for number in range(3000))
    known.add_pack("p", rows)
    assert len(known) == 1000
    assert known.full
    assert known.find(random.Random(5).randbytes(16)) == ("p", 5)
    assert known.find(random.Random(2999).randbytes(16)) is None


# --- what is written over in place ---------------------------------------------------------------------------------


def test_a_file_of_pages_is_known_by_its_head(tmp_path: Path) -> None:
    """SQLite's by a real file's; PostgreSQL's by the header of an empty page as its bufpage.h lays it out."""
    database = sqlite3.connect(tmp_path / "a.db")
    database.execute("CREATE TABLE t (x)")
    database.close()
    assert is_paged((tmp_path / "a.db").read_bytes()[:24])
    assert is_paged(struct.pack("<QHHHHHHI", 0, 0, 0, 24, 8192, 8192, 8192 | 4, 0))
    assert not any(is_paged(head) for head in (b"#!/bin/sh\n", b"", bytes(24)))
