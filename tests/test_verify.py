"""Verify names every damage, and the points that need what is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine import Engine

from backupd.errors import StoreError
from backupd.model import ObjectInfo, Silence
from backupd.verify import VerifyReport, verify


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    root = tmp_path / "tree"
    root.mkdir()
    engine = Engine()
    for number in range(3):
        (root / f"{number}").write_bytes(random.Random(number).randbytes(50_000))
        (root / f"large-{number}").write_bytes(random.Random(-number).randbytes(2_000_000))
        engine.write(root)
    return engine


def look(engine: Engine, percent: float = 0) -> VerifyReport:
    return verify(engine.repository, sources=None, data_percent=percent, progress=Silence())


def pack_keys(engine: Engine) -> list[str]:
    return [info.key for info in engine.store.list("packs/")]


def test_what_is_whole_has_no_problems(engine: Engine) -> None:
    report = look(engine, 100)
    assert report.problems == []
    assert report.points == 3
    assert report.bytes_read > 6_000_000


def test_a_missing_pack_is_named_with_the_points_that_need_it(engine: Engine) -> None:
    newest = engine.repository.points("tree")[-1]
    key = next(key for key in pack_keys(engine) if newest.id in key)
    engine.store.delete(key)
    (problem,) = look(engine).problems
    assert "is missing" in problem
    assert newest.id in problem
    assert "needed by 1 point" in problem


def test_a_pack_of_the_wrong_length_is_named(engine: Engine) -> None:
    key = pack_keys(engine)[0]
    engine.store.put(key, engine.store.get(key)[:-1000], overwrite=True)
    assert any("instead of" in problem for problem in look(engine).problems)


def test_a_flipped_byte_in_the_content_is_found_when_data_is_read(engine: Engine) -> None:
    for key in pack_keys(engine):
        whole = engine.store.get(key)
        at = 30_000
        engine.store.put(key, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], overwrite=True)
        assert look(engine, 100).problems
        engine.store.put(key, whole, overwrite=True)
    assert look(engine, 100).problems == []


def test_a_flipped_byte_in_a_directory_is_found_without_reading_data(engine: Engine) -> None:
    for key in pack_keys(engine):
        whole = engine.store.get(key)
        for at in (len(whole) - 5, len(whole) - 100):
            engine.store.put(key, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], overwrite=True)
            assert look(engine).problems
        engine.store.put(key, whole, overwrite=True)


def test_a_manifest_of_garbage_does_not_hide_the_rest(engine: Engine) -> None:
    key = next(info.key for info in engine.store.list("points/"))
    engine.store.put(key, b"garbage", overwrite=True)
    report = look(engine, 100)
    assert report.points == 2
    assert [key in problem for problem in report.problems] == [True]


def test_a_share_of_the_data_reads_a_share_of_it(engine: Engine) -> None:
    some, everything = look(engine, 30), look(engine, 100)
    assert some.problems == everything.problems == []
    assert some.bytes_read < everything.bytes_read


def test_a_store_that_cannot_be_listed_is_an_error_and_no_finding(engine: Engine) -> None:
    def broken(prefix: str = "") -> list[ObjectInfo]:
        raise StoreError("no answer")

    engine.store.list = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(StoreError):
        look(engine)
