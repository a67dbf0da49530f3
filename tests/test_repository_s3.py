"""A repository in a bucket: the same keys, the same points, no spool on the way."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import services as bed
from engine import Engine
from fault_proxy import Fault, FaultProxy
from trees import describe, make_every_kind

from backupd.errors import Damaged
from backupd.model import Silence, Stream, Streams
from backupd.prune import prune
from backupd.repository import Repository
from backupd.retention import Policy
from backupd.stores import LocalStore, open_store
from backupd.stores.s3 import S3Options
from backupd.verify import verify


def options(server: bed.S3Server, endpoint: str = "") -> S3Options:
    return S3Options(
        endpoint_url=endpoint or server.endpoint, access_key_id=server.access_key,
        secret_access_key=server.secret_key, region=server.region,
    )  # fmt: skip


@pytest.fixture
def engine(s3_server: bed.S3Server) -> Engine:
    return Engine(open_store(f"s3://{s3_server.new_bucket()}/some/prefix", options(s3_server)))


def test_a_tree_goes_into_a_bucket_and_comes_back(engine: Engine, tmp_path: Path) -> None:
    make_every_kind(tmp_path / "tree")
    first = engine.write(tmp_path / "tree")
    (tmp_path / "tree" / "new").write_bytes(b"second")
    second = engine.write(tmp_path / "tree")
    assert second.stored < first.stored / 10
    assert describe(engine.restore(second, tmp_path / "restored")) == describe(tmp_path / "tree")
    report = verify(engine.repository, sources=None, data_percent=100, progress=Silence())
    assert (report.points, report.problems) == (2, [])
    prune(engine.repository, {"tree": Policy(last=1)}, clock=engine.clock, progress=Silence())
    assert [p.id for p in engine.repository.points()] == [second.id]


def test_a_dump_streams_into_the_bucket_without_a_spool(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the dump is at half, objects are in the bucket already; nothing is written to a temporary directory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seen: list[int] = []
    data = [random.Random(number).randbytes(1 << 20) for number in range(64)]

    def dump() -> Iterator[bytes]:
        for number, chunk in enumerate(data):
            if number == 56:
                for _ in range(100):
                    seen.append(sum(1 for _ in engine.store.list("packs/")))
                    if seen[-1]:
                        break
                    threading.Event().wait(0.1)
            yield chunk

    point = engine.write(Streams([Stream("a.dump", dump())]))
    assert seen[-1] > 0
    assert list(tmp_path.iterdir()) == []
    assert b"".join(engine.archive(point).read("a.dump")) == b"".join(data)


def test_a_bucket_copied_to_a_directory_restores_and_back_again(
    engine: Engine, s3_server: bed.S3Server, tmp_path: Path
) -> None:
    make_every_kind(tmp_path / "tree")
    point = engine.write(tmp_path / "tree")
    local = LocalStore(tmp_path / "copy", create=True)
    for info in engine.store.list():
        local.put(info.key, engine.store.get(info.key))
    back = open_store(f"s3://{s3_server.new_bucket()}", options(s3_server))
    for info in local.list():
        back.put(info.key, local.get(info.key))
    for number, store in enumerate((local, back)):
        engine.repository = Repository.open(store)
        assert describe(engine.restore(point, tmp_path / str(number))) == describe(tmp_path / "tree")


def test_a_bit_flipped_on_the_way_down_is_never_restored(
    engine: Engine, s3_server: bed.S3Server, tmp_path: Path
) -> None:
    """No client of S3 notices it; our digests do."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(os.urandom(5_000_000))
    point = engine.write(tmp_path / "tree")
    bucket, _, prefix = engine.store.location.removeprefix("s3://").partition("/")
    with FaultProxy(s3_server.endpoint) as proxy:
        proxy.fail(Fault.FLIPPED_DOWN, method="GET", path="packs/", times=1000)
        engine.repository.store = open_store(f"s3://{bucket}/{prefix}", options(s3_server, proxy.endpoint))
        with pytest.raises(Damaged):
            engine.restore(point, tmp_path / "restored")
