"""The archive engine: what goes in comes out, whatever it is, and is stored once."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import describe, make_beyond_path_max, make_every_kind

from backupd.archive.extract import Extraction
from backupd.archive.frames import FrameReader
from backupd.archive.page import Page
from backupd.errors import CommandFailed, Damaged, Interrupted, NoRecoveryPoint, RestoreFailed
from backupd.model import Bytes, Member, MemberType, Silence, Stream, Streams, TarStream
from backupd.stores import LocalStore


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("every") / "tree"
    make_every_kind(root)
    return root


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def packs(engine: Engine) -> list[bytes]:
    names = sorted(name for name, _ in engine.repository.packs(engine.source))
    return [engine.store.get(f"packs/{engine.source}/{name}.zst") for name in names]


def test_a_tree_with_every_kind_of_entry_comes_back_as_it_was(every_kind: Path, tmp_path: Path) -> None:
    engine = Engine()
    point = engine.write(every_kind)
    assert point.warnings == ()
    assert engine.written is not None
    assert engine.written.sockets == 1
    restored = engine.restore(point, tmp_path / "restored")
    assert describe(restored) == describe(every_kind)


def test_a_second_run_opens_no_unchanged_file_and_stores_nothing(
    every_kind: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    os.sync()
    threading.Event().wait(0.1)  # so that no entry is young enough to be read again for its clock's sake
    engine.write(every_kind)
    opened: list[object] = []
    plain_open = os.open

    def watched(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if not flags & os.O_DIRECTORY:
            opened.append(path)
        return plain_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    point = engine.write(every_kind)
    monkeypatch.undo()
    assert opened == []
    assert point.stored == 0
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(every_kind)


def test_one_changed_file_stores_about_one_file(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for directory in range(20):
        (root / f"{directory:02d}").mkdir(parents=True)
        for number in range(50):
            (root / f"{directory:02d}" / f"{number:02d}").write_bytes(noise(4000, directory * 100 + number))
    engine = Engine()
    first = engine.write(root)
    (root / "07" / "13").write_bytes(noise(5000, 99_999))
    second = engine.write(root)
    assert first.stored > 1000 * 4000
    assert second.stored < 5000 + 40_000  # the file, its page and the directory of the pack
    assert describe(engine.restore(second, tmp_path / "second")) == describe(root)
    assert (engine.restore(first, tmp_path / "first") / "07" / "13").read_bytes() == noise(4000, 713)


def test_content_that_moved_or_came_back_is_not_stored_again(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "large").write_bytes(noise(3_000_000))
    (root / "small").write_bytes(noise(100_000, 2))
    engine = Engine()
    engine.write(root)
    (root / "elsewhere").mkdir()
    (root / "large").rename(root / "elsewhere" / "renamed")
    (root / "small").write_bytes(noise(100_000, 3))
    engine.write(root)
    (root / "small").write_bytes(noise(100_000, 2))
    (root / "copy").write_bytes(noise(3_000_000))
    third = engine.write(root)
    assert third.stored < 20_000
    assert describe(engine.restore(third, tmp_path / "restored")) == describe(root)


@pytest.mark.parametrize(("size", "most"), [(300_000, 100_000), (8_000_000, 200_000)], ids=str)
def test_an_insertion_at_the_front_of_a_large_file_stores_little(
    size: int, most: int, tmp_path: Path
) -> None:
    """Whether it comes whole into memory or piece by piece."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "dump").write_bytes(noise(size))
    engine = Engine()
    engine.write(root)
    (root / "dump").write_bytes(b"one more byte" + noise(size))
    point = engine.write(root)
    assert point.stored < most
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(root)


