"""Remove what retention no longer keeps. `plan_prune` only reads; `prune` carries it out under a lease.

First the packs of kept points of which too little is still needed are repacked (`archive.compact`); then manifests
go, then the packs that no manifest names any more, so that being stopped anywhere leaves packs too many and never a
point with too few. What is damaged stops it before anything went.

Packs that were repacked go when that was a day ago: a restore that read the manifest before may still need them.
Packs of runs that were interrupted go when they are older than a day: a backup uses such packs only while they are
much younger. What is not named as ours is never read and never touched.

Of a log goes what neither a kept point nor the window needs (`retention.needless`). Where that leaves a hole, a mark
says so: a hole without one is a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from backupd.archive.compact import compact
from backupd.archive.repack import Choice, choose
from backupd.archive.usage import Usage, measure
from backupd.chain import chains, cuts_left_by, stretches
from backupd.errors import Damaged, NoRecoveryPoint, StoreError
from backupd.logs import put_mark
from backupd.model import Clock, Lease, LogMark, LogSpan, ObjectInfo, Progress
from backupd.repository import Manifest, Repository
from backupd.retention import Policy, Verdict, decide, needless

GRACE = timedelta(days=1)
"""Age at which a pack that no manifest names is an interrupted run's and not one of a run at work; and how long one
that was repacked stays for those who read the manifest before."""

Pack = tuple[str, str, int]
"""Source, name, bytes."""


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What would be removed and repacked, with every verdict."""

    verdicts: tuple[Verdict, ...] = ()
    packs: tuple[Pack, ...] = ()
    """That nothing would need, to go at once."""
    waiting: tuple[Pack, ...] = ()
    """That nothing needs any more, to go when they were repacked a day ago."""
    repack: tuple[Pack, ...] = ()
    """To write anew, largest gain first. Without these, in the next plan they are waiting."""
    bytes_rewritten: int = 0
    """To write for that: an estimate."""
    logs: tuple[LogSpan, ...] = ()
    """That neither a kept point nor the window would need."""

    @property
    def packs_to_delete(self) -> int:
        return len(self.packs)

    @property
    def bytes_freed(self) -> int:
        return sum(size for _, _, size in self.packs) + sum(span.size for span in self.logs)


@dataclass(slots=True)
class PruneReport:
    """What was removed and repacked."""

    verdicts: list[Verdict] = field(default_factory=list)
    objects_removed: int = 0
    bytes_freed: int = 0
    """Of what was removed now."""
    packs_repacked: int = 0
    bytes_rewritten: int = 0
    """Of new packs and manifests; in a dry run, an estimate."""
    bytes_waiting: int = 0
    """Of packs that nothing needs any more, repacked now or before: a prune a day after that removes them."""
    logs_removed: int = 0
    """Objects of logs."""


@dataclass(frozen=True, slots=True)
class LogsPlan:
    """What is to be done about one source's log."""

    remove: tuple[LogSpan, ...] = ()
    """Lowest first."""
    cuts: tuple[LogMark, ...] = ()
    """Marks that say of each hole this makes that it is none that happened."""
    marks: tuple[LogMark, ...] = ()
    """Old ones, with nothing before them any more."""


@dataclass(frozen=True, slots=True)
class _SourcePlan:
    """What is to be done for one source, and what carrying it out must know."""

    source: str
    verdicts: list[Verdict]
    kept: list[Manifest]
    objects: Mapping[str, ObjectInfo]
    packs: list[Pack]
    waiting: list[Pack]
    usage: Usage | None
    choice: Choice
    logs: LogsPlan

    @property
    def repack(self) -> list[Pack]:
        packs = self.usage.packs if self.usage else {}
        return [(self.source, name, packs[name].size) for name in self.choice.packs]


