"""Prune removes what retention names, after the manifests that needed it, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from engine import Engine
from trees import describe

from backupd.errors import Damaged, Locked, StoreError
from backupd.model import ObjectInfo, Silence
from backupd.prune import GRACE, plan_prune, prune
from backupd.retention import Policy
from backupd.stores import LocalStore, MemoryStore
from backupd.verify import verify

KEEP_TWO = {"tree": Policy(last=2)}


class DatedStore(MemoryStore):
    """Objects as old as a test wants them."""

    def __init__(self, now: datetime) -> None:
        super().__init__()
        self.now = now

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            yield ObjectInfo(info.key, info.size, self.now)


def grow(root: Path, number: int) -> None:
    root.mkdir(exist_ok=True)
    (root / "stays").write_bytes(random.Random(0).randbytes(20_000))
    (root / "changes").write_bytes(random.Random(-number).randbytes(30_000))


def five_points(engine: Engine, root: Path) -> None:
    for number in range(5):
        grow(root, number)
        engine.write(root)
        engine.now += timedelta(days=1)


def keys(engine: Engine) -> set[str]:
    return {info.key for info in engine.store.list() if not info.key.startswith("leases/")}


def test_points_beyond_the_policy_go_and_the_rest_still_restores(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    before = keys(engine)
    report = prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert [v.keep for v in report.verdicts] == [False, False, False, True, True]
    assert report.bytes_freed > 0
    assert {key for key in keys(engine) if key.startswith("points/")} < before
    points = engine.repository.points("tree")
    assert len(points) == 2
    assert verify(engine.repository, sources=None, data_percent=100, progress=Silence()).problems == []
    assert describe(engine.restore(points[-1], tmp_path / "restored")) == describe(tmp_path / "tree")


def test_a_dry_run_says_the_same_and_touches_nothing(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    before = keys(engine)
    told = prune(engine.repository, KEEP_TWO, clock=engine.clock, dry_run=True, progress=Silence())
    assert keys(engine) == before
    done = prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert [(v.point.id, v.keep) for v in told.verdicts] == [(v.point.id, v.keep) for v in done.verdicts]
    assert told.bytes_freed == done.bytes_freed
    after = prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert after.objects_removed == 0


def test_a_source_without_a_policy_keeps_everything(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    before = keys(engine)
    prune(engine.repository, {"other": Policy(last=1)}, clock=engine.clock, progress=Silence())
    prune(engine.repository, {"tree": Policy()}, clock=engine.clock, progress=Silence())
    assert keys(engine) == before


def test_after_thirty_days_of_failures_the_last_good_points_remain(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    engine.now += timedelta(days=30)
    policy = Policy(daily=7, within=timedelta(days=3))
    report = prune(engine.repository, {"tree": policy}, clock=engine.clock, progress=Silence())
    assert all(v.keep for v in report.verdicts)
    assert len(engine.repository.points("tree")) == 5


def test_what_others_keep_beside_us_is_never_touched(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "repository", create=True)
    engine = Engine(store)
    five_points(engine, tmp_path / "tree")
    strangers = ["packs/tree/notes.txt", "packs/tree/0123/0000.zst", "points/tree/README", "photos/a.jpg"]
    for name in strangers:
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    engine.now += timedelta(days=3650)
    prune(engine.repository, {"tree": Policy(last=1)}, clock=engine.clock, progress=Silence())
    assert all((tmp_path / "repository" / name).read_text() == "mine" for name in strangers)


def test_packs_of_an_interrupted_run_stay_a_day_and_then_go(tmp_path: Path) -> None:
    store = DatedStore(Engine().now)
    engine = Engine(store)
    grow(tmp_path / "tree", 1)
    engine.write(tmp_path / "tree")
    grow(tmp_path / "tree", 2)
    interrupted = engine.write(tmp_path / "tree", commit=False)
    engine.now = store.now + GRACE / 2
    prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert any(interrupted.id in key for key in keys(engine))
    engine.now = store.now + GRACE * 2
    prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert not any(interrupted.id in key for key in keys(engine))
    assert verify(engine.repository, sources=None, data_percent=100, progress=Silence()).problems == []


def test_a_listing_that_fails_stops_prune_before_anything_goes(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    before = keys(engine)
    whole = engine.store.list

    def broken(prefix: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(whole(prefix)):
            if prefix.startswith("points/") and number == 2:
                raise StoreError("the listing broke off")
            yield info

    engine.store.list = broken  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    engine.store.list = whole  # type: ignore[method-assign]
    assert keys(engine) == before


def test_a_manifest_that_cannot_be_read_stops_prune_before_anything_goes(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    key = next(key for key in sorted(keys(engine)) if key.startswith("points/"))
    engine.store.put(key, b"garbage", overwrite=True)
    before = keys(engine)
    with pytest.raises(Damaged, match="nothing of tree is pruned"):
        prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert keys(engine) == before


def test_prune_waits_for_nobody_and_refuses_while_a_backup_is_at_work(tmp_path: Path) -> None:
    engine = Engine()
    five_points(engine, tmp_path / "tree")
    before = keys(engine)
    with engine.repository.lease("tree"), pytest.raises(Locked):
        prune(engine.repository, KEEP_TWO, clock=engine.clock, progress=Silence())
    assert keys(engine) == before


def test_prune_that_dies_at_any_step_leaves_every_point_it_lists_whole(tmp_path: Path) -> None:
    for step in range(7):  # four manifests, three packs
        engine = Engine()
        five_points(engine, tmp_path / f"tree-{step}")
        remove = engine.store.delete
        left = step

        def dying(key: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            remove(key)  # noqa: B023

        engine.store.delete = dying  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            prune(engine.repository, {"tree": Policy(last=1)}, clock=engine.clock, progress=Silence())
        engine.store.delete = remove  # type: ignore[method-assign]
        assert verify(engine.repository, sources=None, data_percent=100, progress=Silence()).problems == []
        prune(engine.repository, {"tree": Policy(last=1)}, clock=engine.clock, progress=Silence())


def test_the_newest_point_stays_with_the_clock_a_day_off_either_way(tmp_path: Path) -> None:
    for shift in (timedelta(days=-6), timedelta(days=1)):
        engine = Engine()
        five_points(engine, tmp_path / f"tree{shift.days}")
        newest = engine.repository.points("tree")[-1]
        plan = plan_prune(engine.repository, {"tree": Policy(last=1)}, now=engine.now + shift)
        assert [v.point.id for v in plan.verdicts if v.keep][-1] == newest.id
