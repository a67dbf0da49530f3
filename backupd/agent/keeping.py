"""A restore in place: what the source holds becomes a recovery point first, recorded as any backup."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from backupd.backup import back_up
from backupd.in_place import restore_in_place
from backupd.live import Way
from backupd.model import Driver, Run, Silence
from backupd.plan import RestorePlan
from backupd.restore import RestoreReport, Work


def in_place(
    plan: RestorePlan,
    driver_of: Callable[[str], Driver],
    record: Callable[[str, str, Callable[[], Run]], Run],
    work: Work,
    way: Way,
) -> RestoreReport:
    """However much the source shrank: that may be why it is restored."""

    def keep(source: str, driver: Driver) -> str:
        one = partial(
            back_up, source, driver, work.repository, clock=work.clock, progress=Silence(), stop=work.stop,
            allow_shrink=True,
        )  # fmt: skip
        return record("backup", source, one).point

    return restore_in_place(plan, driver_of, keep, work, way)
