"""ChromaDB, against real servers: copied while it is written to, restored, and compared to the last neighbour."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import pickle
import random
import secrets
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import captured
import pytest
import services as bed

from backupd.drivers import chroma_snapshot, chroma_state
from backupd.drivers._pause import paused, release_left
from backupd.drivers.chroma import ChromaDriver, ChromaSettings
from backupd.drivers.chroma_index import Index, TornIndex, read_labels
from backupd.drivers.chroma_served import AS_CAPTURED, Client, compare
from backupd.errors import CaptureFailed, RestoreFailed
from backupd.model import Tree
from backupd.sandbox.docker import DockerSandbox
from backupd.sandbox.engine import Engine

BASE = "/api/v2/tenants/default_tenant/databases/default_database/collections"


@pytest.fixture
def engine(docker_client: object) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def sandbox(engine: Engine) -> Iterator[DockerSandbox]:
    made = DockerSandbox(engine, f"test-{secrets.token_hex(4)}", labels=bed.labels())
    yield made
    made.destroy()


def call(at: tuple[str, int], method: str, path: str, body: object = None) -> Any:
    """The test's own client: none of the driver's code."""
    connection = http.client.HTTPConnection(*at, timeout=30)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status < 300, f"{method} {path}: {answer.status} {text[:300]!r}"
        return json.loads(text)
    finally:
        connection.close()


def single(numbers: list[float]) -> list[float]:
    return list(struct.unpack(f"{len(numbers)}f", struct.pack(f"{len(numbers)}f", *numbers)))


class Writer(threading.Thread):
    """Adds, updates and deletes, one after another, and knows what was acknowledged."""

    def __init__(
        self, service: bed.Service, name: str, *, space: str = "l2", sync: int = 60, dim: int = 16
    ) -> None:
        super().__init__(daemon=True)
        self.at, self.dim, self.random = (service.host, service.port), dim, random.Random(name)
        hnsw = {"space": space, "sync_threshold": sync, "batch_size": min(sync, 20)}
        made = call(self.at, "POST", BASE, {"name": name, "configuration": {"hnsw": hnsw}})
        self.path = f"{BASE}/{made['id']}"
        self.ops: list[tuple[str, list[str], list[list[float]]]] = []
        self.acknowledged = 0
        self.live: list[str] = []
        self.made = 0
        self.stop = threading.Event()
        self.slowest = 0.0
        self.error: Exception | None = None

    def vectors(self, count: int) -> list[list[float]]:
        return [single([self.random.gauss(0, 1) for _ in range(self.dim)]) for _ in range(count)]

    def step(self) -> None:
        what = self.random.random()
        if what < 0.15 and len(self.live) > 60:
            ids = self.random.sample(self.live, 5)
            vectors = self.vectors(5)
            self.do("update", {"ids": ids, "embeddings": vectors}, vectors)
        elif what < 0.3 and len(self.live) > 60:
            ids = self.random.sample(self.live, 4)
            self.do("delete", {"ids": ids}, [])
            self.live = [i for i in self.live if i not in ids]
        else:
            ids = [f"id-{self.made + n}" for n in range(self.random.randint(3, 20))]
            self.made += len(ids)
            vectors = self.vectors(len(ids))
            body = {
                "ids": ids,
                "embeddings": vectors,
                "documents": [f"dokument {i} ü" for i in ids],
                "metadatas": [
                    {"n": int(i[3:]), "half": int(i[3:]) / 2 + 0.1, "even": int(i[3:]) % 2 == 0} for i in ids
                ],
            }
            self.do("add", body, vectors)
            self.live += ids

    def do(self, verb: str, body: dict[str, Any], vectors: list[list[float]]) -> None:
        self.ops.append((verb, body["ids"], vectors))
        begun = time.monotonic()
        call(self.at, "POST", f"{self.path}/{verb}", body)
        self.slowest = max(self.slowest, time.monotonic() - begun)
        self.acknowledged += 1

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.step()
        except Exception as error:  # noqa: BLE001  looked at by the test
            self.error = error

    def after(self, count: int) -> dict[str, list[float]]:
        """What there is after so many operations."""
        state: dict[str, list[float]] = {}
        for verb, ids, vectors in self.ops[:count]:
            for at, key in enumerate(ids):
                if verb == "delete":
                    state.pop(key, None)
                else:
                    state[key] = vectors[at]
        return state


def distance(space: str, a: list[float], b: list[float]) -> float:
    if space == "l2":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - (dot / (math.hypot(*a) * math.hypot(*b)) if space == "cosine" else dot)


def nearness(space: str, model: dict[str, list[float]], query: str, key: str) -> float:
    return distance(space, model[query], model[key])


def everything(at: tuple[str, int], path: str) -> dict[str, tuple[list[float], str, dict[str, Any]]]:
    """Every record with its embedding, page by page."""
    found, offset = {}, 0
    while True:
        body = {"limit": 200, "offset": offset, "include": ["embeddings", "documents", "metadatas"]}
        page = call(at, "POST", f"{path}/get", body)
        rows = zip(page["ids"], page["embeddings"], page["documents"], page["metadatas"], strict=True)
        found.update({key: (vector, document, metadata) for key, vector, document, metadata in rows})
        offset += len(page["ids"])
        if not page["ids"]:
            return found


def must_be_a_state_of(writer: Writer, at: tuple[str, int], space: str, low: int, high: int) -> None:
    """The server holds what there was after some number of operations between `low` and `high`, in every
    respect: count, documents, metadata, embeddings, nearest neighbours; and it can be written to."""
    found = everything(at, writer.path)
    fitting = [n for n in range(low, high + 1) if writer.after(n).keys() == found.keys()]
    assert fitting, f"{len(found)} records are no state between {low} and {high} operations"
    wrong = {
        count: [k for k, (v, _, _) in found.items() if distance("l2", v, state[k]) > 1e-6 * writer.dim]
        for count, state in ((n, writer.after(n)) for n in fitting)
    }
    best = min(wrong, key=lambda count: len(wrong[count]))
    assert not wrong[best], f"{len(wrong[best])} of {len(found)} embeddings are wrong"
    model = writer.after(best)
    assert call(at, "GET", f"{writer.path}/count") == len(model)
    for key, (_, document, metadata) in found.items():
        n = int(key[3:])
        assert document == f"dokument {key} ü"
        assert metadata == {"n": n, "half": n / 2 + 0.1, "even": n % 2 == 0}
    hits = asked = 0
    for query in random.Random(3).sample(sorted(model), min(12, len(model))):
        body = {"query_embeddings": [model[query]], "n_results": 5, "include": ["distances"]}
        answer = call(at, "POST", f"{writer.path}/query", body)["ids"][0]
        true = sorted(model, key=partial(nearness, space, model, query))[:5]
        hits += len(set(answer) & set(true))
        asked += len(true)
    assert hits >= 0.9 * asked, f"{hits} of {asked} nearest neighbours"
    call(
        at,
        "POST",
        f"{writer.path}/add",
        {"ids": ["new"], "embeddings": [[0.5] * writer.dim], "documents": ["x"]},
    )


def driver(
    service: bed.Service, engine: Engine, tmp_path: Path, *, quiesce: str = "lock", **options: Any
) -> ChromaDriver:
    settings = ChromaSettings(None, quiesce, tmp_path / "staging")
    return ChromaDriver(
        settings, container=lambda: engine.container(service.name), notes=tmp_path / "notes", **options
    )


@pytest.fixture
def slow_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of a locked copy takes a tenth of a second, as in a big directory: small ones win every race."""
    program = tmp_path / "slow.py"
    program.write_text(
        textwrap.dedent(f"""
            import importlib.util, sys, time
            spec = importlib.util.spec_from_file_location("snapshot", {chroma_snapshot.__file__!r})
            snapshot = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(snapshot)
            def slowly(real):
                def copy(*args):
                    time.sleep(0.1)
                    return real(*args)
                return copy
            snapshot.copy_file = slowly(snapshot.copy_file)
            snapshot.copy_database = slowly(snapshot.copy_database)
            sys.exit(snapshot.main(*sys.argv[1:]))
        """)
    )
    monkeypatch.setattr(chroma_snapshot, "__file__", str(program))


