"""The pages of an index: many in one request, each checked for itself."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from engine import Engine
from hypothesis import given
from hypothesis import strategies as st

from backupd.archive.index import RUN_SIZE, PageReader, read_pages, runs
from backupd.archive.pack import SKIPPABLE_HEADER
from backupd.errors import Damaged
from backupd.model import Tree
from backupd.repository import PageRef


def ref(pack: str, offset: int, length: int) -> PageRef:
    return PageRef("", pack, offset, length, 0, "", "", (), 0, 0)


@st.composite
def pages(draw: st.DrawFn) -> list[PageRef]:
    """In packs, with and without something between them."""
    found = []
    for pack in range(draw(st.integers(0, 3))):
        offset = SKIPPABLE_HEADER
        for gap, length in draw(
            st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 5000]), st.integers(1, RUN_SIZE)))
        ):
            found.append(ref(str(pack), offset + gap, length))
            offset += gap + length + SKIPPABLE_HEADER
    return draw(st.permutations(found)) if draw(st.booleans()) else found


@given(pages())
def test_runs_are_all_pages_in_their_order_each_run_side_by_side_and_small(
    given_pages: list[PageRef],
) -> None:
    found = list(runs(given_pages))
    assert [page for run in found for page in run] == given_pages
    for run in found:
        for one, other in itertools.pairwise(run):
            assert (one.pack, one.offset + one.length + SKIPPABLE_HEADER) == (other.pack, other.offset)
        assert len(run) == 1 or run[-1].offset + run[-1].length - run[0].offset <= RUN_SIZE


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """With one point of some pages."""
    for number in range(900):
        folder = tmp_path / "tree" / f"{number % 30}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}").write_bytes(b"%d" % number)
    engine = Engine()
    engine.write(tmp_path / "tree")
    return engine


def requests_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packs that are read from now on, one name a request."""
    requests: list[str] = []
    read = engine.repository.read_pack

    def counted(source: str, name: str, offset: int, length: int) -> bytes:
        requests.append(name)
        return read(source, name, offset, length)

    monkeypatch.setattr(engine.repository, "read_pack", counted)
    return requests


def test_the_pages_of_a_pack_are_read_in_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    [manifest] = engine.repository.manifests(engine.source)
    assert len(manifest.pages) > 3
    requests = requests_of(engine, monkeypatch)
    found = list(read_pages(engine.repository, manifest.point.source, manifest.pages))
    assert sum(len(rows) for page in found for _, _, rows in page.dirs) >= 900
    assert len(requests) == 1
    reader = PageReader(
        engine.repository,
        manifest.point.source,
        manifest.pages,
        damaged=lambda error: pytest.fail(str(error)),
    )
    assert [reader.page(number) for number in range(len(found))] == found == list(reader.all())
    assert len(requests) == 3


def test_pages_that_are_asked_for_to_and_fro_are_read_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved lies in another order than its earlier point."""
    monkeypatch.setattr("backupd.archive.index.RUN_SIZE", 1)  # each page a run
    [manifest] = engine.repository.manifests(engine.source)
    reader = PageReader(
        engine.repository, manifest.point.source, manifest.pages, damaged=lambda e: pytest.fail(str(e))
    )
    requests = requests_of(engine, monkeypatch)
    for _ in range(5):
        for number in (0, 3, 1, 2):
            assert reader.page(number).dirs
    assert len(requests) == 4


def test_a_damaged_page_is_told_and_those_beside_it_are_read(engine: Engine) -> None:
    [manifest] = engine.repository.manifests(engine.source)
    source, bad = manifest.point.source, manifest.pages[1]
    key = f"packs/{source}/{bad.pack}.zst"
    data = bytearray(engine.store.get(key))
    data[bad.offset + bad.length // 2] ^= 1
    engine.store.put(key, bytes(data), overwrite=True)
    told: list[Damaged] = []
    reader = PageReader(engine.repository, source, manifest.pages, damaged=told.append)
    found = [reader.page(number) for number in range(len(manifest.pages))]
    assert [bool(page.dirs) for page in found] == [number != 1 for number in range(len(found))]
    assert len(told) == 1
    with pytest.raises(Damaged):
        list(read_pages(engine.repository, source, manifest.pages))


def test_a_frame_that_is_asked_for_to_and_fro_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of which every tenth page changed lies in two frames by turns."""
    tree = tmp_path / "tree"
    tree.mkdir()
    file = tree / "relation"
    data = bytearray(random.Random(1).randbytes(256 * 16384))
    file.write_bytes(data)
    engine = Engine()
    engine.write(Tree(tree, paged=("*",)))
    for page in range(0, 256, 10):
        data[page * 16384] ^= 1
    file.write_bytes(data)
    point = engine.write(Tree(tree, paged=("*",)))
    requests = requests_of(engine, monkeypatch)
    assert b"".join(engine.archive(point).read("relation")) == bytes(data)
    assert len(requests) < 12  # the page, two directories, the frames
