"""A tar that brings only the pages that changed: the point made of it is as whole as any."""

from __future__ import annotations

import io
import random
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pytest
from engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st

from backupd.archive import open_archive
from backupd.archive.feed import LARGE
from backupd.backup import back_up
from backupd.errors import Damaged
from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Facts,
    Problem,
    RecoveryPoint,
    Run,
    RunStatus,
    Silence,
    TarStream,
)
from backupd.repository import Repository
from backupd.stores import MemoryStore

PAGE = 8192
MOST = LARGE // PAGE
"""Pages of a file that comes whole into memory still."""


@dataclass
class Server:
    """Files of pages; what changed since the last look is known by page."""

    files: dict[str, list[bytes]] = field(default_factory=dict)
    changed: dict[str, set[int]] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def page(self) -> bytes:
        return self.random.randbytes(PAGE)

    def change(self, name: str, size: int, pages: set[int]) -> None:
        """Cut or grow to this size, in pages, and write over some. A page that only grew is zeros, and not told."""
        held = self.files.setdefault(name, [])
        del held[size:]
        held += [bytes(PAGE)] * (size - len(held))
        for number in {number for number in pages if number < size}:
            held[number] = self.page()
            self.changed.setdefault(name, set()).add(number)

    def tar(self, *, onto: bool) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, pages in self.files.items():
                info, content = tarfile.TarInfo(name), b"".join(pages)
                if onto:
                    told = sorted(n for n in self.changed.get(name, ()) if n < len(pages))
                    where = [part for n in told for part in (n * PAGE, PAGE)]
                    sizes = {"GNU.sparse.size": str(len(content)), "BACKUPD.onto": "1"}
                    info.pax_headers = {
                        **sizes,
                        "GNU.sparse.map": ",".join(map(str, [*where, len(content), 0])),
                    }
                    content = b"".join(pages[n] for n in told)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        self.changed.clear()
        return out.getvalue()

    def stored(self, engine: Engine, *, onto: bool) -> RecoveryPoint:
        file = io.BytesIO(self.tar(onto=onto))
        return engine.write(TarStream(file, paged=("/**",), page_size=PAGE, onto=onto))


def content(engine: Engine, point: RecoveryPoint, name: str) -> bytes:
    return b"".join(engine.archive(point).read(name))


sizes = st.one_of(st.integers(0, 4), st.integers(MOST - 1, MOST + 2), st.integers(2 * MOST, 3 * MOST))
changes = st.tuples(sizes, st.sets(st.integers(0, 3 * MOST), max_size=20))


@settings(max_examples=40)
@given(st.lists(changes, min_size=2, max_size=4), st.booleans())
def test_every_point_has_the_whole_file_whatever_its_size_becomes(
    steps: list[tuple[int, set[int]]], other: bool
) -> None:
    """From one blob to many and back, cut, grown, written over; points made onto points made onto points."""
    engine, server = Engine(), Server()
    expected: list[tuple[RecoveryPoint, bytes]] = []
    for number, (size, pages) in enumerate(steps):
        server.change("base/5/1", size, set(range(size)) if number == 0 else pages)
        if other:
            server.change("base/5/2", 2 * MOST, {0, number})
        point = server.stored(engine, onto=number > 0)
        expected.append((point, b"".join(server.files["base/5/1"])))
    for point, whole in expected:
        assert content(engine, point, "base/5/1") == whole