# --- captured while it is written to ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quiesce", "on_volume", "space"),
    [("lock", True, "l2"), ("lock", True, "cosine"), ("pause", True, "ip"), ("pause", False, "l2")],
)
def test_a_live_database_comes_back_as_it_was_at_one_instant(
    quiesce: str,
    on_volume: bool,
    space: str,
    sandbox: DockerSandbox,
    services: bed.Services,
    engine: Engine,
    tmp_path: Path,
    slow_copy: None,
) -> None:
    """A writer adds, updates and deletes all the while, and the index is written every few operations."""
    source = services.chroma(volume=services.volume() if on_volume else None)
    writer = Writer(source, "docs", space=space)
    for _ in range(25):
        writer.step()
    mine = driver(source, engine, tmp_path, quiesce=quiesce)
    writer.start()
    time.sleep(0.3)
    takes = []
    for _ in range(2):
        low = writer.acknowledged
        taken = captured.take(mine)
        takes.append((low, len(writer.ops), taken))
    writer.stop.set()
    writer.join()
    assert writer.error is None
    assert not list((tmp_path / "staging").iterdir())
    for number, (low, high, taken) in enumerate(takes):
        assert taken.point.attributes["quiesce"] == quiesce
        assert taken.point.facts["served"] == AS_CAPTURED
        assert not taken.point.warnings
        spec = mine.home(taken.point)
        home = sandbox.create(f"vectors{number}", spec)
        mine.load(taken, home)
        assert not home.running
        home.start()
        sandbox.wait_ready(home, spec)
        assert mine.facts(home) == taken.point.facts
        must_be_a_state_of(writer, home.address(8000), space, low, high)
        home.stop()


