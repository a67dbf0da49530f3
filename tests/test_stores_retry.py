"""The store round a store that waits out trouble, on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backupd.errors import ObjectExists, ObjectMissing, StoreError
from backupd.model import Bytes, ObjectInfo
from backupd.stores import MemoryStore, RetryStore


class Time:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Flaky(MemoryStore):
    """Fails the next `failures` calls, before or after doing what was asked."""

    def __init__(self, failures: int = 0, *, after: bool = False, transient: bool = True) -> None:
        super().__init__()
        self.failures, self.after, self.transient = failures, after, transient
        self.calls = 0

    def _trouble(self, after: bool) -> None:
        self.calls += not after
        if self.failures > 0 and after == self.after:
            self.failures -= 1
            raise StoreError("trouble", hint="wait", transient=self.transient)

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        self._trouble(False)
        super().put(key, data, overwrite=overwrite)
        self._trouble(True)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._trouble(False)
        return super().get(key, offset=offset, length=length)

    def delete(self, key: str) -> None:
        self._trouble(False)
        super().delete(key)
        self._trouble(True)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix)):
            if number == 2:
                self._trouble(False)
            yield info


def wrapped(store: MemoryStore, time: Time, *, chance: float = 0.0, patience: float = 300.0) -> RetryStore:
    return RetryStore(store, patience=patience, sleep=time.sleep, now=lambda: time.now, chance=lambda: chance)


def test_transient_trouble_is_waited_out_with_growing_pauses() -> None:
    """0.5 s, doubling, at most 30 s."""
    time, store = Time(), Flaky(9)
    wrapped(store, time).put("a", b"1")
    assert time.slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert store.calls == 10


def test_pauses_are_shortened_at_random_by_up_to_a_half() -> None:
    """So that many agents do not come back together."""
    time = Time()
    wrapped(Flaky(3), time, chance=0.999).put("a", b"1")
    assert time.slept == pytest.approx([0.25, 0.5, 1], rel=0.01)


def test_patience_ends() -> None:
    """The last error comes out unchanged; no pause goes beyond the patience."""
    time, store = Time(), Flaky(1000)
    with pytest.raises(StoreError, match="trouble") as caught:
        wrapped(store, time, patience=60).put("a", b"1")
    assert caught.value.hint == "wait" and caught.value.transient
    assert sum(time.slept) <= 60
    assert sum(time.slept) + 32 > 60


def test_no_patience_is_one_attempt() -> None:
    """For commands with a person waiting."""
    time, store = Time(), Flaky(1)
    with pytest.raises(StoreError):
        wrapped(store, time, patience=0).put("a", b"1")
    assert store.calls == 1 and time.slept == []


def test_what_is_not_transient_is_not_tried_again() -> None:
    """A wrong key stays wrong."""
    time, store = Time(), Flaky(1, transient=False)
    with pytest.raises(StoreError):
        wrapped(store, time).get("a")
    assert store.calls == 1 and time.slept == []
    with pytest.raises(ObjectMissing):
        wrapped(store, time).get("a")
    assert time.slept == []


def test_an_object_whose_answer_was_lost_is_recognised_as_ours() -> None:
    """Stored, then an error, then ObjectExists: the same bytes are there, so the put is done."""
    time, store = Time(), Flaky(1, after=True)
    wrapped(store, time).put("a", b"ours")
    assert store.get("a") == b"ours"


@pytest.mark.parametrize("theirs", [b"them", b"longer than ours"])
def test_an_object_of_somebody_else_is_not_taken_for_ours(theirs: bytes) -> None:
    """Other bytes under the key after a failed attempt: ObjectExists, and theirs stay."""
    time = Time()

    class Overtaken(Flaky):
        def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
            if self.failures:
                MemoryStore.put(self, key, theirs)
            super().put(key, data, overwrite=overwrite)

    store = Overtaken(1)
    with pytest.raises(ObjectExists):
        wrapped(store, time).put("a", b"ours")
    assert store.get("a") == theirs


def test_an_object_that_was_there_is_never_ours() -> None:
    """The same bytes, but found by the very first attempt."""
    store = MemoryStore()
    store.put("a", b"same")
    with pytest.raises(ObjectExists):
        wrapped(store, Time()).put("a", b"same")


def test_a_delete_whose_answer_was_lost_is_done() -> None:
    """Deleted, then an error, then ObjectMissing: the delete is done."""
    store = Flaky()
    store.put("a", b"1")
    store.failures, store.after = 1, True
    wrapped(store, Time()).delete("a")
    with pytest.raises(ObjectMissing):
        store.stat("a")
    with pytest.raises(ObjectMissing):
        wrapped(store, Time()).delete("a")


def test_a_list_that_fails_midway_is_listed_anew() -> None:
    """The caller sees each object once, or an error and none."""
    store = Flaky()
    for key in "abcd":
        store.put(key, b"")
    store.failures = 2
    assert [info.key for info in wrapped(store, Time()).list()] == list("abcd")
    store.failures = 1000
    with pytest.raises(StoreError):
        wrapped(store, Time(), patience=5).list()


def test_it_says_where_objects_are() -> None:
    """Location and leases are those of the store within."""
    store = MemoryStore()
    around = wrapped(store, Time())
    assert around.location == store.location
    with around.lease("leases/a") as lease:
        lease.check()
