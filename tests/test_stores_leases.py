"""Leases on conditional writes, on a clock of their own: whoever sleeps, loses; nobody is robbed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from services import wait_until

from backupd.errors import Locked, StoreError
from backupd.stores.leases import HeartbeatLease, Reading, Record

TTL = 60.0


class Clock:
    """Two clocks, as `leases.clocks`; sleep moves both, and lets others do something meanwhile."""

    def __init__(self) -> None:
        self.boot, self.wall = 1000.0, 1_700_000_000.0
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self) -> tuple[float, float]:
        return self.boot, self.wall

    def sleep(self, seconds: float) -> None:
        self.boot += seconds
        self.wall += seconds
        self.meanwhile()


class MemoryRegister:
    """A register that can lose answers and be out of reach."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.data: bytes | None = None
        self.tag = "0"
        self.tags = itertools.count(1)
        self.lock = threading.Lock()
        self.lose_answers = 0
        self.unreachable, self.refused = False, 0
        self.clock, self.written = clock, 0.0

    def read(self) -> Reading | None:
        if self.unreachable:
            raise StoreError("out of reach", transient=True)
        age = self.clock.wall - self.written if self.clock else None
        return None if self.data is None else Reading(self.data, self.tag, age)

    def write(self, data: bytes, expected: str | None) -> str | None:
        if self.unreachable:
            self.refused += 1
            raise StoreError("out of reach", transient=True)
        with self.lock:
            if (None if self.data is None else self.tag) != expected:
                return None
            self.data, self.tag = data, str(next(self.tags))
            self.written = self.clock.wall if self.clock else 0.0
            if self.lose_answers:
                self.lose_answers -= 1
                return None  # as a request that was sent twice: the second one is refused
            return self.tag


def take(register: MemoryRegister, clock: Clock | None = None, ttl: float = TTL) -> HeartbeatLease:
    clock = clock or Clock()
    return HeartbeatLease(register, "leases/prune.json", ttl=ttl, now=clock, sleep=clock.sleep)


def leave_behind(register: MemoryRegister, clock: Clock, owner: str = "dead:1:aa") -> None:
    """A record of a holder that was killed."""
    register.write(Record(owner, 41, TTL).written(), None)
    register.written = clock.wall


def test_a_machine_that_slept_has_lost_its_lease() -> None:
    """The clock since boot jumped while nobody renewed: check raises before anything is deleted."""
    clock = Clock()
    lease = take(MemoryRegister(), clock)
    clock.boot += TTL - 1
    lease.check()
    clock.boot += 1
    with pytest.raises(Locked, match="lost") as caught:
        lease.check()
    assert caught.value.hint and caught.value.exit_code == 11
    clock.boot -= TTL
    with pytest.raises(Locked):
        lease.check()  # once lost, lost
    lease.close()


def test_a_frozen_virtual_machine_has_lost_its_lease() -> None:
    """Only the calendar's clock moved on."""
    clock = Clock()
    lease = take(MemoryRegister(), clock)
    clock.wall += 3600
    with pytest.raises(Locked):
        lease.check()
    lease.close()


def test_a_calendar_set_back_keeps_the_lease() -> None:
    """A clock corrected by a day backwards harms nobody."""
    clock = Clock()
    lease = take(MemoryRegister(), clock)
    clock.wall -= 86400
    lease.check()
    lease.close()


def test_a_silent_holder_is_taken_over_after_one_and_a_half_times_its_life() -> None:
    """Watched on the taker's own clock; the token grows."""
    clock, register = Clock(), MemoryRegister()
    leave_behind(register, clock)
    started = clock.boot
    lease = take(register, clock)
    assert TTL * 1.5 <= clock.boot - started <= TTL * 1.5 + 2
    assert lease.token > 41
    lease.close()


