"""Repacking by prune: the repository gets small, and every kept point is whole at every moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import services as bed
from engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import describe, make_every_kind

from backupd.archive import compact as compact_module
from backupd.archive import repack as repack_module
from backupd.archive.usage import measure, read_directory
from backupd.errors import Damaged, Locked, StoreError
from backupd.model import Bytes, RecoveryPoint, Silence, Store, Stream, Streams
from backupd.prune import GRACE, PruneReport, plan_prune, prune
from backupd.retention import Policy
from backupd.stores import LocalStore, MemoryStore, open_store
from backupd.stores.s3 import S3Options
from backupd.verify import verify


class Generations:
    """A tree that changes, a point of each state, and what each state was."""

    def __init__(self, root: Path, store: Store | None = None, *, seed: int = 1) -> None:
        self.root = root / "tree"
        self.root.mkdir()
        self.engine = Engine(store or MemoryStore())
        self.states: dict[str, object] = {}
        self.points: list[RecoveryPoint] = []
        self._random = random.Random(seed)
        self._restored = root / "restored"

    def live(self, generations: int, *, files: int = 40, changed: int = 12) -> None:
        """Small files in some directories and a large one; some of all change, go and come each time."""
        noise = self._random
        for generation in range(generations):
            for number in range(files if generation == 0 else changed):
                name = number if generation == 0 else noise.randrange(files)
                path = self.root / f"{name % 5}" / f"{name}"
                path.parent.mkdir(exist_ok=True)
                if generation and noise.random() < 0.2:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(noise.randbytes(noise.randrange(100, 40_000)) + b"text " * 2000)
            with (self.root / "large").open("ab" if generation % 3 else "wb") as file:
                file.write(noise.randbytes(700_000))
            self.write()

    def write(self) -> RecoveryPoint:
        point = self.engine.write(self.root)
        self.points.append(point)
        self.states[point.id] = describe(self.root)
        self.engine.now += timedelta(hours=1)
        return point

    def prune(self, last: int, *, dry_run: bool = False, max_unused: float | None = None) -> PruneReport:
        return prune(
            self.engine.repository, {"tree": Policy(last=last)}, clock=self.engine.clock, dry_run=dry_run,
            max_unused=max_unused, progress=Silence(),
        )  # fmt: skip

    def prune_and_wait(self, last: int, max_unused: float | None = None) -> PruneReport:
        """Prune, and again when the day of grace is over."""
        report = self.prune(last, max_unused=max_unused)
        self.engine.now += GRACE + timedelta(minutes=1)
        self.prune(last, max_unused=max_unused)
        return report

    def check(self, last: int) -> None:
        """The newest points are there, each is what it was, and everything that is stored is sound."""
        points = self.engine.repository.points("tree")
        assert [point.id for point in points][-last:] == [point.id for point in self.points][-last:]
        for point in points:
            self._restored = self._restored.with_name(f"{point.id}-{random.random()}")
            assert describe(self.engine.restore(point, self._restored)) == self.states[point.id]
        report = verify(self.engine.repository, sources=None, data_percent=100, progress=Silence())
        assert report.problems == []

    @property
    def objects(self) -> dict[str, int]:
        return {
            info.key: info.size for info in self.engine.store.list() if not info.key.startswith("leases/")
        }

    @property
    def stored(self) -> int:
        return sum(size for key, size in self.objects.items() if key.startswith(("packs/", "points/")))


def fresh(root: Path, into: Path) -> int:
    """Bytes that a new repository takes for this tree."""
    into.mkdir()
    other = Generations(into)
    other.engine.write(root)
    return other.stored


@pytest.fixture
def tree(tmp_path: Path) -> Generations:
    return Generations(tmp_path)


def test_many_generations_shrink_to_little_more_than_the_last(tree: Generations, tmp_path: Path) -> None:
    tree.live(12)
    before = tree.stored
    report = tree.prune_and_wait(1)
    assert 0 < report.bytes_rewritten <= report.bytes_freed + report.bytes_waiting - report.bytes_rewritten
    tree.check(1)
    new = fresh(tree.root, tmp_path / "fresh")
    assert tree.stored < before / 2
    assert tree.stored < 2 * new
    tree.prune_and_wait(1, max_unused=0)
    tree.check(1)
    assert tree.stored < 1.1 * new


def test_every_one_of_several_kept_points_restores(tree: Generations) -> None:
    tree.live(10)
    before = tree.stored
    tree.prune_and_wait(4, max_unused=0.02)
    tree.check(4)
    assert tree.stored < before
    assert tree.prune(4, max_unused=0.02).packs_repacked == 0  # once is enough


@pytest.mark.parametrize("where", ["directory", "bucket"])
def test_on_a_disk_and_in_a_bucket(where: str, tmp_path: Path, s3_server: bed.S3Server) -> None:
    store: Store = LocalStore(tmp_path / "repository", create=True)
    if where == "bucket":
        options = S3Options(
            endpoint_url=s3_server.endpoint, access_key_id=s3_server.access_key,
            secret_access_key=s3_server.secret_key, region=s3_server.region,
        )  # fmt: skip
        store = open_store(f"s3://{s3_server.new_bucket()}/some/prefix", options)
    tree = Generations(tmp_path, store)
    tree.live(7)
    before = tree.stored
    assert tree.prune_and_wait(1).packs_repacked > 0
    tree.check(1)
    assert tree.stored < before / 2


def test_every_kind_of_entry_survives_repacking(tree: Generations) -> None:
    make_every_kind(tree.root)
    tree.write()
    for number in range(3):
        (tree.root / "sizes" / f"{number}-more").write_bytes(random.Random(number).randbytes(300_000))
        (tree.root / "sizes" / "3333333.bin").unlink(missing_ok=True)
        (tree.root / "sizes" / f"{number - 1}-more").unlink(missing_ok=True)
        tree.write()
    assert tree.prune_and_wait(1).packs_repacked > 0
    tree.check(1)


def test_packs_of_several_megabytes_in_frames_whole_and_in_part(tree: Generations) -> None:
    noise = random.Random(3)
    for number in range(40):  # blocks of large files fill frames, which stay whole where a file stays
        (tree.root / f"{number:02d}").write_bytes(noise.randbytes(1_300_000))
    tree.write()
    for number in range(0, 40, 2):
        (tree.root / f"{number:02d}").unlink()
    for number in (1, 3, 5, 7, 9, 11):
        (tree.root / f"{number:02d}").unlink()
    tree.write()
    report = tree.prune_and_wait(1, max_unused=0)
    assert 14 * 1_300_000 < report.bytes_rewritten < 20_000_000
    tree.check(1)
    assert tree.stored < 20_000_000


def test_a_dry_run_tells_what_will_be_written_and_freed(tree: Generations) -> None:
    tree.live(8)
    before = tree.objects
    told = tree.prune(1, dry_run=True)
    assert tree.objects == before
    done = tree.prune(1)
    assert (told.bytes_freed, told.bytes_waiting, told.packs_repacked) == (
        done.bytes_freed, done.bytes_waiting, done.packs_repacked
    )  # fmt: skip
    # The parts of a frame are taken to compress alike; here some are noise and some are one word again and again.
    assert told.bytes_rewritten == pytest.approx(done.bytes_rewritten, rel=0.25)
    plan = plan_prune(tree.engine.repository, {"tree": Policy(last=1)}, now=tree.engine.now)
    assert sum(size for _, _, size in plan.waiting) == done.bytes_waiting


def test_small_files_between_the_headers_of_a_first_run_are_told_rightly(tree: Generations) -> None:
    """The headers are a third of what a frame holds and next to nothing of what it takes."""
    for number in range(400):
        (tree.root / f"{number}").write_bytes(random.Random(number).randbytes(1200))
    tree.write()
    for number in range(0, 400, 3):
        (tree.root / f"{number}").unlink()
        (tree.root / f"{number + 1}").unlink(missing_ok=True)
    tree.write()
    told, done = tree.prune(1, dry_run=True), tree.prune(1)
    assert told.bytes_rewritten == pytest.approx(done.bytes_rewritten, rel=0.05)
    assert 0 < 2 * done.bytes_rewritten < done.bytes_waiting


def test_what_many_small_runs_left_is_merged_when_there_is_something_to_free(tree: Generations) -> None:
    (tree.root / "large").write_bytes(random.Random(0).randbytes(3_000_000))
    tree.write()
    (tree.root / "large").unlink()
    for number in range(12):
        (tree.root / f"{number}").write_bytes(random.Random(number).randbytes(20_000))
        tree.write()
    assert tree.prune(13).packs_repacked == 0  # nothing to free: nothing is paid for
    tree.prune_and_wait(12)
    tree.check(12)
    assert sum(key.startswith("packs/") for key in tree.objects) == 1


def test_a_restore_that_began_before_goes_on_for_a_day(tree: Generations, tmp_path: Path) -> None:
    tree.live(6)
    begun = tree.engine.archive(tree.points[-1])
    assert tree.prune(1).packs_repacked > 0
    tree.engine.now += GRACE - timedelta(minutes=1)
    assert tree.prune(1).bytes_waiting > 0
    begun.extract(tmp_path / "late")
    assert describe(tmp_path / "late") == tree.states[tree.points[-1].id]
    tree.engine.now += timedelta(minutes=2)
    report = tree.prune(1)
    assert report.bytes_freed > 0
    assert report.bytes_waiting == 0
    named = {pack.name for m in tree.engine.repository.manifests("tree") for pack in m.packs}
    assert {name for name, _ in tree.engine.repository.packs("tree")} == named


def test_the_next_backup_finds_all_content_in_its_new_place(tree: Generations) -> None:
    tree.live(8)
    assert tree.prune_and_wait(1).packs_repacked > 0
    tree.write()
    assert tree.engine.written is not None
    assert tree.engine.written.stored < 5_000  # at most a page of what was changed only just now
    (tree.root / "0").rename(tree.root / "elsewhere")
    tree.write()
    assert tree.engine.written.stored < 20_000  # what moved is known by its digest
    tree.check(3)


def test_repacking_nothing_can_be_asked_for(tree: Generations) -> None:
    tree.live(6)
    packs = {key for key in tree.objects if key.startswith("packs/")}
    report = tree.prune(1, max_unused=1)
    assert (report.packs_repacked, report.bytes_rewritten) == (0, 0)
    assert {key for key in tree.objects if key.startswith("packs/")} <= packs
    tree.check(1)


contents = st.lists(st.integers(0, 30), min_size=1, max_size=8)
"""Files of one state, each the noise of its number: what two states have in common is stored once."""


@settings(max_examples=60, deadline=None)
@given(st.lists(contents, min_size=2, max_size=7), st.data())
def test_whatever_goes_all_that_stays_is_whole(states: list[list[int]], data: st.DataObject) -> None:
    def content(number: int) -> bytes:
        return random.Random(number).randbytes(1 + number * 3000)

    engine = Engine()
    points = []
    for files in states:
        points.append(engine.write(Streams([Stream(f"{n}", iter([content(n)])) for n in sorted(set(files))])))
        engine.now += timedelta(hours=1)
    last = data.draw(st.integers(1, len(states)))
    share = data.draw(st.one_of(st.none(), st.floats(0, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact_module, "FRAME_SIZE", data.draw(st.integers(1, 100_000)))
        patch.setattr(compact_module, "PACK_SIZE", data.draw(st.integers(1, 200_000)))
        for policy in (last, data.draw(st.integers(1, last))):
            report = prune(
                engine.repository, {"tree": Policy(last=policy)}, clock=engine.clock, max_unused=share,
                progress=Silence(),
            )  # fmt: skip
            if share is None:  # noise: the estimate is exact but for what a frame itself takes
                assert 2 * report.bytes_rewritten <= report.bytes_freed + report.bytes_waiting + 1000
            engine.now += 2 * GRACE
            assert [point.id for point in engine.repository.points("tree")] == [
                p.id for p in points[-policy:]
            ]
            for point, files in list(zip(points, states, strict=True))[-policy:]:
                for number in set(files):
                    assert b"".join(engine.archive(point).read(f"{number}")) == content(number)
            assert (
                verify(engine.repository, sources=None, data_percent=100, progress=Silence()).problems == []
            )


# --- stopped ---------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is no more."""


