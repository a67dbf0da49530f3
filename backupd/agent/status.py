"""How well each source is protected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from backupd.agent.recording import lag_limit
from backupd.catalog import GOOD, Catalog
from backupd.config import Config
from backupd.model import RecoveryPoint, Run, RunStatus
from backupd.retained import Retained, worry
from backupd.scheduler import Schedule, overdue

NOTHING: Mapping[str, Any] = MappingProxyType({})


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
    rpo: timedelta | None = None
    """Of a source whose log is recorded: how much would be lost now by what the repository alone tells, the time since
    its newest stored anchor. Up to a minute of a source where nothing changes, though nothing is lost then."""
    lagging: bool = False
    """The log should be recorded, and is not, or not as it should."""
    retained: Retained | None = None
    """What the server keeps of it meanwhile, where that is known."""

    @property
    def worry(self) -> str:
        """Why what the server keeps should be looked at."""
        return worry(self.retained)

    @property
    def good(self) -> bool:
        well = not self.failing and self.overdue is None and not self.lagging and not self.worry
        return self.point is not None and well


def protections(
    config: Config,
    points: Iterable[RecoveryPoint],
    catalog: Catalog,
    now: datetime,
    reached: Mapping[str, datetime] = NOTHING,
    retained: Mapping[str, Retained | None] = NOTHING,
) -> list[Protection]:
    """One for each configured source; `points` has the newest of each, `reached` the newest anchor of each log,
    `retained` what servers keep."""
    newest = {p.source: p for p in points}
    found = []
    for name, source in config.sources.items():
        last = catalog.last("backup", name)
        last_ok = catalog.last_ok("backup", name)
        point = newest.get(name)
        schedule = Schedule.parse(source.schedule, source.timezone or "UTC") if source.schedule else None
        good = max((t for t in (last_ok and last_ok.started, point and point.started) if t), default=None)
        rpo = now - reached[name] if name in reached else None
        every = source.recorded_every
        late = every is not None and (rpo is None or rpo > lag_limit(every))
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
                rpo=rpo,
                lagging=late,
                retained=retained.get(name),
            )
        )
    return found