def test_what_did_not_change_is_neither_read_nor_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only index and names are; a page that changed costs itself. A small file that did not change costs nothing."""
    engine, server = Engine(), Server()
    server.change("base/5/0", 3, {0, 1, 2})
    server.change("base/5/1", 10 * MOST, set(range(10 * MOST)))
    server.stored(engine, onto=False)
    server.change("base/5/1", 10 * MOST, {3, 4, 777})
    with monkeypatch.context() as patch:
        patch.setattr("backupd.archive.earlier.FrameReader", None)
        point = server.stored(engine, onto=True)
    assert 3 * PAGE <= point.stored < 5 * PAGE
    assert content(engine, point, "base/5/1") == b"".join(server.files["base/5/1"])
    assert content(engine, point, "base/5/0") == b"".join(server.files["base/5/0"])
    assert point.size == 10 * LARGE + 3 * PAGE


def test_a_file_given_in_part_that_was_not_there_before_is_refused() -> None:
    engine, server = Engine(), Server()
    server.change("a", 3, {0, 1, 2})
    server.stored(engine, onto=False)
    server.change("b", 3, {1})
    with pytest.raises(Damaged, match="b is given in part"):
        server.stored(engine, onto=True)


def test_a_stranger_s_tar_takes_nothing_from_an_earlier_point() -> None:
    """Only who continues a point may name what is in it."""
    engine, server = Engine(), Server()
    server.change("a", 3, {0, 1, 2})
    server.stored(engine, onto=False)
    with pytest.raises(Damaged, match="given in part"):
        engine.write(TarStream(io.BytesIO(server.tar(onto=True))))


def test_a_tar_that_ends_within_the_pages_makes_no_point() -> None:
    engine, server = Engine(), Server()
    server.change("a", 2 * MOST, set(range(2 * MOST)))
    server.stored(engine, onto=False)
    server.change("a", 2 * MOST, {5, 6})
    with pytest.raises(Damaged):
        engine.write(
            TarStream(
                io.BytesIO(server.tar(onto=True)[: PAGE * 2]), paged=("/**",), page_size=PAGE, onto=True
            )
        )


# --- through a backup ---------------------------------------------------------------------------------------


class Driver:
    """A `backup.IncrementalDriver` of that server."""

    kind = "pages"

    def __init__(self, server: Server) -> None:
        self.server = server
        self.asked: list[str] = []

    @contextmanager
    def _capture(self, *, onto: bool) -> Iterator[Capture]:
        file = io.BytesIO(self.server.tar(onto=onto))
        yield Capture(TarStream(file, paged=("/**",), page_size=PAGE, onto=onto), datetime.now(UTC))

    def capture(self, since: RecoveryPoint | None) -> AbstractContextManager[Capture]:
        self.asked.append("all")
        return self._capture(onto=False)

    def capture_onto(self, earlier: Archive) -> AbstractContextManager[Capture]:
        self.asked.append("changed")
        return self._capture(onto=True)

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        raise NotImplementedError

    def load(self, archive: Archive, container: Container) -> None: ...
    def facts(self, container: Container) -> Facts:
        raise NotImplementedError

    def check(self) -> Sequence[Problem]:
        raise NotImplementedError


@pytest.mark.parametrize("damage", ["nothing", "a pack is gone", "content is damaged"])
def test_where_the_point_before_is_damaged_all_is_captured(damage: str) -> None:
    """In the same run, which tells of it: the next point is whole."""
    store, server = MemoryStore(), Server()
    driver, clock = Driver(server), partial(datetime.now, UTC)
    repository = Repository.create(store, clock=clock)

    def run(*, allow_shrink: bool = False) -> Run:
        return back_up(
            "pages", driver, repository, clock=clock, progress=Silence(), stop=threading.Event(),
            allow_shrink=allow_shrink,
        )  # fmt: skip

    server.change("a", 3, {0, 1, 2})
    server.change("b", 2 * MOST, set(range(2 * MOST)))
    run()
    (pack,) = [info.key for info in store.list("packs/")]
    if damage == "a pack is gone":
        store.delete(pack)
    elif damage == "content is damaged":
        held = bytearray(store.get(pack))
        held[100:200] = bytes(100)
        store.put(pack, bytes(held), overwrite=True)
    server.change("a", 3, {1})
    second = run()
    point = repository.find(second.point)
    if damage == "nothing":
        assert (driver.asked, second.status) == (["all", "changed"], RunStatus.OK)
    else:
        assert (driver.asked, second.status) == (["all", "changed", "all"], RunStatus.WARNED)
        assert "all was captured" in " ".join(second.warnings)
    assert b"".join(open_archive(repository, point).read("a")) == b"".join(server.files["a"])
    run(allow_shrink=True)
    assert driver.asked[-1] == "all"