def plan_prune(
    repository: Repository,
    policies: Mapping[str, Policy],
    *,
    now: datetime,
    max_unused: float | None = None,
) -> PrunePlan:
    """Reads only. Sources without a policy keep everything. Raises Damaged where a manifest or an index cannot be
    read: what it needs is unknown, so nothing of that repository may go.

    `max_unused`: None repacks what frees at least what it writes; a share (0.05), until at most that share of a
    source's packs is unneeded, whatever it costs; 1 repacks nothing.
    """
    plans = [
        _plan_source(repository, source, policy, now, max_unused)
        for source, policy in sorted(policies.items())
    ]
    return PrunePlan(
        tuple(verdict for plan in plans for verdict in plan.verdicts),
        tuple(pack for plan in plans for pack in plan.packs),
        tuple(pack for plan in plans for pack in plan.waiting),
        tuple(pack for plan in plans for pack in plan.repack),
        sum(plan.choice.rewritten for plan in plans),
        tuple(span for plan in plans for span in plan.logs.remove),
    )


def prune(
    repository: Repository,
    policies: Mapping[str, Policy],
    *,
    clock: Clock,
    dry_run: bool = False,
    max_unused: float | None = None,
    progress: Progress,
) -> PruneReport:
    """Carry it out, a source at a time, each under its lease. Raises Locked, StoreError, Damaged."""
    if dry_run:
        plan = plan_prune(repository, policies, now=clock(), max_unused=max_unused)
        waiting = sum(size for _, _, size in (*plan.waiting, *plan.repack))
        return PruneReport(
            list(plan.verdicts), 0, plan.bytes_freed, len(plan.repack), plan.bytes_rewritten, waiting,
            len(plan.logs),
        )  # fmt: skip
    report = PruneReport()
    for source, policy in sorted(policies.items()):
        progress.stage(f"{source}: pruning")
        with repository.lease(source) as lease:
            # Planned under the lease: a backup that ended just now has its manifest in this listing.
            now = clock()
            source_plan = _plan_source(repository, source, policy, now, max_unused)
            _carry_out(repository, source_plan, now, lease, report, progress)
        report.verdicts += source_plan.verdicts
    return report


def _plan_source(
    repository: Repository, source: str, policy: Policy, now: datetime, max_unused: float | None
) -> _SourcePlan:
    # Packs are listed before manifests: a pack that comes between the two listings is not in ours.
    objects = dict(repository.packs(source))
    spans, marks = repository.logs(source)
    found = chains(spans, marks)
    try:
        manifests = repository.manifests(source)
    except Damaged as error:
        raise Damaged(
            f"nothing of {source} is pruned: {error.message}",
            hint="which packs that point needs is unknown; mend or remove the manifest by hand first",
        ) from None
    verdicts = decide([manifest.point for manifest in manifests], policy, now=now, logs=found)
    _refuse_everything(source, verdicts)
    keep = {verdict.point.id for verdict in verdicts if verdict.keep}
    kept = [manifest for manifest in manifests if manifest.point.id in keep]
    packs, waiting = _useless_packs(source, manifests, kept, objects, now)
    usage, choice = None, Choice()
    if kept and (max_unused is None or max_unused < 1):
        try:
            usage = measure(repository, source, kept, repository.point_sizes(source))
        except Damaged as error:
            raise _refused(source, error) from None
        freed = sum(size for _, _, size in packs)
        choice = choose(usage.uses, usage.index, freed=freed, max_unused=max_unused)
    remove = needless([manifest.point for manifest in kept], policy, found, now=now)
    logs = plan_logs(spans, marks, remove)
    return _SourcePlan(source, verdicts, kept, objects, packs, waiting, usage, choice, logs)


def plan_logs(spans: Sequence[LogSpan], marks: Sequence[LogMark], remove: Sequence[LogSpan]) -> LogsPlan:
    """Removing these spans, with the marks that tell the holes they leave from losses."""
    if not remove:
        return LogsPlan()
    gone = set(remove)
    left = [span for span in spans if span not in gone]
    ends = {(span.epoch, span.end) for span in left}
    # Where an epoch continues another of which nothing is left, that is of no use any more.
    links = {(m.epoch, m.position) for m in marks if m.after and (m.after, m.position) in ends}
    cuts = [
        LogMark(stretch.source, stretch.epoch, position)
        for stretch in stretches(spans, marks)
        for position in cuts_left_by(stretch, gone, continues=(stretch.epoch, stretch.start) in links)
    ]
    useless = [
        m
        for m in marks
        if (m.epoch, m.position) not in links and (m.after or (m.epoch, m.position) not in ends)
    ]
    return LogsPlan(
        tuple(sorted(remove, key=lambda s: (s.epoch, s.start, s.end))),
        tuple(cut for cut in cuts if cut not in marks),
        tuple(useless),
    )


