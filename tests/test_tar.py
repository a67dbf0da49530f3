"""What the tar room writes, every other tar reads back byte for byte; what they write, it reads."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tars import Pipe, read_all
from trees import (
    ACCESS_ACL,
    acl,
)

from backupd.archive.tar import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    END,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    acl_from_text,
    acl_to_text,
    file_header,
    header,
    padding,
)
from backupd.archive.tar.read import TarEntry, TarReader
from backupd.errors import Damaged

# --- names and numbers as they come --------------------------------------------------------------------

components = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b"..")
)
names = st.lists(components, min_size=1, max_size=5).map(b"/".join)
links = st.binary(min_size=1, max_size=400).filter(lambda link: b"\0" not in link)
ids = st.one_of(st.integers(0, 0o7777777), st.integers(0, 2**32 - 2))
times = st.one_of(st.integers(0, 2 * 10**18), st.integers(-(2**31) * 10**9, 2**34 * 10**9))
xattr_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60).map(
    lambda text: b"user." + text.encode()
)
xattrs = st.dictionaries(xattr_names, st.binary(max_size=300), max_size=4)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """A sparse map and the file's size."""
    found = []
    at = 0
    for hole, length in draw(st.lists(st.tuples(st.integers(1, 2**36), st.integers(1, 3000)), max_size=60)):
        found.append((at + hole, length))
        at += hole + length
    return found, at + draw(st.integers(0, 2**36))


@st.composite
def entries(draw: st.DrawFn) -> tuple[TarEntry, bytes]:
    """An entry and the data behind it."""
    kind = draw(st.sampled_from([FILE, HARDLINK, SYMLINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO]))
    entry = TarEntry(
        draw(names),
        kind,
        draw(st.integers(0, 0o7777)),
        draw(ids),
        draw(ids),
        0,
        draw(times),
        xattrs=draw(xattrs),
    )
    data = b""
    if kind == FILE:
        if draw(st.booleans()):
            entry.sparse, entry.size = draw(pieces())
            data = b"s" * sum(length for _, length in entry.sparse)
        else:
            data = draw(st.binary(max_size=2000))
            entry.size = len(data)
    elif kind == SYMLINK:
        entry.link = draw(links)
    elif kind == HARDLINK:
        entry.link = draw(names)
    elif kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
        entry.device = draw(st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)))
    entry.stored = len(data)
    return entry, data


def written(entry: TarEntry, *, exact_time: bool = True) -> bytes:
    return header(
        entry.name,
        entry.typeflag,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.size,
        entry.mtime_ns,
        link=entry.link,
        device=entry.device,
        xattrs=entry.xattrs,
        sparse=entry.sparse,
        exact_time=exact_time,
    )


def archive(members: list[tuple[TarEntry, bytes]]) -> bytes:
    return b"".join(written(entry) + data + padding(len(data)) for entry, data in members) + END


# --- our headers, our reader ---------------------------------------------------------------------------


