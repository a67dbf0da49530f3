"""Where a plan lands whose log has no times of its own: not at T, but at the last anchor before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from backupd.errors import ObjectMissing, UsageError
from backupd.live import AnchoredDriver
from backupd.logs import anchored
from backupd.model import Driver, RecoveryPoint
from backupd.plan import RestorePlan, Step
from backupd.repository import Repository


def landed(
    plan: RestorePlan, driver_of: Callable[[RecoveryPoint], Driver], repository: Repository
) -> RestorePlan:
    """The plan with what anchors say of it. Raises Damaged, StoreError."""
    return replace(plan, steps=tuple(_landed(step, driver_of, repository) for step in plan.steps))


def _landed(step: Step, driver_of: Callable[[RecoveryPoint], Driver], repository: Repository) -> Step:
    """As it is where that cannot be told now, as compaction was at work or the driver is not there: the restore tells
    it then."""
    if not step.logs or step.replay_to is None:
        return step
    with contextlib.suppress(ObjectMissing, UsageError):
        driver = driver_of(step.point)
        if isinstance(driver, AnchoredDriver):
            near = anchored(repository, step.logs, step.replay_to)
            return step.landing_at(driver.lands_at(step.point, near, step.replay_to))
    return step
