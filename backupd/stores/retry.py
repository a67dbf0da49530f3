"""A store round a store: waits out transient trouble."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from backupd.errors import ObjectExists, ObjectMissing, StoreError
from backupd.model import Bytes, Lease, ObjectInfo, Store

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def _chance() -> float:
    import random  # seldom needed, and slow to import

    return random.random()  # noqa: S311  how long to wait, nothing secret


class RetryStore:
    """Does again what failed with a transient StoreError, with growing pauses, for up to `patience` seconds.

    Pauses double from `first` to `longest` seconds, each shortened at random by up to a half, so that many
    agents do not come back at one instant (exponential backoff with equal jitter). No attempt is begun after
    `patience`; one under way is not cut off. Leases are passed through: they have a patience of their own.
    """

    def __init__(
        self,
        store: Store,
        *,
        patience: float = 300.0,
        first: float = 0.5,
        longest: float = 30.0,
        sleep: Callable[[float], object] = time.sleep,
        now: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _chance,
    ) -> None:
        self._store = store
        self._patience, self._first, self._longest = patience, first, longest
        self._sleep, self._now, self._chance = sleep, now, chance

    @property
    def location(self) -> str:
        return self._store.location

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        """As the store's; an object found on a later attempt is ours when it holds the same bytes."""

        def attempt(number: int) -> None:
            try:
                self._store.put(key, data, overwrite=overwrite)
            except ObjectExists:
                if number == 1 or self._store.stat(key).size != len(data) or self._store.get(key) != data:
                    raise

        self._again(attempt)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._again(lambda _: self._store.get(key, offset=offset, length=length))

    def stat(self, key: str) -> ObjectInfo:
        return self._again(lambda _: self._store.stat(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Listed to its end before the first object is handed out; about 250 bytes of memory an object."""
        return iter(self._again(lambda _: [*self._store.list(prefix)]))

    def delete(self, key: str) -> None:
        """As the store's; what is missing on a later attempt was deleted by an earlier one."""

        def attempt(number: int) -> None:
            try:
                self._store.delete(key)
            except ObjectMissing:
                if number == 1:
                    raise

        self._again(attempt)

    def lease(self, key: str, *, ttl: float = 60.0) -> AbstractContextManager[Lease]:
        return self._store.lease(key, ttl=ttl)

    def _again(self, attempt: Callable[[int], _T]) -> _T:
        deadline = self._now() + self._patience
        pause, number = self._first, 1
        while True:
            try:
                return attempt(number)
            except StoreError as error:
                wait = pause * (1 - self._chance() / 2)
                if not error.transient or self._now() + wait > deadline:
                    raise
                _log.warning("%s; trying again in %.1f s", error, wait)
            self._sleep(wait)
            pause = min(pause * 2, self._longest)
            number += 1