def test_a_plain_copy_of_a_live_database_does_not_agree(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """What the lock is for: files copied one after another, while they are written, do not belong together.
    The copying is slowed, as a big directory would; the very same checks must notice."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs", sync=20)
    for _ in range(25):
        writer.step()
    root = engine.container(source.name).mount("/data")
    assert root is not None
    writer.start()
    bad = 0
    for attempt in range(4):
        into = tmp_path / f"plain{attempt}"
        low = writer.acknowledged
        for path in sorted(root.rglob("*"), reverse=True):
            target = into / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path, target)
                    time.sleep(0.1)
        high = len(writer.ops)
        try:
            chroma_state.check_indexes(into)
            chroma_state.recover(into)
            _, odd = chroma_state.measure(into, still=True)
            with chroma_state.opened(into, still=True) as database:
                (collection,) = chroma_state.collections(database)
                state = chroma_state.State(into, database, collection)
                vectors = {key: state.vector(key) for key in state.ids()}
            fits = any(
                {k: struct.pack(f"{writer.dim}f", *v) for k, v in writer.after(n).items()} == vectors
                for n in range(low, high + 1)
            )
            bad += bool(odd) or not fits
        except (TornIndex, sqlite3.DatabaseError):
            bad += 1
    writer.stop.set()
    writer.join()
    assert bad >= 1, "the test shows nothing: every plain copy was sound by luck"


def test_the_lock_blocks_writers_for_a_moment_only_and_reads_go_on(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """Figures are kept with the recovery point."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs", dim=64, sync=100)
    for _ in range(40):
        writer.step()
    writer.start()
    taken = captured.take(driver(source, engine, tmp_path))
    writer.stop.set()
    writer.join()
    blocked = taken.point.attributes["blocked_seconds"]
    assert isinstance(blocked, float) and 0 <= blocked < 2
    assert writer.error is None and writer.slowest < 5


def test_a_database_with_a_write_ahead_log(services: bed.Services, engine: Engine, tmp_path: Path) -> None:
    """Some switch SQLite's journal to WAL: what is only in the log is captured too."""
    for quiesce in ("lock", "pause"):
        source = services.chroma(volume=services.volume())
        root = engine.container(source.name).mount("/data")
        assert root is not None
        with contextlib.closing(sqlite3.connect(root / "chroma.sqlite3")) as database:
            assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        writer = Writer(source, "docs", sync=1000)
        for _ in range(10):
            writer.step()
        assert (root / "chroma.sqlite3-wal").stat().st_size
        taken = captured.take(driver(source, engine, tmp_path, quiesce=quiesce))
        told: Any = taken.point.facts["collections"]
        (only,) = told.values()
        assert only["count"] == len(writer.after(10))


