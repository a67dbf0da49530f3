"""What every store must do: one suite for memory, a local directory and S3, each also behind RetryStore."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import services as bed
from hypothesis import given
from hypothesis import strategies as st

from backupd.errors import Locked, ObjectExists, ObjectMissing, StoreError
from backupd.model import Store
from backupd.stores import LocalStore, MemoryStore, RetryStore
from backupd.stores.names import is_key
from backupd.stores.s3 import S3Options, S3Store

KINDS = ("memory", "local", "s3")
TTL = 3.0


@dataclass
class Place:
    """Somewhere to keep objects; opened again, it holds the same ones."""

    kind: str
    open: Callable[..., Store]
    foreign: Callable[[str], None]
    """Put something of a stranger there, under any name."""
    spec: dict[str, Any] = field(default_factory=dict)
    """How another process opens it; empty where it cannot."""


def make_place(kind: str, request: pytest.FixtureRequest) -> Place:
    """A fresh, empty place."""
    if kind == "memory":
        memory = MemoryStore()
        return Place(kind, lambda _="": memory, lambda _: None)
    if kind == "local":
        root = request.getfixturevalue("tmp_path") / "repository"
        LocalStore(root, create=True)

        def foreign_file(name: str) -> None:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"mine")

        return Place(kind, lambda _="": LocalStore(root), foreign_file, {"kind": kind, "root": str(root)})
    server: bed.S3Server = request.getfixturevalue("s3_server")
    bucket = request.getfixturevalue("bucket")
    prefix = f"{request.node.name[:40].replace('[', '-').rstrip(']')}/{os.urandom(4).hex()}"
    reach: dict[str, Any] = {
        "endpoint_url": server.endpoint,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
    }

    def foreign_object(name: str) -> None:
        server.client().put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"mine")

    spec = {"kind": kind, "bucket": bucket, "prefix": prefix, "options": reach}

    def open_s3(at: str = prefix) -> Store:
        store = S3Store(bucket, at, S3Options(**reach))
        if bucket not in clients:
            clients[bucket] = store._client
        store._made = clients[bucket]
        return store

    return Place(kind, open_s3, foreign_object, spec)


clients: dict[str, Any] = {}
"""Making a client takes 0.1 s and more; each test makes several stores."""


@pytest.fixture(scope="module")
def bucket(s3_server: bed.S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture(params=[*KINDS, *(f"retry-{kind}" for kind in KINDS)])
def place(request: pytest.FixtureRequest) -> Place:
    retried, _, kind = request.param.rpartition("-")
    made = make_place(kind, request)
    bed.exercised[f"store {kind}"] = "conformance"
    if retried:
        plain = made.open
        made.open = lambda *at: RetryStore(plain(*at))
    return made


@pytest.fixture(params=KINDS)
def leasing(request: pytest.FixtureRequest) -> Place:
    """Leases only pass through RetryStore, which tests of its own show."""
    return make_place(request.param, request)


@pytest.fixture(params=["local", "s3"])
def shared(request: pytest.FixtureRequest) -> Place:
    """A place that several processes can open."""
    return make_place(request.param, request)


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


# --- objects -------------------------------------------------------------------------------------------


def test_what_was_put_is_got_back(place: Place) -> None:
    """The bytes come back as they were, also to another store on the same place."""
    data = os.urandom(300_000)
    place.open().put("packs/orders/0001.zst", data)
    assert place.open().get("packs/orders/0001.zst") == data


def test_a_view_is_stored_as_its_bytes(store: Store) -> None:
    """What it shows may be used for something else as soon as that is done."""
    buffer = bytearray(os.urandom(300_000))
    shown = bytes(buffer[100:200_000])
    store.put("a", memoryview(buffer)[100:200_000])
    buffer[:] = bytes(300_000)
    assert store.get("a") == shown


def test_an_empty_object_is_an_object(store: Store) -> None:
    """Nothing can be stored: it is listed, has size 0, and any range of it is empty."""
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.get("empty", offset=5, length=5) == b""
    assert store.stat("empty").size == 0
    assert keys(store) == ["empty"]


def test_a_range_is_what_a_slice_would_be(store: Store) -> None:
    """Any offset and length give the bytes a slice would; past the end is short, not an error."""
    data = bytes(range(256)) * 4
    store.put("a/range", data)
    for offset, length in [(0, 1), (0, 1024), (10, 20), (1000, 100), (1023, 1), (1024, 1), (5000, 9), (3, 0)]:
        assert store.get("a/range", offset=offset, length=length) == data[offset : offset + length]
    assert store.get("a/range", offset=1000) == data[1000:]
    assert store.get("a/range", offset=2000) == b""


def test_a_range_that_cannot_be_is_refused(store: Store) -> None:
    """Negative offsets and lengths raise; they never count from the end."""
    store.put("a", b"abc")
    for offset, length in [(-1, None), (0, -1), (-3, 2)]:
        with pytest.raises(StoreError):
            store.get("a", offset=offset, length=length)


def test_what_is_not_there_is_missing(store: Store) -> None:
    """get, ranged or not, stat and delete raise ObjectMissing, with a message that names the key."""
    store.put("dir/there", b"1")
    for key in ("nothing", "dir/nothing", "dir", "no/such/dir", "dir/there/below"):
        for call in (
            lambda key=key: store.get(key),
            lambda key=key: store.get(key, offset=1, length=2),
            lambda key=key: store.get(key, length=0),
            lambda key=key: store.stat(key),
            lambda key=key: store.delete(key),
        ):
            with pytest.raises(ObjectMissing, match=key):
                call()


def test_stat_tells_size_and_time(store: Store) -> None:
    """Size in bytes; the time is aware, in UTC, and now."""
    before = datetime.now(UTC)
    store.put("a/b", b"12345")
    info = store.stat("a/b")
    assert (info.key, info.size) == ("a/b", 5)
    assert info.modified.utcoffset() == timedelta(0)
    assert abs(info.modified - before) < timedelta(seconds=10)
    [listed] = store.list()
    assert (listed.key, listed.size, listed.modified.utcoffset()) == ("a/b", 5, timedelta(0))


def test_an_object_is_never_replaced_in_silence(store: Store) -> None:
    """A second put raises ObjectExists, even of the same bytes, and the first object stays."""
    store.put("a", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(ObjectExists, match="a"):
            store.put("a", data)
    assert store.get("a") == b"first"


def test_overwrite_replaces(store: Store) -> None:
    """With `overwrite` the new bytes are there, whether or not there was an object."""
    store.put("a", b"first", overwrite=True)
    store.put("a", b"2nd", overwrite=True)
    assert store.get("a") == b"2nd"
    assert keys(store) == ["a"]


def test_a_deleted_object_is_gone_and_may_come_again(store: Store) -> None:
    """After delete neither get nor list sees it, its neighbours stay, and its key is free."""
    store.put("d/a", b"1")
    store.put("d/b", b"2")
    store.delete("d/a")
    assert keys(store) == ["d/b"]
    with pytest.raises(ObjectMissing):
        store.get("d/a")
    store.delete("d/b")
    assert keys(store) == []
    store.put("d/a", b"3")
    assert store.get("d/a") == b"3"


def test_of_many_puts_of_one_key_exactly_one_wins(place: Place) -> None:
    """Eight at once, several times: one success each, seven ObjectExists, and the bytes are the winner's."""
    store = place.open()
    for round_ in range(3 if place.kind == "s3" else 25):
        key = f"race/{round_}"
        gate = threading.Barrier(8)

        def race(number: int, key: str = key, gate: threading.Barrier = gate) -> bytes | None:
            data = b"%d " % number * 1000
            gate.wait()
            try:
                store.put(key, data)
            except ObjectExists:
                return None
            return data

        with ThreadPoolExecutor(8) as racers:
            won = [data for data in racers.map(race, range(8)) if data is not None]
        assert len(won) == 1
        assert store.get(key) == won[0]


