"""A backup is a point only when everything is stored; whatever goes wrong, the one before is still the latest."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
from engine import Engine
from trees import describe

from backupd.backup import back_up
from backupd.errors import CaptureFailed, CommandFailed, Interrupted, Locked, StoreError
from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Content,
    Driver,
    Facts,
    Problem,
    RecoveryPoint,
    Run,
    RunStatus,
    Silence,
    Stream,
    Streams,
    Tree,
)
from backupd.stores import LocalStore
from backupd.verify import verify


class Source:
    """A driver that captures what a test says."""

    kind = "volume"

    def __init__(self, content: Callable[[], Content], warnings: Sequence[str] = ()) -> None:
        self._content = content
        self._warnings = warnings
        self.since: RecoveryPoint | None = None

    @contextlib.contextmanager
    def _capture(self) -> Iterator[Capture]:
        capture = Capture(
            self._content(), instant=datetime.now(UTC), facts={"rows": 3}, attributes={"version": "1"}
        )
        yield capture
        capture.warnings += self._warnings

    def capture(self, since: RecoveryPoint | None) -> AbstractContextManager[Capture]:
        self.since = since
        return self._capture()

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        raise NotImplementedError

    def load(self, archive: Archive, container: Container) -> None:
        raise NotImplementedError

    def facts(self, container: Container) -> Facts:
        raise NotImplementedError

    def check(self) -> Sequence[Problem]:
        return ()


def run(
    engine: Engine, content: Callable[[], Content], *, allow_shrink: bool = False, warn: Sequence[str] = ()
) -> Run:
    return back_up(
        "tree", cast(Driver, Source(content, warn)), engine.repository, clock=engine.clock, progress=Silence(),
        stop=engine.stop, allow_shrink=allow_shrink,
    )  # fmt: skip


def stream(*chunks: bytes) -> Callable[[], Content]:
    return lambda: Streams([Stream("a.dump", iter(chunks))])


def fill(root: Path, size: int = 100_000) -> Path:
    root.mkdir(exist_ok=True)
    for number in range(5):
        (root / str(number)).write_bytes(random.Random(number).randbytes(size))
    return root


def test_a_backup_makes_a_point_with_what_the_driver_said() -> None:
    engine = Engine()
    done = run(engine, stream(b"x" * 1000))
    (point,) = engine.repository.points()
    assert done.status is RunStatus.OK
    assert done.point == point.id
    assert (point.size, point.facts, point.attributes) == (1000, {"rows": 3}, {"version": "1"})


def test_a_warning_of_the_driver_makes_a_run_warned_and_stays_with_the_point() -> None:
    engine = Engine()
    done = run(engine, stream(b"x"), warn=["b: vanished"])
    assert done.status is RunStatus.WARNED
    assert engine.repository.points()[0].warnings == ("b: vanished",) == done.warnings


def test_a_dump_that_is_killed_half_way_leaves_the_one_before_as_the_latest() -> None:
    engine = Engine()
    whole = random.Random(1).randbytes(30_000_000)
    good = run(engine, stream(whole))
    before = {info.key for info in engine.store.list("points/")}

    def dies() -> Iterator[bytes]:
        yield whole[:15_000_000][::-1]
        raise CommandFailed("pg_dump was killed by SIGKILL", returncode=-9)

    with pytest.raises(CaptureFailed, match="killed by SIGKILL"):
        run(engine, lambda: Streams([Stream("a.dump", dies())]))
    assert {info.key for info in engine.store.list("points/")} == before
    assert [p.id for p in engine.repository.points()] == [good.point]


def test_a_driver_that_fails_at_its_very_end_makes_no_point() -> None:
    engine = Engine()

    class Late(Source):
        @contextlib.contextmanager
        def _capture(self) -> Iterator[Capture]:
            yield Capture(self._content(), instant=datetime.now(UTC))
            raise CaptureFailed("the dump was whole, but its server says that it failed")

    with pytest.raises(CaptureFailed):
        back_up("tree", cast(Driver, Late(stream(b"x"))), engine.repository, clock=engine.clock, progress=Silence(),
                stop=engine.stop)  # fmt: skip
    assert engine.repository.points() == []


@pytest.mark.parametrize(
    "content", [stream(), stream(b""), lambda: Streams([])], ids=["nothing", "empty", "none"]
)
def test_an_empty_archive_is_a_failure_until_a_person_says_otherwise(content: Callable[[], Content]) -> None:
    engine = Engine()
    with pytest.raises(CaptureFailed) as raised:
        run(engine, content)
    assert raised.value.exit_code == 20
    assert "--allow-shrink" in raised.value.hint
    assert engine.repository.points() == []
    assert run(engine, content, allow_shrink=True).point


def test_an_archive_a_tenth_of_the_last_one_is_a_failure_until_a_person_says_otherwise() -> None:
    engine = Engine()
    run(engine, stream(os.urandom(1_000_000)))
    with pytest.raises(CaptureFailed, match="shrank from 1,000,000 to 90,000 bytes"):
        run(engine, stream(b"x" * 90_000))
    assert len(engine.repository.points()) == 1
    source = Source(stream(b"x" * 90_000))
    back_up("tree", cast(Driver, source), engine.repository, clock=engine.clock, progress=Silence(), stop=engine.stop,
            allow_shrink=True)  # fmt: skip
    assert source.since is None  # nor does the driver compare with what was
    assert run(engine, stream(b"x" * 80_000)).status is RunStatus.OK


def test_a_repository_below_the_tree_does_not_back_itself_up(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree")
    engine = Engine(LocalStore(root / "odd [name]*", create=True))
    run(engine, lambda: Tree(root))
    run(engine, lambda: Tree(root))
    names = {m.name.split("/")[0] for m in engine.archive(engine.repository.points()[-1]).members()}
    assert names == {"", "0", "1", "2", "3", "4"}


def test_a_backup_refuses_while_another_of_the_same_source_is_at_work() -> None:
    engine = Engine()
    with engine.repository.lease("tree"), pytest.raises(Locked) as raised:
        run(engine, stream(b"x"))
    assert raised.value.exit_code == 11
    assert run(engine, stream(b"x")).point


def test_a_store_that_promises_no_lease_can_still_be_backed_up_to() -> None:
    engine = Engine()

    def none(key: str, *, ttl: float = 60.0) -> AbstractContextManager[object]:
        raise StoreError("this server does not keep conditions")

    engine.store.lease = none  # type: ignore[method-assign, assignment]
    assert run(engine, stream(b"x")).point


def test_a_pack_that_vanishes_meanwhile_makes_no_point(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree")
    os.sync()
    threading.Event().wait(0.1)
    engine = Engine()
    run(engine, lambda: Tree(root))

    def content() -> Content:
        (name, _) = next(iter(engine.repository.packs("tree")))
        engine.store.delete(f"packs/tree/{name}.zst")
        return Tree(root)

    with pytest.raises(CaptureFailed, match="vanished"):
        run(engine, content)
    assert len(engine.repository.points()) == 1
    # And the next run stores again what is missing, instead of referring to it.
    done = run(engine, lambda: Tree(root))
    assert describe(engine.restore(engine.repository.find(done.point), tmp_path / "restored")) == describe(
        root
    )


def test_a_damaged_manifest_or_pack_costs_room_and_never_the_next_backup(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree")
    engine = Engine()
    run(engine, lambda: Tree(root))
    for prefix in ("points/", "packs/"):
        for info in list(engine.store.list(prefix)):
            engine.store.put(info.key, engine.store.get(info.key)[:-30], overwrite=True)
        done = run(engine, lambda: Tree(root))
        assert done.status is RunStatus.WARNED
        point = engine.repository.find(done.point)
        assert describe(engine.restore(point, tmp_path / prefix.strip("/"))) == describe(root)


def test_a_backup_that_is_told_to_stop_makes_no_point(tmp_path: Path) -> None:
    engine = Engine()

    def chunks() -> Iterator[bytes]:
        yield os.urandom(3_000_000)
        engine.stop.set()
        yield os.urandom(3_000_000)
        yield os.urandom(3_000_000)

    with pytest.raises(Interrupted):
        run(engine, lambda: Streams([Stream("a", chunks())]))
    assert engine.repository.points() == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from backupd.stores import LocalStore
from backupd.repository import Repository
from backupd.model import Tree
import test_backup as t, engine, os
left = int(sys.argv[3])
plain_open, plain_rename, plain_link, plain_fsync = os.open, os.rename, os.link, os.fsync
def step(function):
    def counted(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return counted
made = engine.Engine.__new__(engine.Engine)
made.store = LocalStore(sys.argv[1]); made.source = "tree"; made.now = engine.START
made.repository = Repository.open(made.store)
import threading; made.stop = threading.Event()
os.link, os.fsync, os.replace, os.rename = step(os.link), step(os.fsync), step(os.replace), step(os.rename)
made.store.put, made.store.list = step(made.store.put), step(made.store.list)
t.run(made, lambda: Tree(Path(sys.argv[2])))
print("done")
"""


def test_an_agent_killed_at_any_step_leaves_no_half_point_and_the_next_run_is_whole(tmp_path: Path) -> None:
    """SIGKILL before each listing, put, fsync, link and rename of a run in turn, until a run gets through."""
    root = fill(tmp_path / "tree", 400_000)
    engine = Engine(LocalStore(tmp_path / "repository", create=True))
    good = run(engine, lambda: Tree(root))
    (root / "3").write_bytes(random.Random(99).randbytes(500_000))
    script = KILLED.format(tests=str(Path(__file__).parent))
    for number in range(1, 100):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "repository", root, str(number)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        points = engine.repository.points()
        assert verify(engine.repository, sources=None, data_percent=100, progress=Silence()).problems == []
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if len(points) == 2:  # killed behind its commit: the point is whole
            break
        assert [p.id for p in points] == [good.point]
    else:
        pytest.fail("no run ever got through")
    assert number > 5
    newest = engine.repository.points()[-1] if len(points) == 2 else None
    engine.now += timedelta(days=1)
    final = run(engine, lambda: Tree(root))
    for point in filter(None, (newest, engine.repository.find(final.point))):
        assert describe(engine.restore(point, tmp_path / point.id)) == describe(root)
