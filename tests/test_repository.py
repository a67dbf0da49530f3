"""The repository: keys, manifests, and what is not ours."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from engine import START, Engine
from hypothesis import given
from hypothesis import strategies as st
from trees import describe, make_every_kind

from backupd.errors import Damaged, NoRecoveryPoint, RepositoryMissing, UsageError
from backupd.model import PointKind, RecoveryPoint
from backupd.repository import Manifest, PackRef, PageRef, Repository, decode_manifest, encode_manifest
from backupd.stores import LocalStore, MemoryStore


def clock() -> datetime:
    return START


def test_a_repository_is_made_once() -> None:
    store = MemoryStore()
    made = Repository.create(store, clock=clock)
    assert Repository.open(store).id == made.id
    with pytest.raises(UsageError, match="already"):
        Repository.create(store, clock=clock)


def test_where_there_is_no_repository_it_is_said() -> None:
    with pytest.raises(RepositoryMissing) as raised:
        Repository.open(MemoryStore())
    assert raised.value.exit_code == 10
    assert raised.value.hint


@pytest.mark.parametrize("head", [b"", b"{", b"[]", b'{"format": 1}', b'{"format":1,"id":3,"codec":"zstd"}'])
def test_a_head_that_cannot_be_read_is_damage(head: bytes) -> None:
    store = MemoryStore()
    store.put("backupd-repository.json", head)
    with pytest.raises(Damaged):
        Repository.open(store)


def test_a_newer_format_or_codec_is_refused_with_a_way_out() -> None:
    for change in ({"format": 2}, {"codec": "sealed"}):
        store = MemoryStore()
        store.put(
            "backupd-repository.json", json.dumps({"format": 1, "id": "x", "codec": "zstd"} | change).encode()
        )
        with pytest.raises(UsageError) as raised:
            Repository.open(store)
        assert "recover.py" in raised.value.hint


def test_points_are_found_by_their_first_digits(tmp_path: Path) -> None:
    engine = Engine()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    first, second = engine.write(tmp_path / "tree"), engine.write(tmp_path / "tree")
    assert engine.repository.find(first.id[:8]).id == first.id
    assert engine.repository.find(second.id).instant == second.instant
    for nothing in ("", "zzz", "../../etc"):
        with pytest.raises(NoRecoveryPoint):
            engine.repository.find(nothing)


def test_what_is_not_ours_is_not_read(tmp_path: Path) -> None:
    engine = Engine()
    engine.store.put("points/tree/notes.txt", b"mine")
    engine.store.put("points/loose", b"mine")
    assert engine.repository.points() == []
    assert engine.repository.sources() == []


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "ü", "a b", "x" * 101])
def test_a_name_that_cannot_be_part_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Engine().repository.points(name)


def test_a_repository_copied_with_cp_restores(tmp_path: Path) -> None:
    make_every_kind(tmp_path / "tree")
    engine = Engine(LocalStore(tmp_path / "one", create=True))
    point = engine.write(tmp_path / "tree")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    engine.repository = Repository.open(LocalStore(tmp_path / "two"))
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(tmp_path / "tree")


def test_a_local_repository_copied_into_a_bucket_restores(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content" * 1000)
    engine = Engine(LocalStore(tmp_path / "one", create=True))
    point = engine.write(tmp_path / "tree")
    other = MemoryStore()
    for info in engine.store.list():
        other.put(info.key, engine.store.get(info.key))
    engine.repository = Repository.open(other)
    assert describe(engine.restore(point, tmp_path / "restored")) == describe(tmp_path / "tree")


times = st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))
texts = st.text(max_size=20)
points = st.builds(
    RecoveryPoint, id=st.from_regex(r"[0-9a-f]{12}", fullmatch=True), source=st.just("a"), driver=texts,
    kind=st.sampled_from(PointKind), instant=times, started=times, finished=times, size=st.integers(0, 2**60),
    stored=st.integers(0, 2**60), members=st.integers(0, 2**40), warnings=st.lists(texts, max_size=3).map(tuple),
    facts=st.dictionaries(texts, st.integers() | texts | st.lists(st.booleans())),
    attributes=st.dictionaries(texts, texts),
)  # fmt: skip


@given(points, st.booleans())
def test_a_manifest_is_read_as_it_was_written(point: RecoveryPoint, ordered: bool) -> None:
    packs = (PackRef("00aa/0000", 99, 9, "ff"), PackRef("00aa/0001", 98, 8, "fe"))
    pages = (PageRef("s", "00aa/0001", 1, 2, 3, "d", "\udcff\x01", ("00aa/0000", "00aa/0001"), 4, 5),)
    manifest = Manifest(point, "zstd", ordered, pages, packs)
    assert decode_manifest(json.loads(json.dumps(encode_manifest(manifest)))) == manifest


@given(
    st.recursive(
        st.none() | st.integers() | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
    )
)
def test_any_other_json_is_no_manifest(data: object) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
        decode_manifest(data)  # type: ignore[arg-type]


def test_points_are_sorted_by_their_instant_and_not_by_their_id(tmp_path: Path) -> None:
    engine = Engine()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    written = []
    for _ in range(6):
        written.append(engine.write(tmp_path / "tree"))
        engine.now += timedelta(hours=1)
    assert [p.id for p in engine.repository.points()] == [p.id for p in written]