def test_several_tenants_databases_and_empty_collections(
    sandbox: DockerSandbox, services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """Every collection is told by its full name; one without records has facts as well."""
    source = services.chroma(volume=services.volume())
    at = (source.host, source.port)
    call(at, "POST", "/api/v2/tenants", {"name": "other"})
    call(at, "POST", "/api/v2/tenants/other/databases", {"name": "base"})
    call(at, "POST", "/api/v2/tenants/other/databases/base/collections", {"name": "empty"})
    writer = Writer(source, "docs")
    writer.step()
    mine = driver(source, engine, tmp_path)
    taken = captured.take(mine)
    told: Any = taken.point.facts["collections"]
    assert list(told) == ["default_tenant/default_database/docs", "other/base/empty"]
    spec = mine.home(taken.point)
    home = sandbox.create("vectors", spec)
    mine.load(taken, home)
    home.start()
    sandbox.wait_ready(home, spec)
    assert mine.facts(home) == taken.point.facts


# --- restores that must be refused, or noticed ---------------------------------------------------------------


def test_a_container_with_collections_is_refused_and_untouched(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """A running fresh one is restored into and runs again; after that it is fresh no more."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs")
    for _ in range(10):
        writer.step()
    mine = driver(source, engine, tmp_path)
    taken = captured.take(mine)
    fresh = services.chroma(volume=services.volume())
    target = engine.container(fresh.name)
    mine.load(taken, target)
    assert target.running
    assert mine.facts(target) == taken.point.facts
    with pytest.raises(RestoreFailed, match="already holds collections") as failure:
        mine.load(taken, target)
    assert failure.value.hint
    assert mine.facts(target) == taken.point.facts


def test_a_server_that_serves_something_else_is_noticed(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """Counts alone prove nothing: one embedding of hundreds differs, and it is told."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs", sync=50)
    for _ in range(20):
        writer.step()
    root = engine.container(source.name).mount("/data")
    assert root is not None
    client = Client(source.host, source.port)
    assert compare(client, root) == AS_CAPTURED
    source.container.pause()
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    source.container.unpause()
    data = next(copy.glob("*/data_level0.bin"))
    index = Index(data.parent)
    place, size, vector_at = index._places[index.labels[min(index.labels)]], index._size, index._vector_at
    index.close()
    with data.open("r+b") as file:
        file.seek(place * size + vector_at)
        file.write(struct.pack("f", 99.0))
    assert "embedding" in compare(client, copy)
    with contextlib.closing(sqlite3.connect(copy / "chroma.sqlite3")) as database:
        database.execute("DELETE FROM embeddings WHERE id = (SELECT max(id) FROM embeddings)")
        database.commit()
    assert "counts" in compare(client, copy)


# --- what can go wrong at capture -------------------------------------------------------------------------------


def test_the_wrong_directory_is_told(tmp_path: Path) -> None:
    """An empty directory is not an empty database."""
    mine = ChromaDriver(ChromaSettings(tmp_path))
    with pytest.raises(CaptureFailed, match=r"no chroma\.sqlite3") as failure:
        captured.take(mine)
    assert failure.value.hint and failure.value.exit_code == 20
    assert mine.check()[0].fatal


def test_a_damaged_index_fails_the_capture(services: bed.Services, engine: Engine, tmp_path: Path) -> None:
    """A pickle that is cut off: the copy is thrown away, and no recovery point is made."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs", sync=20)
    for _ in range(10):
        writer.step()
    root = engine.container(source.name).mount("/data")
    assert root is not None
    marker = next(root.glob("*/index_metadata.pickle"))
    marker.write_bytes(marker.read_bytes()[:-30] + b".")
    with pytest.raises(CaptureFailed, match="torn"):
        captured.take(driver(source, engine, tmp_path))
    assert not list((tmp_path / "staging").iterdir())


def test_a_full_staging_directory_fails_the_capture(
    services: bed.Services, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is locked or copied."""
    source = services.chroma(volume=services.volume())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
    with pytest.raises(CaptureFailed, match="needs") as failure:
        captured.take(driver(source, engine, tmp_path))
    assert "staging" in failure.value.hint


def test_the_staging_directory_goes_even_when_the_backup_fails(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """And what a killed agent left there goes with the next capture."""
    source = services.chroma(volume=services.volume())
    left = tmp_path / "staging" / "backupd-chroma-left"
    (left / "data").mkdir(parents=True)
    (left / "lock").touch()
    mine = driver(source, engine, tmp_path)
    with pytest.raises(ZeroDivisionError), mine.capture(None) as capture:
        assert isinstance(capture.content, Tree) and capture.content.root.is_dir()
        assert not left.exists()
        _ = 1 / 0
    assert not list((tmp_path / "staging").iterdir())


def test_losing_all_collections_is_a_warning(services: bed.Services, engine: Engine, tmp_path: Path) -> None:
    """A wiped server still has a whole, valid, empty database."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs")
    writer.step()
    mine = driver(source, engine, tmp_path)
    before = captured.take(mine).point
    call(writer.at, "DELETE", f"{BASE}/docs")
    with mine.capture(before) as capture:
        assert any("no collections any more" in warning for warning in capture.warnings)


# --- a pause ends, always -------------------------------------------------------------------------------------------


def status(service: bed.Service) -> str:
    service.container.reload()
    return str(service.container.status)


def test_a_failure_while_paused_ends_the_pause(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """Whatever it is."""
    source = services.chroma()
    with pytest.raises(ZeroDivisionError), paused(engine.container(source.name), tmp_path):
        assert status(source) == "paused"
        _ = 1 / 0
    assert status(source) == "running"
    assert not list(tmp_path.iterdir())


def test_a_pause_that_takes_too_long_ends_by_itself_and_fails(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """What was copied during it may be torn."""
    source = services.chroma()
    with (
        pytest.raises(CaptureFailed, match="was paused for"),
        paused(engine.container(source.name), tmp_path, limit=0.3),
    ):
        bed.wait_until(lambda: status(source) == "running", timeout=30, what="the end of the pause")


def test_somebody_elses_pause_is_left_alone(services: bed.Services, engine: Engine, tmp_path: Path) -> None:
    """It is not ours to end, not even later."""
    source = services.chroma(volume=services.volume())
    source.container.pause()
    with pytest.raises(CaptureFailed):
        captured.take(driver(source, engine, tmp_path, quiesce="pause"))
    assert release_left(tmp_path / "notes", engine.container) == []
    assert status(source) == "paused"


def test_an_agent_killed_during_a_pause_releases_it_at_its_next_start(
    services: bed.Services, engine: Engine, tmp_path: Path
) -> None:
    """The note on disk outlives the process."""
    source = services.chroma()
    program = f"""
        import os, signal, time
        from pathlib import Path
        from backupd.drivers._pause import paused
        from backupd.sandbox.engine import Engine
        with paused(Engine().container({source.name!r}), Path({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert status(source) == "paused"
    assert release_left(tmp_path, engine.container) == [source.name]
    assert status(source) == "running"
    assert release_left(tmp_path, engine.container) == []


# --- the parts -------------------------------------------------------------------------------------------------------


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    """A pickle may name any function of Python; ours is read for what it is."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    path = tmp_path / "index_metadata.pickle"
    path.write_bytes(pickle.dumps({"id_to_label": {"a": 1}, "more": Evil()}))
    with pytest.raises(TornIndex, match="asks for"):
        read_labels(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(pickle.dumps({"id_to_label": {"a": 1}}))
    assert read_labels(path) == {"a": 1}


def test_an_index_in_the_middle_of_a_write_is_not_settled(tmp_path: Path) -> None:
    """The pickle is written last: older than a data file, cut off or empty means that it is not done."""
    segment = tmp_path / "segment"
    segment.mkdir()
    data, marker = segment / "data_level0.bin", segment / "index_metadata.pickle"
    data.write_bytes(b"x")
    assert not chroma_snapshot.unsettled(tmp_path)  # never written yet
    marker.write_bytes(pickle.dumps({}))
    assert not chroma_snapshot.unsettled(tmp_path)
    os.utime(data, ns=(0, marker.stat().st_mtime_ns + 1))
    assert "newer" in chroma_snapshot.unsettled(tmp_path)
    os.utime(data, ns=(0, 0))
    marker.write_bytes(pickle.dumps({})[:-1])
    assert "cut off" in chroma_snapshot.unsettled(tmp_path)
    marker.write_bytes(b"")
    assert "empty" in chroma_snapshot.unsettled(tmp_path)


def test_the_lock_survives_another_reader_in_the_agent(
    services: bed.Services, engine: Engine, tmp_path: Path, slow_copy: None
) -> None:
    """Closing any descriptor of a file drops a process's POSIX locks on it: a volume source that reads the same
    directory must not unlock the capture."""
    source = services.chroma(volume=services.volume())
    writer = Writer(source, "docs", sync=20)
    for _ in range(15):
        writer.step()
    root = engine.container(source.name).mount("/data")
    assert root is not None
    writer.start()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            (root / "chroma.sqlite3").read_bytes()

    reader = threading.Thread(target=read)
    reader.start()
    mine = driver(source, engine, tmp_path)
    for _ in range(4):
        low = writer.acknowledged
        taken = captured.take(mine)
        told: Any = taken.point.facts["collections"]
        (facts,) = told.values()
        assert facts["count"] in {len(writer.after(n)) for n in range(low, len(writer.ops) + 1)}
    stop.set()
    reader.join()
    writer.stop.set()
    writer.join()


def test_what_may_be_reached_is_told_by_check(services: bed.Services, engine: Engine, tmp_path: Path) -> None:
    """Nothing for a mounted directory; that a container will be paused where it is not."""
    assert not driver(services.chroma(volume=services.volume()), engine, tmp_path).check()
    (problem,) = driver(services.chroma(), engine, tmp_path).check()
    assert not problem.fatal and "paused" in problem.message