def stop_at(store: Store, step: int, error: Callable[[], BaseException], after: bool) -> Callable[[], None]:
    """The `step`-th put or delete fails, and every one after it; with `after`, that one is still carried out, as
    where the answer is lost. Returns what mends it."""
    put, delete = store.put, store.delete
    left = step

    def count(carry_out: Callable[[], None], key: str) -> None:
        nonlocal left
        if not key.startswith("leases/"):
            left -= 1
            if left < 0:
                if after and left == -1:
                    carry_out()
                raise error()
        carry_out()

    def failing_put(key: str, data: Bytes, *, overwrite: bool = False) -> None:
        count(lambda: put(key, data, overwrite=overwrite), key)

    def failing_delete(key: str) -> None:
        count(lambda: delete(key), key)

    def mend() -> None:
        store.put, store.delete = put, delete  # type: ignore[method-assign]

    store.put, store.delete = failing_put, failing_delete  # type: ignore[method-assign]
    return mend


@pytest.mark.parametrize("error", [Died, lambda: StoreError("no answer")], ids=["killed", "store"])
@pytest.mark.parametrize("after", [False, True], ids=["not done", "done"])
def test_stopped_at_any_step_every_kept_point_is_whole_and_the_next_prune_ends_it(
    error: Callable[[], BaseException], after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_module, "FRAME_SIZE", 20_000)
    monkeypatch.setattr(compact_module, "PACK_SIZE", 40_000)  # several new packs
    monkeypatch.setattr(repack_module, "SMALL", 1000)  # else those would be put together at each prune
    sizes = set()
    for step in range(100):
        (tmp_path / str(step)).mkdir()
        tree = Generations(tmp_path / str(step), seed=5)
        tree.live(7, files=15, changed=8)
        mend = stop_at(tree.engine.store, step, error, after)
        try:
            tree.prune(3, max_unused=0.01)
            ended = True
        except (Died, StoreError):
            ended = False
        mend()
        if not ended:
            tree.check(3)
        tree.prune_and_wait(3, max_unused=0.01)
        tree.prune_and_wait(3, max_unused=0.01)
        tree.check(3)
        assert len(tree.engine.repository.points("tree")) == 3
        sizes.add(tree.stored)
        if ended:
            break
    else:
        pytest.fail("prune never came to its end")
    assert step > 10  # packs, manifests, points: there was something to stop
    assert max(sizes) < 1.03 * tree.stored  # nothing was left behind or stored twice


