"""Back up one source: capture it, write its archive, and only then say that there is a recovery point."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from backupd.archive import ArchiveWriter, Written, open_archive, write_archive
from backupd.archive.patterns import escape
from backupd.chain import need_in
from backupd.errors import CaptureFailed, CommandFailed, ContainerError, Damaged, Locked, StoreError
from backupd.model import (
    Archive,
    Capture,
    Clock,
    Content,
    Driver,
    Lease,
    PointKind,
    Progress,
    RecoveryPoint,
    Run,
    RunStatus,
    Tree,
)
from backupd.repository import Manifest, Repository, new_point_id

_SHRANK = 10
"""A source a tenth of what it was is more often the wrong place than a tidy one."""
_LOG_PATIENCE = 60.0
"""Seconds that a backup waits for the log that its point needs."""
_MATTERS = 64 << 10
"""Bytes: what was smaller than this may shrink as it likes."""


@runtime_checkable
class IncrementalDriver(Protocol):
    """A power that some drivers have besides: asking the source only for what changed."""

    def capture_onto(self, earlier: Archive) -> AbstractContextManager[Capture]:
        """As `capture`; the content may be `onto` that point. Raises Damaged where it cannot be read."""


def back_up(
    source: str,
    driver: Driver,
    repository: Repository,
    *,
    clock: Clock,
    progress: Progress,
    stop: threading.Event,
    due: datetime | None = None,
    allow_shrink: bool = False,
) -> Run:
    """One backup. The Run is OK or WARNED, and `point` names the new recovery point.

    Raises CaptureFailed where the source fails, or is empty or shrank to a tenth and `allow_shrink` is false;
    StoreError, Locked, Interrupted. Then there is no new point, and the one before is still the latest.
    """
    started = clock()
    with _lease(repository, source) as lease:
        progress.stage(f"{source}: capturing")

        def take(*, onto: bool) -> _Taken:
            writer = ArchiveWriter(repository, source, new_point_id(), progress=progress, stop=stop)
            return _take(driver, repository, writer, allow_shrink=allow_shrink, onto=onto)

        try:
            taken = take(onto=isinstance(driver, IncrementalDriver))
        except Damaged as error:
            if not isinstance(driver, IncrementalDriver):
                raise
            taken = take(onto=False)  # what is there cannot be continued; all of the source may still be had
            told = f"the point before was not continued, and all was captured: {error.message}"
            taken.written.warnings.append(told)
        point_id, capture, written, latest = taken
        if not allow_shrink:
            _check_size(source, written, latest)
        late = _wait_for_log(source, capture, repository, stop, progress)
        point = _point(source, point_id, driver, capture, written, started, clock())
        _check_packs(repository, source, written)
        if lease is not None:
            lease.check()
        repository.commit(
            Manifest(point, repository.codec.name, written.ordered, written.pages, written.packs)
        )
    warnings = (*point.warnings, *late)
    status = RunStatus.WARNED if warnings else RunStatus.OK
    return Run(
        id=os.urandom(6).hex(), job="backup", source=source, status=status, started=started, finished=clock(), due=due,
        point=point_id, size=point.size, stored=point.stored, warnings=warnings,
    )  # fmt: skip


class _Taken(NamedTuple):
    point_id: str
    capture: Capture
    written: Written
    before: RecoveryPoint | None
    """The latest point, of which the new one may take over what it has."""


def _take(
    driver: Driver, repository: Repository, writer: ArchiveWriter, *, allow_shrink: bool, onto: bool
) -> _Taken:
    """One capture, written. `onto`: of what changed since the latest point, where the driver can."""
    latest = writer.earlier.latest
    # A driver told of no earlier point has nothing to compare with: so it is when a person allows less.
    since = None if latest is None or allow_shrink else latest.point
    try:
        if onto and since is not None and isinstance(driver, IncrementalDriver):
            capturing = driver.capture_onto(open_archive(repository, since))
        else:
            capturing = driver.capture(since)
        with capturing as capture:
            written = write_archive(writer, _without_repository(capture, repository))
    except (CommandFailed, ContainerError) as error:
        raise CaptureFailed(error.message, hint=error.hint) from error
    # The context has ended well: what made the bytes has said that they are all there.
    return _Taken(writer.point_id, capture, written, latest.point if latest else None)


def _point(
    source: str,
    point_id: str,
    driver: Driver,
    capture: Capture,
    written: Written,
    started: datetime,
    finished: datetime,
) -> RecoveryPoint:
    attributes = dict(capture.attributes)
    if written.sockets:
        attributes["sockets_skipped"] = written.sockets
    return RecoveryPoint(
        id=point_id, source=source, driver=driver.kind, kind=PointKind.FULL, instant=capture.instant, started=started,
        finished=finished, size=written.size, stored=written.stored, members=written.members,
        warnings=(*capture.warnings, *written.warnings), facts=dict(capture.facts), attributes=attributes,
    )  # fmt: skip


def _wait_for_log(
    source: str, capture: Capture, repository: Repository, stop: threading.Event, progress: Progress
) -> tuple[str, ...]:
    """A point that a log continues restores nothing before that log is stored up to its end. `serve` records it,
    in this process or another; where none does, the run is warned of it. Not the point: it may be whole soon."""
    need = need_in(capture.attributes)
    if need is None:
        return ()
    from backupd.logs import wait_for_logs

    progress.stage(f"{source}: waiting for its log")
    patience = (
        _LOG_PATIENCE if capture.attributes.get("recorded", True) else 0.0
    )  # a driver may know that none comes
    if wait_for_logs(repository, source, need, seconds=patience, stop=stop):
        return ()
    return (
        f"its log is not stored up to {need.end:x} yet: it can be restored once `backupd serve` has recorded that",
    )


@contextlib.contextmanager
def _lease(repository: Repository, source: str) -> Iterator[Lease | None]:
    """Keeps prune away from what this run takes over. Where the store cannot promise a lease nothing can be
    pruned by others either, and the check before the commit is enough."""
    with contextlib.ExitStack() as stack:
        lease: Lease | None = None
        try:
            lease = stack.enter_context(repository.lease(source))
        except Locked as error:
            raise Locked(
                f"another backup or prune of {source} is at work",
                hint="wait for it to end; a dead agent's lease falls free by itself",
            ) from error
        except StoreError as error:
            if error.transient:
                raise
        yield lease


def _without_repository(capture: Capture, repository: Repository) -> Content:
    """A local repository below the tree that is backed up must not back up itself."""
    content = capture.content
    if not isinstance(content, Tree) or repository.distant:
        return content
    try:
        inside = Path(repository.store.location).resolve().relative_to(content.root.resolve())
    except ValueError:
        return content
    return content._replace(exclude=(*content.exclude, f"/{escape(str(inside))}/"))


def _check_size(source: str, written: Written, latest: RecoveryPoint | None) -> None:
    """Empty, or a tenth of what it was: a failure until a person says otherwise."""
    if written.size == 0:
        unread = f" ({written.warnings[0]})" if written.warnings else ""
        raise CaptureFailed(
            f"{source} is empty: no file in it has any content{unread}",
            hint="is it the right place, and mounted? if it is meant to be empty, run `backupd backup --allow-shrink`",
        )
    if latest is not None and latest.size > _MATTERS and written.size * _SHRANK < latest.size:
        raise CaptureFailed(
            f"{source} shrank from {latest.size:,} to {written.size:,} bytes since {latest.started:%Y-%m-%d %H:%M} UTC",
            hint="is it the right place, and whole? if it is meant to be, run `backupd backup --allow-shrink` once",
        )


def _check_packs(repository: Repository, source: str, written: Written) -> None:
    """Everything a manifest names is there when it is written."""
    present = {name: info.size for name, info in repository.packs(source)}
    for pack in written.packs:
        if present.get(pack.name) != pack.size:
            raise CaptureFailed(
                f"the pack {pack.name} of {source} vanished while the backup ran",
                hint="was the repository changed by hand? run the backup again",
            )
