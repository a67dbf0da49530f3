"""Stores in trouble: a full disk, and every fault a network can have between us and S3.

What must hold through all of it: what was acknowledged is there with its bytes, nothing half-written is shown,
and what failed says so in one line with a hint.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import services as bed
from fault_proxy import Fault, FaultProxy

from backupd.errors import Locked, ObjectExists, ObjectMissing, StoreError
from backupd.stores import LocalStore, RetryStore
from backupd.stores.s3 import S3Options, S3Store

DATA = random.Random(1).randbytes(300_000)

ON_THE_WAY_UP = [
    Fault.ERROR_500, Fault.ERROR_503, Fault.RESET_BEFORE, Fault.RESET_MIDWAY, Fault.HANG, Fault.LOST_REPLY,
    Fault.FLIPPED_UP,
]  # fmt: skip
ON_THE_WAY_DOWN = [
    Fault.ERROR_500, Fault.ERROR_503, Fault.RESET_BEFORE, Fault.HANG, Fault.LOST_REPLY, Fault.TRUNCATED,
    Fault.RESET_ANSWER,
]  # fmt: skip


# --- a full disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB. Fails where nothing can be mounted: run the tests as root."""
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "backupd-test", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_full_disk_leaves_nothing_and_says_what_to_do(small_disk: Path) -> None:
    """No object, no temporary file, what was there is untouched; it is not tried again for minutes."""
    store = RetryStore(LocalStore(small_disk))
    store.put("packs/a", DATA)
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot write .*packs/b: disk full") as caught:
        store.put("packs/b", bytes(3 << 20))
    assert time.monotonic() - started < 20
    assert "prune" in caught.value.hint and not caught.value.transient
    assert files(small_disk) == ["packs/a"]
    assert store.get("packs/a") == DATA
    store.put("packs/c", DATA)
    assert [info.key for info in store.list()] == ["packs/a", "packs/c"]


def test_a_full_disk_keeps_the_object_that_was_to_be_replaced(small_disk: Path) -> None:
    """Overwriting fails whole: the old bytes stay."""
    store = LocalStore(small_disk)
    store.put("a", DATA)
    with pytest.raises(StoreError, match="disk full"):
        store.put("a", bytes(3 << 20), overwrite=True)
    assert store.get("a") == DATA
    assert files(small_disk) == ["a"]


def test_space_can_be_made_on_a_full_disk(small_disk: Path) -> None:
    """Deleting works when nothing can be written any more, and a lease's failure says why."""
    store = LocalStore(small_disk)
    with store.lease("leases/prune.json"):
        pass
    number = 0
    with pytest.raises(StoreError, match="disk full"):
        while True:
            store.put(f"packs/{number:04d}", bytes(4096))
            number += 1
    with pytest.raises(StoreError, match="disk full"), store.lease("leases/prune.json"):
        pytest.fail("a lease without its record")
    store.delete("packs/0000")
    store.delete("packs/0001")
    with store.lease("leases/prune.json") as lease:
        lease.check()


def test_a_disk_that_turned_read_only_is_told(small_disk: Path) -> None:
    """As the kernel does after an error: reading works, writing says what to do."""
    store = LocalStore(small_disk)
    store.put("a", DATA)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert store.get("a") == DATA
    for call in (lambda: store.put("b", b"1"), lambda: store.delete("a")):
        with pytest.raises(StoreError, match="read-only") as caught:
            call()  # type: ignore[no-untyped-call]
        assert "writable" in caught.value.hint