@given(st.lists(entries(), max_size=8), st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(members: list[tuple[TarEntry, bytes]], step: int) -> None:
    """Any entry survives, however the stream is cut into reads."""
    assert list(read_all(TarReader(Pipe(archive(members), step)))) == members  # type: ignore[arg-type]


@given(names, st.integers(0, 0o7777), ids, ids, st.integers(0, 2**40), st.integers(-(2**31), 2**34))
def test_the_quick_header_says_the_same_as_the_full_one(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int
) -> None:
    """The fast path is no second format."""
    assert file_header(name, mode, uid, gid, size, mtime) == header(
        name, FILE, mode, uid, gid, size, mtime * 10**9
    )


def test_a_plain_file_costs_one_block() -> None:
    """No pax header where ustar says it all: also for names beyond ASCII, and up to 256 bytes by a prefix."""
    for name in (b"a", b"n" * 100, b"caf\xe9", b"p" * 155 + b"/" + b"n" * 100):
        assert len(file_header(name, 0o644, 1000, 1000, 10, 1_700_000_000)) == 512
    assert len(file_header(b"n" * 101, 0o644, 0, 0, 0, 0)) == 512 * 3


def test_unread_data_is_skipped() -> None:
    """A caller may take part of the data, or none."""
    members = [
        (TarEntry(b"f%d" % n, FILE, 0o644, 0, 0, 3000, 0, stored=3000), bytes([n]) * 3000) for n in range(5)
    ]
    reader = TarReader(Pipe(archive(members), 700))  # type: ignore[arg-type]
    seen = []
    for number, entry in enumerate(reader):
        seen.append(entry.name)
        view = bytearray(500 * number)
        assert bytes(view[: reader.readinto(view)]) in bytes([number]) * 3000
    assert seen == [b"f0", b"f1", b"f2", b"f3", b"f4"]


def test_a_producer_that_fails_behind_the_end_is_heard() -> None:
    """The exit status of the tar behind a pipe shows at the end of its stream: it is read to there."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if not data:
                raise RuntimeError("tar ended with 2")
            return data

    with pytest.raises(RuntimeError, match="ended with 2"):
        list(TarReader(Failing(END + bytes(20 * 512))))


# --- damage --------------------------------------------------------------------------------------------


@given(st.lists(entries(), min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_cut_short_is_damaged_wherever_it_is_cut(
    members: list[tuple[TarEntry, bytes]], data: st.DataObject
) -> None:
    """A tar without its closing blocks is never taken for a whole one."""
    whole = archive(members)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(Damaged, match="at byte"):
        list(TarReader(io.BytesIO(whole[:cut])))


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_flipped_byte_in_a_header_is_damaged(where: int, change: int) -> None:
    """Each header carries a checksum over itself; the field that holds it is no exception."""
    whole = bytearray(file_header(b"a/name", 0o644, 1000, 1000, 0, 1_700_000_000) + END)
    before = list(TarReader(io.BytesIO(whole)))
    whole[where] ^= change
    try:
        # The checksum's own blanks and digits have more than one writing of the same number.
        assert 148 <= where < 156
        assert list(TarReader(io.BytesIO(whole))) == before
    except (Damaged, AssertionError):
        with pytest.raises(Damaged):
            list(TarReader(io.BytesIO(whole)))


@given(st.binary(max_size=4000))
def test_bytes_that_are_no_tar_are_damaged(noise: bytes) -> None:
    """Never another exception, whatever comes."""
    assume(any(noise[:512]) or len(noise) < 1024)
    with pytest.raises(Damaged):
        list(TarReader(io.BytesIO(noise)))


@given(st.binary(max_size=300))
def test_a_pax_header_of_noise_is_damaged_or_ignored(noise: bytes) -> None:
    """Lengths and numbers in it are not trusted."""
    extended = bytearray(header(b"h", FILE, 0o644, 0, 0, len(noise), 0))
    extended[156:157] = b"x"
    extended[148:156] = b" " * 8
    extended[148:156] = b"%06o\0 " % sum(extended)
    stream = bytes(extended) + noise + padding(len(noise)) + file_header(b"f", 0o644, 0, 0, 0, 0) + END
    try:
        list(TarReader(io.BytesIO(stream)))
    except Damaged as error:
        assert "at byte" in error.message


@pytest.mark.parametrize("name", [b"../x", b"/etc/passwd", b"a/../../x", b".."])
def test_a_name_that_leads_out_of_the_tree_is_refused(name: bytes) -> None:
    """Nobody may write beside the place of a restore."""
    with pytest.raises(Damaged, match="out of the tree"):
        list(TarReader(io.BytesIO(header(name, FILE, 0o644, 0, 0, 0, 0) + END)))
    with pytest.raises(Damaged, match="out of the tree"):
        list(TarReader(io.BytesIO(header(b"h", HARDLINK, 0o644, 0, 0, 0, 0, link=name) + END)))


# --- Python's tarfile ----------------------------------------------------------------------------------


@given(st.lists(entries(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_python_reads_the_same(members: list[tuple[TarEntry, bytes]]) -> None:
    """An independent reader agrees on every field it knows."""
    with tarfile.open(fileobj=io.BytesIO(archive(members)), errors="surrogateescape") as tar:
        seen = tar.getmembers()
        assert len(seen) == len(members)
        for info, (entry, data) in zip(seen, members, strict=True):
            assert os.fsencode(info.name) == entry.name
            assert (
                info.type == (entry.typeflag if not entry.sparse else tarfile.GNUTYPE_SPARSE)
                or info.issparse()
            )
            assert (info.mode, info.uid, info.gid) == (entry.mode, entry.uid, entry.gid)
            assert info.mtime == pytest.approx(entry.mtime_ns / 1e9, abs=1e-3)
            assert os.fsencode(info.linkname) == entry.link
            if entry.typeflag == FILE and not entry.sparse:
                file = tar.extractfile(info)
                assert file is not None
                assert entry.sparse is not None or file.read() == data
            if entry.device != (0, 0):
                assert (info.devmajor, info.devminor) == entry.device


@given(
    st.lists(
        st.tuples(st.sampled_from([2, 8]), st.integers(0, 7), st.integers(0, 2**32 - 2)),
        max_size=5,
        unique=True,
    )
)
def test_an_acl_is_the_same_as_text_and_as_attribute(named: list[tuple[int, int, int]]) -> None:
    """The text is what `tar --acls` knows, the attribute what Linux keeps."""
    plain = [(1, 6, 2**32 - 1), (4, 4, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1)]
    value = acl(*sorted(plain + named))
    assert acl_from_text(acl_to_text(value)) == value


def test_an_acl_for_a_name_without_a_number_is_told_not_guessed() -> None:
    """`user:alice` means nothing on another machine."""
    with pytest.raises(ValueError, match="alice"):
        acl_from_text(b"user::rw-,user:alice:r--,group::r--,mask::r--,other::---")
    assert acl_from_text(b"user::rw-\nuser:alice:r--:1234\ngroup::r--\nmask::r--\nother::---\n") == ACCESS_ACL