@pytest.mark.parametrize("size", [300_000, 8_000_000])
def test_pages_changed_in_place_store_about_those_pages(size: int, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    data = bytearray(b"SQLite format 3\0" + noise(size))
    (root / "db.sqlite3").write_bytes(data)
    engine = Engine()
    engine.write(root)
    data[size // 2 : size // 2 + 10] = b"0123456789"
    (root / "db.sqlite3").write_bytes(data)
    point = engine.write(root)
    assert point.stored < 16384 + 20_000
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(root)


def test_streams_come_back_whole_and_a_second_dump_stores_what_is_new(tmp_path: Path) -> None:
    old, new = noise(9_000_000), noise(300_000, 5)

    def dump(data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), 123_457):
            yield data[at : at + 123_457]

    engine = Engine()
    engine.write(
        Streams([Stream("a.dump", dump(old)), Stream("empty", iter(())), Stream("b ü.sql", dump(new))])
    )
    point = engine.write(Streams([Stream("a.dump", dump(old[:4_000_000] + new + old[4_000_000:]))]))
    assert point.stored < 600_000
    assert b"".join(engine.archive(point).read("a.dump")) == old[:4_000_000] + new + old[4_000_000:]
    first = engine.repository.points("tree")[0]
    archive = engine.archive(first)
    assert [(m.name, m.size) for m in archive.members()] == [
        ("a.dump", 9_000_000), ("b ü.sql", 300_000), ("empty", 0)
    ]  # fmt: skip
    assert b"".join(archive.read("empty")) == b""
    with pytest.raises(NoRecoveryPoint):
        b"".join(archive.read("nothing"))


def test_a_stream_that_ends_badly_makes_no_point() -> None:
    def dies() -> Iterator[bytes]:
        yield noise(5_000_000)
        raise CommandFailed("pg_dump was killed")

    engine = Engine()
    before = set(threading.enumerate())
    with pytest.raises(CommandFailed):
        engine.write(Streams([Stream("a.dump", dies())]))
    assert engine.repository.points() == []
    assert set(threading.enumerate()) <= before


def test_the_packs_of_a_first_run_are_a_plain_tar(every_kind: Path, tmp_path: Path) -> None:
    engine = Engine()
    engine.write(every_kind)
    plain = subprocess.run(
        ["zstd", "-dc"], input=b"".join(packs(engine)), capture_output=True, check=True
    ).stdout
    target = tmp_path / "untarred"
    target.mkdir()
    subprocess.run(
        ["tar", "x", "--numeric-owner", "--same-permissions", "--xattrs", "--xattrs-include=*", "-C", target],
        input=plain, check=True,
    )  # fmt: skip
    found, wanted = describe(target), describe(every_kind)
    assert found.keys() == wanted.keys()
    for name, entry in wanted.items():
        for field in entry.keys() - {"mtime", "sparse", "holes", "xattrs"}:
            assert found[name][field] == entry[field], (name, field)


def test_the_parts_of_a_streams_first_run_make_the_stream(tmp_path: Path) -> None:
    data = noise(7_000_000)
    engine = Engine()
    engine.write(Streams([Stream("a.dump", iter([data]))]))
    plain = subprocess.run(
        ["zstd", "-dc"], input=b"".join(packs(engine)), capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert b"".join(tar.extractfile(m).read() for m in tar) == data  # type: ignore[union-attr]


def test_the_tar_of_a_point_is_the_tree(every_kind: Path, tmp_path: Path) -> None:
    engine = Engine()
    point = engine.write(every_kind)
    target = tmp_path / "untarred"
    target.mkdir()
    with subprocess.Popen(
        ["tar", "x", "--numeric-owner", "-p", "--xattrs", "--xattrs-include=*", "-C", target],
        stdin=subprocess.PIPE,
    ) as tar:
        assert tar.stdin is not None
        for chunk in engine.archive(point).tar():
            tar.stdin.write(chunk)
    assert tar.returncode == 0
    found, wanted = describe(target), describe(every_kind)
    for name, entry in wanted.items():
        for field in entry.keys() - {"holes", "sparse"}:
            if entry["type"] == "l" and field in ("xattrs", "mtime"):
                continue  # GNU tar sets neither on a symlink from a pax header of ours; extract does
            assert found[name][field] == entry[field], (name, field)


def test_a_member_stands_in_the_tar_as_the_reader_wants_it(tmp_path: Path) -> None:
    """Under another name and owner, or not at all; without the end, entries can follow."""
    tree = tmp_path / "tree"
    (tree / "kept").mkdir(parents=True)
    contents = {"kept/large": noise(5 << 20), "kept/small": b"s" * 700, "left": b"out", "last": b""}
    for name, content in contents.items():
        (tree / name).write_bytes(content)
    engine = Engine()

    def moved(member: Member) -> Member | None:
        return None if member.name == "left" else member._replace(name=f"to/{member.name}", uid=70, gid=71)

    open_ended = b"".join(engine.archive(engine.write(tree)).tar(moved, end=False))
    assert len(open_ended) % 512 == 0
    more = tarfile.TarInfo("more").tobuf()
    with tarfile.open(fileobj=io.BytesIO(open_ended + more + bytes(1024))) as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar if one.isfile()}  # type: ignore[union-attr]
        owners = {(one.uid, one.gid) for one in tar.getmembers() if one.name != "more"}
    del contents["left"]
    assert found == {f"to/{name}": content for name, content in contents.items()} | {"more": b""}
    assert owners == {(70, 71)}


def test_a_tar_from_elsewhere_becomes_the_same_archive(every_kind: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        ["tar", "c", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner",
         "-C", every_kind, "."],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as tar:  # fmt: skip
        assert tar.stdout is not None
        engine = Engine()
        point = engine.write(TarStream(tar.stdout))  # type: ignore[arg-type]
    restored = describe(engine.restore(point, tmp_path / "restored"))
    wanted = describe(every_kind)
    assert restored.keys() == wanted.keys()
    for name, entry in wanted.items():
        for field in entry.keys() - {"xattrs"} if entry["type"] == "l" else entry.keys():
            assert restored[name][field] == entry[field], (name, field)


def test_paths_longer_than_the_kernel_takes_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "deep"
    assert make_beyond_path_max(root) > 4096
    engine = Engine()
    point = engine.write(root)
    restored = engine.restore(point, tmp_path / "restored")
    assert describe(restored) == describe(root)


def test_one_file_is_found_among_many(every_kind: Path) -> None:
    engine = Engine()
    point = engine.write(every_kind)
    archive = engine.archive(point)
    files = [m for m in archive.members() if m.type in (MemberType.FILE, MemberType.HARDLINK)]
    for member in files:
        with open(every_kind / member.name, "rb") as file:
            assert b"".join(archive.read(member.name)) == file.read(), member.name


# --- while others write -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5000, 3_000_000], ids=["small", "large"])
def test_a_file_that_vanishes_leaves_the_rest_whole_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    for name in ("a", "b", "c"):
        (root / name).write_bytes(noise(size))
    _before_opening(monkeypatch, "b", (root / "b").unlink)
    engine = Engine()
    point = engine.write(root)
    assert [w.split(":")[0] for w in point.warnings] == ["b"]
    restored = engine.restore(point, tmp_path / "restored")
    assert sorted(p.name for p in restored.iterdir()) == ["a", "c"]
    assert (restored / "c").read_bytes() == noise(size)


@pytest.mark.parametrize("size", [5000, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_all_the_time_leaves_the_rest_whole_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, change: str
) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    for name in ("a", "b", "c"):
        (root / name).write_bytes(noise(size))
    rounds = iter(range(1000))

    def meddle() -> None:
        number = next(rounds)
        with open(root / "b", "r+b") as file:
            if change == "grow":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            elif change == "shrink":
                file.truncate(size - 100 * (number + 1))
            else:
                file.write(b"%d" % number)
            file.flush()
            os.utime(file.fileno(), ns=(number, number))

    _at_every_read(monkeypatch, root / "b", meddle)
    engine = Engine()
    point = engine.write(root)
    assert [w for w in point.warnings if w.startswith("b: changed")]
    assert len(point.warnings) == 1
    restored = engine.restore(point, tmp_path / "restored")
    assert (restored / "a").read_bytes() == (restored / "c").read_bytes() == noise(size)
    assert (restored / "b").exists()
    monkeypatch.undo()
    again = engine.write(root)  # what was caught in the act is read again, though its times may look the same
    assert again.warnings == ()
    assert describe(engine.restore(again, tmp_path / "again")) == describe(root)


def _before_opening(monkeypatch: pytest.MonkeyPatch, name: str, action: object) -> None:
    plain_open = os.open
    done: list[bool] = []

    def meddling(path: Any, *rest: Any, **more: Any) -> int:
        if path == name and not done:
            done.append(True)
            action()  # type: ignore[operator]
        return plain_open(path, *rest, **more)

    monkeypatch.setattr(os, "open", meddling)


def _at_every_read(monkeypatch: pytest.MonkeyPatch, path: Path, action: object) -> None:
    inode = path.stat().st_ino
    plain_readv = os.readv

    def meddling(fd: int, buffers: list[memoryview]) -> int:
        if os.fstat(fd).st_ino == inode:
            action()  # type: ignore[operator]
        return plain_readv(fd, buffers)

    monkeypatch.setattr(os, "readv", meddling)


# --- damage and bad ends ------------------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_in_a_pack_is_found_before_it_is_handed_out(
    every_kind: Path, tmp_path: Path
) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(40):
        (source / str(number)).write_bytes(noise(3000, number))
    (source / "large").write_bytes(noise(2_500_000))
    engine = Engine()
    point = engine.write(source)
    wanted = describe(source)
    ((name, info),) = engine.repository.packs("tree")
    key = f"packs/tree/{name}.zst"
    whole = engine.store.get(key)
    spots = random.Random(3).sample(range(info.size), 60)
    caught = 0
    for number, at in enumerate(spots):
        engine.store.put(key, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :], overwrite=True)
        try:
            found = describe(engine.restore(point, tmp_path / f"restored-{number}"))
        except Damaged:
            caught += 1
        else:
            assert found == wanted  # the byte was padding or a tar header of the plain first run
    assert caught > 50


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("", ["stolen", 0o100644, 0, 0, 0, 0, 0, 0, 2, None, {"hardlink": "way/secret"}]),
        ("way", ["planted", 0o100644, 0, 0, 0, 0, 0, 0, 1, []]),
        ("way/deeper", ["planted", 0o100644, 0, 0, 0, 0, 0, 0, 1, []]),
    ],
    ids=["hard link", "file", "directory"],
)
def test_no_forged_index_leads_through_a_symlink_out_of_the_target(
    tmp_path: Path, path: str, row: list[Any]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("not yours")
    engine = Engine()
    engine.write(Streams([Stream("a", iter([b"x"]))]))
    manifest = engine.repository.manifests("tree")[0]
    way = ["way", 0o120777, 0, 0, 0, 0, 0, 0, 1, str(outside)]
    first, second = Page([], [("", None, [way])]), Page([], [(path, None, [row])])
    extraction = Extraction(tmp_path / "target", FrameReader(engine.repository, manifest), Silence())
    many = [
        Page([], [("", None, [[f"{n}", *way[1:]] for n in range(20_000)])])
    ]  # so that the symlink is there by then
    with pytest.raises((Damaged, RestoreFailed)):
        extraction.run([first, *many, second])
    assert sorted(p.name for p in outside.iterdir()) == ["secret"]
    assert not (tmp_path / "target" / "stolen").exists()


def test_a_restore_into_a_directory_that_holds_something_is_refused(every_kind: Path, tmp_path: Path) -> None:
    engine = Engine()
    point = engine.write(every_kind)
    (tmp_path / "precious").write_text("keep")
    with pytest.raises(RestoreFailed, match="is not empty"):
        engine.restore(point, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_run_that_is_told_to_stop_ends_and_leaves_no_thread(every_kind: Path) -> None:
    engine = Engine()
    engine.stop.set()
    before = set(threading.enumerate())
    with pytest.raises(Interrupted):
        engine.write(every_kind)
    assert engine.repository.points() == []
    assert set(threading.enumerate()) <= before


def test_what_an_interrupted_run_stored_is_used_by_the_next(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for directory in range(12):
        (root / str(directory)).mkdir(parents=True)
        for number in range(60):
            (root / str(directory) / str(number)).write_bytes(noise(40_000, directory * 100 + number))
    os.sync()
    threading.Event().wait(0.1)
    engine = Engine()
    engine.write(root, commit=False)  # as if killed right before its manifest
    point = engine.write(root)
    assert point.stored == 0
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(root)


def test_an_error_of_the_store_ends_the_run_with_that_error(tmp_path: Path, every_kind: Path) -> None:
    store = LocalStore(tmp_path / "repository", create=True)
    engine = Engine(store)

    def refuse(key: str, data: Bytes, *, overwrite: bool = False) -> None:
        raise OSError(28, "No space left on device")

    store.put = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        engine.write(every_kind)
    assert engine.repository.points() == []


# --- any content ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([b"", b"a", b"0123456789" * 999, noise(70_000), noise(1_500_000, 9)]),
                         max_size=5), min_size=1, max_size=4))  # fmt: skip
def test_any_row_of_streams_in_any_number_of_runs_comes_back(runs: list[list[bytes]]) -> None:
    engine = Engine()
    points = [
        engine.write(Streams([Stream(f"s{number}", iter([data])) for number, data in enumerate(streams)]))
        for streams in runs
    ]
    for point, streams in zip(points, runs, strict=True):
        archive = engine.archive(point)
        assert [b"".join(archive.read(f"s{number}")) for number in range(len(streams))] == streams
