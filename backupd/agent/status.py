"""How well each source is protected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from backupd.catalog import GOOD, Catalog
from backupd.config import Config
from backupd.model import RecoveryPoint, Run, RunStatus
from backupd.scheduler import Schedule, overdue


@dataclass(frozen=True, slots=True)
class Protection:
    """How well one source is protected."""

    source: str
    driver: str
    point: RecoveryPoint | None
    """The newest."""
    age: timedelta | None
    last: Run | None
    failing: bool
    overdue: datetime | None
    """The due time that should have led to a good run by now."""
    next: datetime | None

    @property
    def good(self) -> bool:
        return self.point is not None and not self.failing and self.overdue is None


def protections(
    config: Config, points: Iterable[RecoveryPoint], catalog: Catalog, now: datetime
) -> list[Protection]:
    """One for each configured source; `points` has the newest of each."""
    newest = {p.source: p for p in points}
    found = []
    for name, source in config.sources.items():
        last = catalog.last("backup", name)
        last_ok = catalog.last_ok("backup", name)
        point = newest.get(name)
        schedule = Schedule.parse(source.schedule, source.timezone or "UTC") if source.schedule else None
        good = max((t for t in (last_ok and last_ok.started, point and point.started) if t), default=None)
        found.append(
            Protection(
                source=name,
                driver=getattr(source, "driver", ""),
                point=point,
                age=now - point.instant if point else None,
                last=last,
                failing=last is not None and last.status not in (*GOOD, RunStatus.RUNNING),
                overdue=overdue(schedule, good, now) if schedule else None,
                next=schedule.next_fire(now) if schedule else None,
            )
        )
    return found
