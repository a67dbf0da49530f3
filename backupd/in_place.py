"""Restore into a running service that keeps its place. What it held is kept as a recovery point first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from backupd.chain import need_of
from backupd.errors import BackupdError, RestoreFailed, UsageError
from backupd.live import LiveDriver, Way
from backupd.logs import read_logs
from backupd.model import Driver, LogSpan
from backupd.plan import RestorePlan, landed_early
from backupd.restore import Restored, RestoreReport, Work, compare, flatten, open_step
from backupd.told import Told


def restore_in_place(
    plan: RestorePlan,
    driver_of: Callable[[str], Driver],
    keep: Callable[[str, Driver], str],
    work: Work,
    way: Way,
) -> RestoreReport:
    """One source into the service it is configured to be. `keep` backs up a source by a driver; the new point's id.

    Raises UsageError where its driver cannot do so, RestoreFailed: with nothing changed where what the service holds
    could not be kept first; else it says what the service holds now.
    """
    if len(plan.steps) != 1:
        raise UsageError("one source at a time is restored in place", hint="name one")
    started, begun, step = work.clock(), time.monotonic(), plan.steps[0]
    driver, progress = driver_of(step.source), work.watch(step)
    if not isinstance(driver, LiveDriver):
        raise UsageError(
            f"the driver {driver.kind} cannot restore into a running service",
            hint="restore into a sandbox, or a fresh container: --to container:NAME",
        )
    archive = open_step(step, work, progress)
    with driver.standing() as service:
        safety = service.unfinished
        if safety is None:
            progress.stage("keeping what it holds")
            safety = _kept(step.source, driver, keep)
        told = Told(archive, progress, work.check)

        def logs() -> Iterator[tuple[LogSpan, bytes]]:
            return told.count_log(read_logs(work.repository, step.logs))

        at = step.replay_to if need_of(step.point) is not None else None
        done = service.replace(told, logs, at, replace(way, safety=safety), progress)
    as_captured = step.lands_at == step.point.instant and not step.whole and bool(step.point.facts)
    differences = compare(step.point.facts, done.facts) if as_captured else ()
    recovered = {**done.recovered, "held_before": safety}
    warnings = (*told.warnings, *done.warnings, *landed_early(step, recovered.get("as_of")))
    restored = Restored(
        step, step.source, time.monotonic() - begun, len(flatten(step.point.facts)) if as_captured else 0,
        differences, warnings=warnings, recovered=recovered,
    )  # fmt: skip
    return RestoreReport(plan, f"{step.source} in place", started, work.clock(), (restored,))


def _kept(source: str, driver: LiveDriver, keep: Callable[[str, Driver], str]) -> str:
    try:
        return keep(source, driver.alone)
    except BackupdError as error:
        raise RestoreFailed(
            f"what {source} holds could not be kept, so nothing was changed: {error.message}", hint=error.hint
        ) from error