def _refused(source: str, error: Damaged) -> Damaged:
    return Damaged(
        f"nothing of {source} is pruned: {error.message}",
        hint="`backupd verify --data 100%` names the points that need it; `backupd prune --max-unused 100%` removes "
        "what retention does not keep and repacks nothing",
    )


def _refuse_everything(source: str, verdicts: list[Verdict]) -> None:
    if verdicts and not any(verdict.keep for verdict in verdicts):
        raise NoRecoveryPoint(
            f"nothing of {source} is pruned: the retention would remove every point of it",
            hint="this is a bug in backupd, or in a policy of your own: please report it",
        )


def _useless_packs(
    source: str,
    manifests: list[Manifest],
    kept: list[Manifest],
    objects: Mapping[str, ObjectInfo],
    now: datetime,
) -> tuple[list[Pack], list[Pack]]:
    """Packs that no kept point names: those that may go, and those that were repacked less than a day ago. They may
    go when they were a removed point's, or no point of ours names them, or they are old enough to be nobody's."""
    needed = {pack.name for manifest in kept for pack in manifest.packs}
    named = {pack.name for manifest in manifests for pack in manifest.packs}
    finished = {manifest.point.id for manifest in manifests}
    replaced: dict[str, datetime] = {}
    for manifest in manifests:
        for name, at in manifest.replaced:
            replaced[name] = max(at, replaced.get(name, at))
    useless, waiting = [], []
    for name, info in sorted(objects.items()):
        if name in needed:
            continue
        if name in replaced and now - replaced[name] <= GRACE:
            waiting.append((source, name, info.size))
            continue
        ours = name in named or name in replaced or name.split("/")[0] in finished
        if ours or now - info.modified > GRACE:
            useless.append((source, name, info.size))
    return useless, waiting


def _carry_out(
    repository: Repository,
    plan: _SourcePlan,
    now: datetime,
    lease: Lease,
    report: PruneReport,
    progress: Progress,
) -> None:
    full: StoreError | None = None
    try:
        _repack(repository, plan, now, lease, report, progress)
    except StoreError as error:
        full = error  # a disk without room gets some from what goes, or prune could never run again
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
    _remove_logs(repository, plan.logs, lease, report, progress)
    report.bytes_waiting += sum(size for _, _, size in plan.waiting)
    if full is not None:
        raise full


def _remove_logs(
    repository: Repository, logs: LogsPlan, lease: Lease, report: PruneReport, progress: Progress
) -> None:
    """A mark before the hole that it explains; what is left of a hole begun explains itself."""
    for cut in logs.cuts:
        put_mark(repository, cut, "pruned")
    for span in logs.remove:
        repository.remove_log(span, lease)
        report.objects_removed += 1
        report.bytes_freed += span.size
        report.logs_removed += 1
        progress.advance(span.size, 1)
    for mark in logs.marks:
        repository.remove_log(mark, lease)


def _repack(
    repository: Repository,
    plan: _SourcePlan,
    now: datetime,
    lease: Lease,
    report: PruneReport,
    progress: Progress,
) -> None:
    if plan.usage is None or not plan.choice.packs:
        return
    progress.stage(f"{plan.source}: repacking {len(plan.choice.packs)} packs")
    try:
        done = compact(
            repository, plan.source, plan.kept, plan.usage, plan.choice.packs, names=_free_names(plan),
            present=plan.objects, lease=lease, at=now, progress=progress,
        )  # fmt: skip
    except Damaged as error:
        raise _refused(plan.source, error) from None
    report.packs_repacked += len(plan.choice.packs)
    report.bytes_rewritten += done.bytes
    report.bytes_waiting += sum(size for _, _, size in plan.repack)


def _free_names(plan: _SourcePlan) -> Iterator[str]:
    """Names for new packs: after those of the newest kept point's own run, so that they count as its."""
    point = plan.kept[-1].point.id
    names = {*plan.objects, *plan.usage.packs} if plan.usage else set(plan.objects)
    taken = [int(number) for owner, _, number in (name.partition("/") for name in names) if owner == point]
    number = max(taken, default=-1)
    while True:
        number += 1
        yield f"{point}/{number:04d}"
