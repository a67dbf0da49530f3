"""What a restore keeps: in place, what the source holds, as a recovery point first, recorded as any backup; and what
has expired since the restored instant, where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from backupd.backup import back_up
from backupd.errors import UsageError
from backupd.in_place import restore_in_place
from backupd.live import ExpiringDriver, Way
from backupd.model import Driver, RecoveryPoint, Run, Silence
from backupd.plan import RestorePlan
from backupd.restore import RestoreReport, Work

Of = TypeVar("Of")


def in_place(
    plan: RestorePlan,
    driver_of: Callable[[str], Driver],
    record: Callable[[str, str, Callable[[], Run]], Run],
    work: Work,
    listen: str,
) -> RestoreReport:
    """However much the source shrank: that may be why it is restored."""

    def keep(source: str, driver: Driver) -> str:
        one = partial(
            back_up, source, driver, work.repository, clock=work.clock, progress=Silence(), stop=work.stop,
            allow_shrink=True,
        )  # fmt: skip
        return record("backup", source, one).point

    return restore_in_place(plan, driver_of, keep, work, Way(listen=listen))


def refuse_lasting(plan: RestorePlan, driver_of: Callable[[RecoveryPoint], Driver]) -> None:
    """Raises UsageError where nothing of what is restored ever expires."""
    if not any(isinstance(driver_of(step.point), ExpiringDriver) for step in plan.steps):
        names = " and ".join(step.source for step in plan.steps)
        raise UsageError(
            f"nothing of {names} expires, so there is nothing to keep", hint="--expired keep is for Redis"
        )


def keeping(driver_of: Callable[[Of], Driver]) -> Callable[[Of], Driver]:
    """The same drivers, those of sources whose data expire as they keep what has expired."""

    def one(of: Of) -> Driver:
        driver = driver_of(of)
        return driver.keeping() if isinstance(driver, ExpiringDriver) else driver

    return one
