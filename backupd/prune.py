"""Remove what retention no longer keeps. `plan_prune` only reads; `prune` carries it out under a lease.

Manifests go first, then the packs that no manifest names any more, so that being stopped half-way leaves packs too
many and never a point with too few. Packs of runs that were interrupted go when they are older than a day: a backup
uses such packs only while they are much younger. What is not named as ours is never read and never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from backupd.errors import Damaged, NoRecoveryPoint
from backupd.model import Clock, Lease, ObjectInfo, Progress
from backupd.repository import Manifest, Repository
from backupd.retention import Policy, Verdict, decide

GRACE = timedelta(days=1)
"""Age at which a pack that no manifest names is an interrupted run's and not one of a run at work."""


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What would be removed, with every verdict."""

    verdicts: tuple[Verdict, ...] = ()
    packs: tuple[tuple[str, str, int], ...] = ()
    """(source, name, bytes) of packs that nothing would need."""

    @property
    def packs_to_delete(self) -> int:
        return len(self.packs)

    @property
    def bytes_freed(self) -> int:
        return sum(size for _, _, size in self.packs)


@dataclass(slots=True)
class PruneReport:
    """What was removed."""

    verdicts: list[Verdict] = field(default_factory=list)
    objects_removed: int = 0
    bytes_freed: int = 0


def plan_prune(repository: Repository, policies: Mapping[str, Policy], *, now: datetime) -> PrunePlan:
    """Reads only. Sources without a policy keep everything. Raises Damaged where a manifest cannot be read: what it
    needs is unknown, so nothing of that repository may go."""
    verdicts: list[Verdict] = []
    packs: list[tuple[str, str, int]] = []
    for source, policy in sorted(policies.items()):
        plan = _plan_source(repository, source, policy, now)
        verdicts += plan.verdicts
        packs += plan.packs
    return PrunePlan(tuple(verdicts), tuple(packs))


def prune(
    repository: Repository,
    policies: Mapping[str, Policy],
    *,
    clock: Clock,
    dry_run: bool = False,
    progress: Progress,
) -> PruneReport:
    """Carry it out, a source at a time, each under its lease. Raises Locked, StoreError, Damaged."""
    if dry_run:
        plan = plan_prune(repository, policies, now=clock())
        return PruneReport(list(plan.verdicts), 0, plan.bytes_freed)
    report = PruneReport()
    for source, policy in sorted(policies.items()):
        progress.stage(f"{source}: pruning")
        with repository.lease(source) as lease:
            # Planned under the lease: a backup that ended just now has its manifest in this listing.
            plan = _plan_source(repository, source, policy, clock())
            _carry_out(repository, plan, lease, report, progress)
        report.verdicts += plan.verdicts
    return report


def _plan_source(repository: Repository, source: str, policy: Policy, now: datetime) -> PrunePlan:
    # Packs are listed before manifests: a pack that comes between the two listings is not in ours.
    objects = dict(repository.packs(source))
    try:
        manifests = repository.manifests(source)
    except Damaged as error:
        raise Damaged(
            f"nothing of {source} is pruned: {error.message}",
            hint="which packs that point needs is unknown; mend or remove the manifest by hand first",
        ) from None
    verdicts = decide([manifest.point for manifest in manifests], policy, now=now)
    _refuse_everything(source, verdicts)
    kept = {verdict.point.id for verdict in verdicts if verdict.keep}
    return PrunePlan(tuple(verdicts), tuple(_useless_packs(source, manifests, kept, objects, now)))


def _refuse_everything(source: str, verdicts: list[Verdict]) -> None:
    if verdicts and not any(verdict.keep for verdict in verdicts):
        raise NoRecoveryPoint(
            f"nothing of {source} is pruned: the retention would remove every point of it",
            hint="this is a bug in backupd, or in a policy of your own: please report it",
        )


def _useless_packs(
    source: str, manifests: list[Manifest], kept: set[str], objects: Mapping[str, ObjectInfo], now: datetime
) -> list[tuple[str, str, int]]:
    """Packs that no kept point names and that are either a removed point's or old enough to be nobody's."""
    needed = {pack.name for manifest in manifests if manifest.point.id in kept for pack in manifest.packs}
    named = {pack.name for manifest in manifests for pack in manifest.packs}
    finished = {manifest.point.id for manifest in manifests}
    useless = []
    for name, info in sorted(objects.items()):
        if name in needed:
            continue
        ours = name in named or name.split("/")[0] in finished
        if ours or now - info.modified > GRACE:
            useless.append((source, name, info.size))
    return useless


def _carry_out(
    repository: Repository, plan: PrunePlan, lease: Lease, report: PruneReport, progress: Progress
) -> None:
    for verdict in plan.verdicts:
        if not verdict.keep:
            repository.remove_point(verdict.point, lease)
            report.objects_removed += 1
            progress.advance(0, 1)
    for source, name, size in plan.packs:
        repository.remove_pack(source, name, lease)
        report.objects_removed += 1
        report.bytes_freed += size
        progress.advance(size, 1)