def test_many_threads_may_use_one_store(store: Store) -> None:
    """Puts, gets and deletes of several threads do not disturb each other."""

    def work(number: int) -> None:
        data = os.urandom(20_000)
        for turn in range(5):
            key = f"t/{number}/{turn}"
            store.put(key, data)
            assert store.get(key, offset=7, length=100) == data[7:107]
            if turn % 2:
                store.delete(key)

    with ThreadPoolExecutor(8) as workers:
        list(workers.map(work, range(8)))
    assert keys(store) == [f"t/{number}/{turn}" for number in range(8) for turn in (0, 2, 4)]


# --- lists ---------------------------------------------------------------------------------------------


def test_an_empty_store_lists_nothing(store: Store) -> None:
    """No object, no error."""
    assert keys(store) == []
    assert keys(store, "packs/") == []


def test_a_list_is_sorted_by_whole_key(store: Store) -> None:
    """`orders-2/x` comes before `orders/x`: keys are compared as text, not directory by directory."""
    given_ = ["a/x", "a-b/x", "a.b", "A", "a0/x/y", "a/y/z", "a-b/w", "b", "_", "a/x-1", "a/x.1"]
    for key in given_:
        store.put(key, b"")
    assert keys(store) == sorted(given_)


def test_a_prefix_is_text_not_a_directory(store: Store) -> None:
    """Any beginning of a key selects: part of a name, a directory with or without its slash."""
    given_ = ["points/a/1", "points/a/2", "points/ab/1", "points/b/1", "packs/a/1"]
    for key in given_:
        store.put(key, b"")
    for prefix in (
        "",
        "p",
        "points",
        "points/",
        "points/a",
        "points/a/",
        "points/a/2",
        "points/a/22",
        "x/y/",
    ):
        assert keys(store, prefix) == sorted(key for key in given_ if key.startswith(prefix)), prefix