def test_a_holder_that_renews_is_never_taken_over() -> None:
    """Its record changes while we watch: Locked, with its name."""
    clock, register = Clock(), MemoryRegister()
    leave_behind(register, clock, "alive:7:bb")
    started = clock.boot

    def renew() -> None:
        if clock.boot - started > 20:
            register.data, register.tag = Record("alive:7:bb", 41, TTL, beat=1).written(), "renewed"

    clock.meanwhile = renew
    with pytest.raises(Locked, match="alive:7:bb"):
        take(register, clock)
    assert clock.boot - started < 25


def test_a_young_record_is_alive_at_once() -> None:
    """The server's clock says that it was renewed lately: nobody waits."""
    clock = Clock()
    register = MemoryRegister(clock)
    leave_behind(register, clock)
    clock.wall += TTL / 2 - 1
    started = clock.boot
    with pytest.raises(Locked) as caught:
        take(register, clock)
    assert clock.boot == started
    assert "90 s" in caught.value.hint


def test_of_two_takers_one_wins() -> None:
    """Another takes the stale record over while we watch: Locked."""
    clock, register = Clock(), MemoryRegister()
    leave_behind(register, clock)

    def overtake() -> None:
        if clock.boot > 1000 + TTL * 1.5 - 1:
            register.write(Record("quicker:1:cc", 42, TTL).written(), "1")

    clock.meanwhile = overtake
    with pytest.raises(Locked, match="quicker"):
        take(register, clock)


def test_a_lost_answer_is_not_a_lost_lease() -> None:
    """Taking, renewing and letting go with the first answer lost each: our own record is recognised."""
    register = MemoryRegister()
    register.lose_answers = 1
    lease = take(register, ttl=0.3)
    first = register.tag
    register.lose_answers = 2
    wait_until(lambda: register.tag != first and register.lose_answers < 2, timeout=20, what="a renewal")
    lease.check()
    lease.close()


def test_a_store_out_of_reach_for_a_while_is_no_loss() -> None:
    """Renewals fail and come back within the lease's life."""
    clock, register = Clock(), MemoryRegister()
    lease = take(register, clock, ttl=0.3)
    first, register.unreachable = register.tag, True
    wait_until(lambda: register.refused > 1, timeout=20, what="renewals that fail")
    clock.boot += 0.2
    lease.check()
    register.unreachable = False
    wait_until(lambda: register.tag != first, timeout=20, what="a renewal")
    wait_until(lambda: lease._since[0] == clock.boot, timeout=20, what="its count")
    clock.boot += 0.2  # 0.4 since it was taken
    lease.check()
    lease.close()


def test_a_store_out_of_reach_for_too_long_is_a_loss() -> None:
    """No answer for the lease's life: check raises, though nobody else has it."""
    clock, register = Clock(), MemoryRegister()
    lease = take(register, clock, ttl=0.3)
    register.unreachable = True
    wait_until(lambda: register.refused > 1, timeout=20, what="renewals that fail")
    clock.boot += 0.2
    lease.check()
    clock.boot += 0.2
    with pytest.raises(Locked):
        lease.check()
    register.unreachable = False
    lease.close()


def test_letting_go_frees_it_at_once() -> None:
    """The record stays, without an owner; the next token is greater."""
    clock, register = Clock(), MemoryRegister()
    first = take(register, clock)
    first.close()
    assert register.data is not None and Record.read(register.data).owner is None
    started = clock.boot
    second = take(register, clock)
    assert clock.boot == started and second.token > first.token
    second.close()


def test_a_holder_that_was_replaced_does_not_let_go_for_the_other() -> None:
    """Closing a lost lease leaves the new holder's record alone."""
    register = MemoryRegister()
    lease = take(register, ttl=0.3)
    register.data, register.tag = Record("other:1:dd", 99, TTL).written(), "theirs"
    wait_until(lease._lost.is_set, timeout=20, what="the next renewal")
    with pytest.raises(Locked):
        lease.check()
    lease.close()
    assert Record.read(register.data).owner == "other:1:dd"