# --- a network in trouble --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(s3_server: bed.S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture(scope="module")
def running_proxy(s3_server: bed.S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def proxy(running_proxy: FaultProxy) -> FaultProxy:
    """Breaks nothing yet."""
    running_proxy.clear()
    return running_proxy


clients: dict[S3Options, Any] = {}
"""Making a client takes 0.1 s and more: one for each way of reaching the server."""


def make_store(bucket: str, prefix: str, options: S3Options) -> S3Store:
    store = S3Store(bucket, prefix, options)
    if options not in clients:
        clients[options] = store._client
    store._made = clients[options]
    store.put(f"warm/{os.urandom(4).hex()}", b"")  # the first write's questions to the server are asked
    return store


@pytest.fixture
def direct(s3_server: bed.S3Server, bucket: str) -> S3Store:
    """The bucket without the proxy: what is really there."""
    options = S3Options(
        endpoint_url=s3_server.endpoint,
        access_key_id=s3_server.access_key,
        secret_access_key=s3_server.secret_key,
    )
    return make_store(bucket, os.urandom(6).hex(), options)


Through = Callable[..., S3Store]


@pytest.fixture
def through(direct: S3Store, proxy: FaultProxy, bucket: str) -> Through:
    """The same place through the proxy."""

    def make(**changes: object) -> S3Store:
        options = replace(
            direct._options,
            **{"endpoint_url": proxy.endpoint, "read_timeout": 0.7, "attempts": 2, **changes},  # type: ignore[arg-type]
        )
        return make_store(bucket, direct._prefix, options)

    return make


def patient(store: S3Store, patience: float = 60.0) -> RetryStore:
    return RetryStore(store, patience=patience, first=0.05, longest=0.2)


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("fault", ON_THE_WAY_UP)
def test_a_put_survives(
    fault: Fault, times: int, proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Once, waited out by the library, and again and again, by RetryStore: the object is there, whole, once."""
    store = patient(through(attempts=2 if times == 1 else 1))
    proxy.fail(fault, method="PUT", path="packs/", times=times)
    store.put("packs/a/0000.zst", DATA)
    assert proxy.count(fault) == times
    assert direct.get("packs/a/0000.zst") == DATA
    assert [info.key for info in direct.list("packs/")] == ["packs/a/0000.zst"]
    with pytest.raises(ObjectExists):
        store.put("packs/a/0000.zst", DATA)


@pytest.mark.parametrize("fault", [fault for fault in ON_THE_WAY_UP if fault is not Fault.LOST_REPLY])
def test_a_put_that_fails_for_good_leaves_nothing(
    fault: Fault, proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """The trouble outlasts the patience: one line, a hint, and no object, whole or half."""
    store = patient(through(attempts=1, read_timeout=0.3), patience=0.3)
    proxy.fail(fault, method="PUT", path="packs/", times=1000)
    with pytest.raises(StoreError) as caught:
        store.put("packs/a/0000.zst", DATA)
    assert caught.value.transient and caught.value.hint and "\n" not in str(caught.value)
    assert list(direct.list("packs/")) == []


@pytest.mark.parametrize("checksum", ["when_supported", "when_required"])
def test_bytes_changed_on_their_way_are_refused_by_the_server(
    checksum: str, proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """With CRC32 and with Content-MD5: the store is told, and nothing is kept."""
    store = through(request_checksum=checksum, attempts=1)
    proxy.fail(Fault.FLIPPED_UP, method="PUT", path="packs/")
    with pytest.raises(StoreError) as caught:
        store.put("packs/a", DATA)
    assert caught.value.transient
    assert list(direct.list("packs/")) == []


def test_a_lost_answer_does_not_hide_that_the_key_was_taken(
    proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Another's object, the same size: a put that is sent twice still gets ObjectExists, and theirs stays."""
    theirs = bytes(len(DATA))
    direct.put("packs/a", theirs)
    for store in (through(), patient(through(attempts=1))):
        proxy.fail(Fault.LOST_REPLY, method="PUT", path="packs/a")
        with pytest.raises(ObjectExists):
            store.put("packs/a", DATA)
    assert direct.get("packs/a") == theirs


def test_a_put_sent_twice_by_the_library_is_recognised_by_the_store_itself(
    proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Without RetryStore: done, answer lost, sent again, 412, and the object carries the mark of this put."""
    store = through()
    proxy.fail(Fault.LOST_REPLY, method="PUT", path="packs/a")
    store.put("packs/a", DATA)
    assert proxy.count(Fault.LOST_REPLY) == 1
    assert direct.get("packs/a") == DATA


@pytest.mark.parametrize("fault", ON_THE_WAY_DOWN)
def test_a_get_survives(fault: Fault, proxy: FaultProxy, through: Through, direct: S3Store) -> None:
    """Whole and ranged: the right bytes, all of them."""
    direct.put("packs/a", DATA)
    store = patient(through(attempts=1))
    proxy.fail(fault, method="GET", path="packs/a", times=2)
    assert store.get("packs/a") == DATA
    proxy.fail(fault, method="GET", path="packs/a", times=2)
    assert store.get("packs/a", offset=1000, length=200_000) == DATA[1000:201_000]
    assert proxy.count(fault) == 4


@pytest.mark.parametrize("fault", [Fault.TRUNCATED, Fault.RESET_ANSWER])
def test_an_answer_cut_short_is_never_taken_for_the_whole(
    fault: Fault, proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Without RetryStore: get and list raise, transient; never fewer bytes, never a short list."""
    direct.put("packs/a", DATA)
    for number in range(30):
        direct.put(f"points/{number}", b"")
    store = through(attempts=1)
    proxy.fail(fault, method="GET", times=3)
    for call in (
        lambda: store.get("packs/a"),
        lambda: store.get("packs/a", offset=5, length=1000),
        lambda: list(store.list("points/")),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.transient and not isinstance(caught.value, ObjectMissing)
    assert proxy.count(fault) == 3


@pytest.mark.parametrize("fault", ON_THE_WAY_DOWN)
def test_a_list_survives(fault: Fault, proxy: FaultProxy, through: Through, direct: S3Store) -> None:
    """All of it, once each; or an error."""
    made = [f"points/{number:02d}" for number in range(30)]
    for key in made:
        direct.put(key, b"")
    store = patient(through(attempts=1))
    proxy.fail(fault, method="GET", path="list-type=2", times=2)
    assert [info.key for info in store.list("points/")] == made
    proxy.fail(Fault.ERROR_500, method="GET", path="list-type=2", times=1000)
    with pytest.raises(StoreError):
        patient(through(attempts=1), patience=0.1).list("points/")


def test_a_bit_flipped_on_the_way_down_is_for_the_caller_to_notice(
    proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """As the contract says: no server and no library notices, so every reader compares digests."""
    direct.put("packs/a", DATA)
    proxy.fail(Fault.FLIPPED_DOWN, method="GET", path="packs/a")
    got = through().get("packs/a")
    assert len(got) == len(DATA) and got != DATA


def test_a_delete_whose_answer_is_lost_is_done(proxy: FaultProxy, through: Through, direct: S3Store) -> None:
    """Sent again, it finds nothing, and that is right."""
    direct.put("packs/a", DATA)
    proxy.fail(Fault.LOST_REPLY, method="DELETE", times=3)
    patient(through(attempts=1)).delete("packs/a")
    assert list(direct.list("packs/")) == []


def test_through_any_weather_what_was_acknowledged_is_there(
    proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Four threads, eighty objects, faults at random: each put that returned is whole, each listed one too."""
    weather = random.Random(7)
    store = patient(through(attempts=2, read_timeout=0.5))
    for number in range(80):
        for fault in weather.choices(ON_THE_WAY_UP, k=weather.choice([0, 0, 0, 1, 2, 3])):
            proxy.fail(fault, method="PUT", path=f"packs/{number:03d}")

    def work(number: int) -> tuple[str, bytes]:
        key, data = f"packs/{number:03d}", DATA[number : number + 50_000 + number]
        store.put(key, data)
        return key, data

    with ThreadPoolExecutor(4) as workers:
        acknowledged = dict(workers.map(work, range(80)))
    assert len({seen.fault for seen in proxy.seen}) == len(ON_THE_WAY_UP) + 1
    assert {info.key: info.size for info in direct.list("packs/")} == {
        key: len(data) for key, data in acknowledged.items()
    }
    assert all(direct.get(key) == data for key, data in acknowledged.items())


# --- leases in trouble -------------------------------------------------------------------------------------------


def test_a_lease_survives_lost_answers(proxy: FaultProxy, through: Through) -> None:
    """Taking and renewing with answers lost: our own record is recognised, and nobody else gets in."""
    store = through()
    store._check_conditions()
    proxy.fail(Fault.LOST_REPLY, method="PUT", path="leases/", times=2)
    with store.lease("leases/prune.json", ttl=3.0) as lease:
        proxy.fail(Fault.LOST_REPLY, method="PUT", path="leases/", times=1)
        time.sleep(3.2)
        lease.check()
        with pytest.raises(Locked), store.lease("leases/prune.json", ttl=3.0):
            pytest.fail("two holders")
    assert proxy.count(Fault.LOST_REPLY) == 3
    with store.lease("leases/prune.json", ttl=3.0) as lease:
        lease.check()


def test_a_holder_cut_off_from_the_store_has_lost_its_lease(
    proxy: FaultProxy, through: Through, direct: S3Store
) -> None:
    """Nothing gets through any more: check raises before another can have it."""
    store = through()
    with store.lease("leases/prune.json", ttl=1.5) as lease:
        proxy.fail(Fault.RESET_BEFORE, path="leases/", times=10_000)
        time.sleep(1.6)
        with pytest.raises(Locked, match="lost"):
            lease.check()
        with direct.lease("leases/prune.json", ttl=1.5) as other:
            other.check()
            with pytest.raises(Locked):
                lease.check()


# --- a slow line -------------------------------------------------------------------------------------------------


def test_the_proxy_shapes_a_line(s3_server: bed.S3Server, direct: S3Store, bucket: str) -> None:
    """Latency and bandwidth are what was asked for, so that benchmarks may lean on them."""
    direct.put("a", bytes(1_000_000))
    with FaultProxy(s3_server.endpoint, latency=0.1, bandwidth=2_000_000) as slow:
        store = S3Store(bucket, direct._prefix, replace(direct._options, endpoint_url=slow.endpoint))
        store.stat("a")
        took = []
        for _ in range(5):
            started = time.monotonic()
            assert len(store.get("a")) == 1_000_000
            took.append(time.monotonic() - started)
            if took[-1] < 1.5:  # else the machine was busy meanwhile
                break
        assert 0.55 <= min(took) < 1.5