def test_a_full_disk_gets_room_from_what_goes_anyway(tree: Generations) -> None:
    tree.live(6)
    put = tree.engine.store.put

    def no_room(key: str, data: Bytes, *, overwrite: bool = False) -> None:
        if key.startswith("packs/"):
            raise StoreError("no space left on device")
        put(key, data, overwrite=overwrite)

    tree.engine.store.put = no_room  # type: ignore[method-assign]
    before = tree.stored
    with pytest.raises(StoreError, match="no space"):
        tree.prune(1)
    assert len(tree.engine.repository.points("tree")) == 1
    assert tree.stored < before
    tree.check(1)


def test_a_lost_lease_ends_it_before_anything_is_replaced(tree: Generations) -> None:
    tree.live(6)
    put = tree.engine.store.put
    before = tree.objects

    def losing(key: str, data: Bytes, *, overwrite: bool = False) -> None:
        put(key, data, overwrite=overwrite)
        if key.startswith("packs/"):
            tree.engine.store.delete("leases/tree.json")

    tree.engine.store.put = losing  # type: ignore[method-assign]
    with pytest.raises(Locked):
        tree.prune(1)
    tree.engine.store.put = put  # type: ignore[method-assign]
    assert tree.objects.items() >= before.items()
    tree.check(6)
    tree.prune_and_wait(1)
    tree.check(1)