def test_2500_objects_are_all_listed(place: Place) -> None:
    """More than two pages of an S3 listing, each key once, in order."""
    store = place.open("many-objects")  # S3: one place for both tests, as it takes 10 s to fill
    made = [f"many/{number % 7}/{number:05d}" for number in range(2500)]
    if not any(store.list()):
        with ThreadPoolExecutor(8) as workers:
            list(workers.map(lambda key: store.put(key, b""), made))
    assert keys(store) == sorted(made)
    assert keys(store, "many/3/") == sorted(key for key in made if key.startswith("many/3/"))


def test_what_strangers_put_there_is_not_ours(place: Place) -> None:
    """Names that no key has are neither shown nor taken: lost+found, .DS_Store, our own temporary files."""
    store = place.open()
    store.put("a/b", b"1")
    for name in (".DS_Store", "lost+found/x", "a/.nfs0001", "a/+tmp-0011", "with space", "ä"):
        place.foreign(name)
    assert keys(store) == ["a/b"]
    for name in (".DS_Store", "lost+found/x", "a/+tmp-0011"):
        with pytest.raises(StoreError):
            store.get(name)


# --- names ---------------------------------------------------------------------------------------------

BAD = [
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.b", "a b", "a\\b", "a\n",
    "a\x00b", "ä", "a+b", "a:b", "a*", "x" * 201, "x/" * 401 + "x", "~", "%2e%2e", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_a_bad_name_is_refused_everywhere(key: str, tmp_path: Path) -> None:
    """put, get, stat, delete and lease raise before anything is touched, on every store."""
    root = tmp_path / "root"
    options = S3Options(endpoint_url="http://127.0.0.1:1", access_key_id="a", secret_access_key="b")
    for store in (MemoryStore(), LocalStore(root, create=True), S3Store("bucket", "", options)):
        for call in (
            lambda store=store: store.put(key, b"1"),
            lambda store=store: store.get(key),
            lambda store=store: store.stat(key),
            lambda store=store: store.delete(key),
            lambda store=store: store.lease(key).__enter__(),
        ):
            with pytest.raises(StoreError, match=r"cannot be the name"):
                call()  # type: ignore[no-untyped-call]
    assert [path.name for path in tmp_path.rglob("*")] == ["root"]


@pytest.mark.parametrize("prefix", ["/", "../", "a//", ".", "a/.", "a b", "+"])
def test_a_prefix_no_key_has_is_refused(prefix: str, tmp_path: Path) -> None:
    """A list of a mistyped prefix raises at once, rather than be empty."""
    options = S3Options(endpoint_url="http://127.0.0.1:1", access_key_id="a", secret_access_key="b")
    for store in (MemoryStore(), LocalStore(tmp_path), S3Store("bucket", "", options)):
        with pytest.raises(StoreError, match="can begin with"):
            store.list(prefix)


@given(st.text(alphabet="aZ09._-/+ \\\x00\nä", max_size=12))
def test_a_key_stays_below_the_root(text: str) -> None:
    """Whatever is a key is a plain relative path without dots, the same on every file system."""
    if is_key(text):
        path = Path("/root") / text
        assert path.relative_to("/root").as_posix() == text
        assert all(part not in (".", "..") for part in path.parts)
        assert text.isascii() and text.isprintable()


# --- leases --------------------------------------------------------------------------------------------


def test_a_lease_excludes_others(leasing: Place) -> None:
    """While one holds it, another gets Locked, with the holder named; afterwards it is free."""
    one, other = leasing.open(), leasing.open()
    with one.lease("leases/prune.json", ttl=TTL) as lease:
        lease.check()
        with pytest.raises(Locked, match=str(os.getpid())), other.lease("leases/prune.json", ttl=TTL):
            pytest.fail("two holders")
        with other.lease("leases/verify.json", ttl=TTL) as second:
            second.check()
        lease.check()
    with other.lease("leases/prune.json", ttl=TTL) as lease:
        lease.check()


def test_the_token_grows_with_every_holder(leasing: Place) -> None:
    """A fencing token: strictly growing, even when somebody removed the lease's object in between."""
    tokens = []
    for turn in range(4):
        store = leasing.open()
        with store.lease("leases/prune.json", ttl=TTL) as lease:
            tokens.append(lease.token)
        if turn == 2:
            time.sleep(1.1)
            store.delete("leases/prune.json")
    assert tokens == sorted(set(tokens))


def test_a_lease_is_kept_longer_than_its_time_to_live(leasing: Place) -> None:
    """It is renewed while the work goes on."""
    store = leasing.open()
    with store.lease("leases/prune.json", ttl=2.0) as lease:
        time.sleep(2.5)
        lease.check()
        with pytest.raises(Locked), leasing.open().lease("leases/prune.json", ttl=2.0):
            pytest.fail("two holders")


def test_check_raises_once_the_lease_is_lost(leasing: Place) -> None:
    """Somebody removes the lease's object: within its time to live the holder is told, and stays told."""
    store = leasing.open()
    with store.lease("leases/prune.json", ttl=TTL) as lease:
        store.delete("leases/prune.json")
        deadline = time.monotonic() + TTL + 1
        with pytest.raises(Locked, match="lost"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.05)
        with pytest.raises(Locked, match="lost"):
            lease.check()
    with store.lease("leases/prune.json", ttl=TTL) as lease:
        lease.check()


def test_an_error_inside_lets_the_lease_go(leasing: Place) -> None:
    """The holder's own exception comes through, and the next one gets the lease at once."""
    store = leasing.open()
    with pytest.raises(ZeroDivisionError), store.lease("leases/a.json", ttl=60):
        raise ZeroDivisionError
    started = time.monotonic()
    with store.lease("leases/a.json", ttl=60) as lease:
        lease.check()
    assert time.monotonic() - started < 5


def test_a_lease_object_that_is_no_lease_is_an_error_with_a_hint(leasing: Place) -> None:
    """Garbage under the lease's key is not taken over in silence."""
    store = leasing.open()
    store.put("leases/a.json", b"\x00garbage")
    with pytest.raises(StoreError) as caught, store.lease("leases/a.json", ttl=TTL):
        pytest.fail("a lease on garbage")
    assert caught.value.hint


# --- leases between processes ----------------------------------------------------------------------------

HOLDER = """
import json, sys, time
spec = json.loads(sys.argv[1])
from backupd.errors import Locked
from backupd.stores import LocalStore
from backupd.stores.s3 import S3Options, S3Store
store = (LocalStore(spec["root"]) if spec["kind"] == "local"
         else S3Store(spec["bucket"], spec["prefix"], S3Options(**spec["options"])))
for line in sys.stdin:
    try:
        with store.lease("leases/prune.json", ttl=float(line)) as lease:
            print(lease.token, flush=True)
            sys.stdin.readline()
            lease.check()
        print("kept", flush=True)
    except Locked:
        print("locked", flush=True)
"""


class Holder:
    """Another process that takes the lease when told."""

    def __init__(self, place: Place) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, json.dumps(place.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=bed.die_with_parent,  # noqa: PLW1509  one prctl; no lock is taken
        )

    def say(self, line: str) -> str:
        """What it answers, within the test's time."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self, signal_: int = signal.SIGKILL) -> None:
        self.process.send_signal(signal_)


@pytest.fixture
def holders(shared: Place) -> Iterator[list[Holder]]:
    made = [Holder(shared), Holder(shared)]
    yield made
    for each in made:
        each.kill(signal.SIGCONT)
        each.process.kill()
        each.process.communicate()


def test_a_lease_excludes_other_processes(shared: Place, holders: list[Holder]) -> None:
    """One process has it, the other is told that it is locked; afterwards it gets a greater token."""
    first, second = holders
    token = int(first.say(f"{TTL}"))
    assert second.say(f"{TTL}") == "locked"
    assert first.say("done") == "kept"
    assert int(second.say(f"{TTL}")) > token


def test_the_lease_of_a_killed_process_is_taken_over(shared: Place, holders: list[Holder]) -> None:
    """SIGKILL inside the lease: the next has it after 1.5 * ttl of watching at most, with a greater token."""
    first, second = holders
    token = int(first.say(f"{TTL}"))
    first.kill()
    first.process.wait()
    time.sleep(TTL)  # younger than half its time to live, its holder counts as alive
    started = time.monotonic()
    assert int(second.say(f"{TTL}")) > token
    assert time.monotonic() - started < 30  # how long exactly is told by tests with a clock of their own


def test_a_frozen_holder_is_told_when_it_wakes(shared: Place, holders: list[Holder]) -> None:
    """SIGSTOP for longer than the lease lives: on S3 another has it by then, and the first must not go on."""
    if (
        shared.kind == "local"
    ):  # the kernel keeps a frozen process's lock: nobody can take it, so nothing is lost
        assert int(holders[0].say(f"{TTL}"))
        holders[0].kill(signal.SIGSTOP)
        assert holders[1].say(f"{TTL}") == "locked"
        return
    first, second = holders
    token = int(first.say(f"{TTL}"))
    first.kill(signal.SIGSTOP)
    time.sleep(TTL)
    assert int(second.say(f"{TTL}")) > token
    first.kill(signal.SIGCONT)
    assert first.say("done") == "locked"  # its check raised
    assert second.say("done") == "kept"