# --- damaged ---------------------------------------------------------------------------------------------


def flip(store: Store, key: str, at: int) -> None:
    whole = store.get(key)
    store.put(key, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], overwrite=True)


def needed_places(tree: Generations) -> Iterator[tuple[str, int]]:
    """A byte in the first and in the last needed frame of every pack that will be repacked."""
    repository = tree.engine.repository
    plan = plan_prune(repository, {"tree": Policy(last=1)}, now=tree.engine.now)
    usage = measure(repository, "tree", repository.manifests("tree")[-1:], repository.point_sizes("tree"))
    for source, name, _ in plan.repack:
        directory = read_directory(repository, source, usage.packs[name])
        starts = directory.starts()
        frames = [
            f for n, f in enumerate(directory.frames) if any(usage.needed[name][starts[n] : starts[n + 1]])
        ]
        for frame in frames[:1] + frames[-1:]:
            yield f"packs/{source}/{name}.zst", frame.offset + frame.length // 2


def test_damage_in_what_is_needed_makes_it_refuse_and_leave_all_as_it_was(tree: Generations) -> None:
    tree.live(6)
    places = list(needed_places(tree))
    assert places
    for key, at in places:
        flip(tree.engine.store, key, at)
        before = {key: tree.engine.store.get(key) for key in tree.objects}
        with pytest.raises(Damaged, match="nothing of tree is pruned"):
            tree.prune(1)
        assert {key: tree.engine.store.get(key) for key in tree.objects} == before
        flip(tree.engine.store, key, at)
    tree.prune_and_wait(1)
    tree.check(1)


def test_a_damaged_index_makes_it_refuse_unless_nothing_is_to_be_repacked(tree: Generations) -> None:
    tree.live(4)
    page = tree.engine.repository.manifests("tree")[-1].pages[0]
    key = f"packs/tree/{page.pack}.zst"
    flip(tree.engine.store, key, page.offset + page.length // 2)
    before = tree.objects
    with pytest.raises(Damaged, match="nothing of tree is pruned"):
        tree.prune(1)
    assert tree.objects == before
    assert tree.prune(1, max_unused=1).objects_removed > 0
    flip(tree.engine.store, key, page.offset + page.length // 2)
    tree.check(1)
