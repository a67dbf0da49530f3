"""Carry out a RestorePlan: into a sandbox of fresh containers, a directory, or one fresh container.

Nothing here can delete anything but what the same call made. Success is said only of what was compared: every
byte with its digest (the archive does that), every fact with the one measured at capture.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from backupd.archive import open_archive
from backupd.chain import need_of
from backupd.codec import ZstdCodec
from backupd.errors import BackupdError, Interrupted, RestoreFailed, UsageError
from backupd.log import carry
from backupd.logs import LOG_FOLDER, check_logs, read_logs, write_logs
from backupd.model import (
    Archive,
    Bytes,
    Clock,
    Container,
    ContainerSpec,
    Driver,
    Facts,
    Json,
    Progress,
    RecordingDriver,
    RecoveryPoint,
    Sandbox,
    Silence,
)
from backupd.plan import RestorePlan, Step, landed_early
from backupd.repository import Repository
from backupd.told import Heeding, Told
from backupd.waiting import Ready, start

T = TypeVar("T")
B = TypeVar("B", bound=Bytes)

Watch = Callable[[Step], Progress]
"""Who is told of the work on one source."""

_AT_ONCE = 4  # sources restored at the same time; each waits on its server most of the time
_MOMENT = 10.0  # seconds that an interrupted restore waits for its threads to let go


@dataclass(frozen=True, slots=True)
class Restored:
    """One source, back."""

    step: Step
    where: str
    """A directory, or a container's name."""
    seconds: float
    """Measured: container made, loaded, ready and compared."""
    compared: int = 0
    """Facts that are equal or not; 0 where the point carries none or nothing runs to be asked."""
    differences: tuple[str, ...] = ()
    """Facts that are not what they were at capture."""
    address: tuple[str, int] | None = None
    """Where this machine reaches it."""
    image: str = ""
    warnings: tuple[str, ...] = ()
    """What the target could not take: an owner without being root, an attribute it has no room for."""
    recovered: Facts = field(default_factory=dict)
    """Where a log was replayed: the last commit that is in it, the first that is not."""


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did."""

    plan: RestorePlan
    target: str
    started: datetime
    finished: datetime
    restored: tuple[Restored, ...]

    @property
    def seconds(self) -> float:
        return (self.finished - self.started).total_seconds()

    @property
    def warned(self) -> bool:
        """Something came back less than whole, and is named."""
        return any(r.warnings for r in self.restored)

    @property
    def differences(self) -> dict[str, tuple[str, ...]]:
        """By source; empty when everything compared is equal."""
        return {r.step.source: r.differences for r in self.restored if r.differences}


@dataclass(frozen=True, slots=True)
class Work:
    """What every way of restoring needs."""

    repository: Repository
    clock: Clock
    watch: Watch = lambda _step: Silence()
    stop: threading.Event = field(default_factory=threading.Event)
    target: Mapping[str, str] = field(default_factory=dict)
    """Where the replay of a log ends instead of at an instant: lsn, xid or name. For one source alone."""

    def check(self) -> None:
        """Raises Interrupted when told to stop."""
        if self.stop.is_set():
            raise Interrupted("the restore was told to stop")


# --- into a sandbox ----------------------------------------------------------------------------------


def restore_to_sandbox(
    plan: RestorePlan,
    driver_of: Callable[[RecoveryPoint], Driver],
    sandbox: Sandbox,
    work: Work,
    *,
    keep: bool = False,
) -> RestoreReport:
    """Each source in a fresh container of `sandbox`; several at once.

    When a source fails, all that was made is destroyed unless `keep`, and RestoreFailed names every failure.
    Facts that differ are no failure here: they stand in the report, with the data there to be looked at.
    """
    started = work.clock()
    try:
        drivers = {step.source: driver_of(step.point) for step in plan.steps}
        making = threading.Lock()  # one at a time: a sandbox makes its network with its first container
        restored = _each(
            plan, lambda step: _into_sandbox(step, drivers[step.source], sandbox, making, work), work
        )
    except BaseException:
        if not keep:
            sandbox.destroy()
        raise
    return RestoreReport(plan, f"sandbox {sandbox.name}", started, work.clock(), restored)


def _into_sandbox(
    step: Step, driver: Driver, sandbox: Sandbox, making: threading.Lock, work: Work
) -> Restored:
    begun = time.monotonic()
    progress = work.watch(step)
    archive = open_step(step, work, progress)
    spec = driver.home(step.point)
    progress.stage(f"making a container of {spec.image}")
    with making:
        work.check()
        container = sandbox.create(step.source, spec)
    return _load(step, driver, archive, spec, container, sandbox.wait_ready, work, progress, begun)


# --- into one container ------------------------------------------------------------------------------


def restore_to_container(
    plan: RestorePlan,
    driver_of: Callable[[RecoveryPoint], Driver],
    container: Container,
    work: Work,
    *,
    ready: Ready,
) -> RestoreReport:
    """One source into a fresh container that exists. The driver refuses one that holds data already.

    Raises UsageError for more than one source or a container in the wrong state, RestoreFailed.
    """
    if len(plan.steps) != 1:
        names = ", ".join(step.source for step in plan.steps)
        raise UsageError(f"one container takes one source, not {names}", hint="name one, or use --to sandbox")
    started, begun, step = work.clock(), time.monotonic(), plan.steps[0]
    progress, driver = work.watch(step), driver_of(step.point)
    spec = driver.home(step.point)
    if spec.load_while == "stopped" and container.running:
        raise UsageError(
            f"{container.name} is running; {driver.kind} is restored before the first start",
            hint=f"make a fresh one with `docker create`, or stop it: docker stop {container.name}",
        )
    archive = open_step(step, work, progress)
    if spec.load_while == "running" and not container.running:
        container.start()
    restored = _load(step, driver, archive, spec, container, ready, work, progress, begun)
    return RestoreReport(plan, f"container {container.name}", started, work.clock(), (restored,))


def _load(
    step: Step,
    driver: Driver,
    archive: Archive,
    spec: ContainerSpec,
    container: Container,
    ready: Ready,
    work: Work,
    progress: Progress,
    begun: float,
) -> Restored:
    if spec.load_while == "running":
        start(container, spec, driver, ready, progress, work.check)
    progress.stage("loading")
    told = Told(archive, progress, work.check)
    if need_of(step.point) is None:
        driver.load(told, container)
    else:
        _load_to(step, driver, told, container, work)
    work.check()
    if spec.load_while == "stopped" and spec.service:
        start(container, spec, driver, ready, progress, work.check)
    progress.stage("comparing")  # what was measured at capture holds for that instant alone
    as_captured = step.lands_at == step.point.instant and not step.whole and not work.target
    compared, differences = _compare_with_capture(step.point, driver, container) if as_captured else (0, ())
    address = container.address(spec.port) if spec.port and container.running else None
    recovered: Facts = {}
    if isinstance(driver, RecordingDriver) and need_of(step.point) is not None and container.running:
        recovered = driver.recovered(container)
        told.warnings += landed_early(step, recovered.get("as_of"))
    return Restored(
        step, container.name, time.monotonic() - begun, compared, differences, address, container.image,
        tuple(told.warnings), recovered,
    )  # fmt: skip


def _load_to(step: Step, driver: Driver, told: Told, container: Container, work: Work) -> None:
    """The point, and its log replayed on top."""
    if not isinstance(driver, RecordingDriver):
        raise RestoreFailed(
            f"the driver {driver.kind} cannot replay the log that {step.point.id} of {step.source} needs",
            hint="restore it with the backupd that recorded it, or a newer one",
        )
    logs = told.count_log(read_logs(work.repository, step.logs))
    at = None if work.target else step.replay_to
    driver.load_to(told, logs, at, container, **work.target)


def _compare_with_capture(
    point: RecoveryPoint, driver: Driver, container: Container
) -> tuple[int, tuple[str, ...]]:
    if not point.facts:
        return 0, ()
    return len(flatten(point.facts)), compare(point.facts, driver.facts(container))


# --- into a directory --------------------------------------------------------------------------------


def restore_to_directory(plan: RestorePlan, root: Path, work: Work) -> RestoreReport:
    """Each source as files in `root/<source>`, which must not exist yet or be empty.

    A source appears under its name when it is whole; until then it is `<source>.partial`, which is removed
    when the restore fails. Raises UsageError, RestoreFailed, Damaged.
    """
    started = work.clock()
    for step in plan.steps:
        _refuse_full(root / step.source)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{root} cannot be made: {error.strerror}", hint="name a directory you may write"
        ) from None
    restored = _each(plan, lambda step: _into_directory(step, root / step.source, work), work)
    return RestoreReport(plan, f"directory {root}", started, work.clock(), restored)


def _into_directory(step: Step, into: Path, work: Work) -> Restored:
    begun = time.monotonic()
    progress = work.watch(step)
    archive = open_step(step, work, progress)
    partial = into.with_name(into.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise UsageError(
            f"{partial} is left from a restore that did not end", hint="look into it, then remove it"
        ) from None
    try:
        progress.stage("writing files")
        told = Told(archive, progress, work.check)
        warnings = told.extract(partial)
        if step.logs:
            progress.stage("writing the log")
            written = write_logs(told.count_log(read_logs(work.repository, step.logs)), partial / LOG_FOLDER)
            warnings.append(
                f"these files are whole only once the log in {LOG_FOLDER}/{written} was replayed on them"
            )
        work.check()
        if into.exists():
            into.rmdir()  # empty, as was checked; refuses when it no longer is
        partial.rename(into)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # made above, by this call
        raise
    return Restored(step, str(into), time.monotonic() - begun, warnings=tuple(warnings))


def _refuse_full(directory: Path) -> None:
    try:
        held = next(directory.iterdir(), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}", hint="name another directory") from None
    if held is not None:
        raise UsageError(
            f"{directory} is not empty", hint="a restore never writes over anything: name an empty directory"
        )


# --- as one file --------------------------------------------------------------------------------------

_FRAME = 1 << 21


def export(archive: Archive, progress: Progress) -> Iterator[bytes]:
    """A `.tar.zst` of a point: zstd frames in a row, which `zstd -d | tar x` reads."""
    codec, block = ZstdCodec(), bytearray()
    for chunk in archive.tar():
        progress.advance(len(chunk))
        block += chunk
        if len(block) >= _FRAME:
            yield codec.encode(block)
            block.clear()
    yield codec.encode(block)


def export_to_file(archive: Archive, target: Path, progress: Progress) -> None:
    """`target` appears when it is whole. Raises UsageError where it is there already."""
    taken = UsageError(f"{target} is there already", hint="name another file; none is ever overwritten")
    if target.exists():
        raise taken
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as out:
            for chunk in export(archive, progress):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(partial, target)  # unlike a rename, refuses to replace what came to be meanwhile
        except FileExistsError:
            raise taken from None
        except OSError:  # a file system without hard links
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


# --- what they share -----------------------------------------------------------------------------------


def open_step(step: Step, work: Work, progress: Progress) -> Archive:
    """A point without a member restores nothing, and to say that it succeeded would be a lie. A log that is damaged
    is told before anything begins."""
    work.check()
    if work.target and (len(work.target) > 1 or need_of(step.point) is None):
        raise UsageError(
            f"{step.source} cannot be restored to {', '.join(work.target)}",
            hint='one target at a time, and of a source whose log is recorded (mode = "pitr")',
        )
    if step.point.members == 0:
        raise RestoreFailed(
            f"the recovery point {step.point.id} of {step.source} holds nothing",
            hint=f"choose another: backupd list {step.source}",
        )
    if step.logs:
        progress.stage("checking the log")
        check_logs(work.repository, step.logs, content=True, stop=work.check)
    return open_archive(work.repository, step.point, progress=Heeding(progress, work.check))


def _each(plan: RestorePlan, one: Callable[[Step], Restored], work: Work) -> tuple[Restored, ...]:
    """Every step, some at once. After the first failure nothing new begins; all failures are told."""
    pool = ThreadPoolExecutor(min(_AT_ONCE, len(plan.steps)), thread_name_prefix="restore")
    futures: dict[str, Future[Restored]] = {}
    try:
        futures |= {step.source: pool.submit(carry(one), step) for step in plan.steps}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        if any(f.done() and f.exception() for f in futures.values()):
            work.stop.set()
        pool.shutdown(cancel_futures=work.stop.is_set())
    except BaseException:  # Ctrl-C: what is at work gets a moment to hear of it
        work.stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(futures.values(), timeout=_MOMENT)
        raise
    failures = {
        source: error
        for source, future in futures.items()
        if not future.cancelled() and (error := future.exception()) is not None
    }
    _raise(failures)
    return tuple(future.result() for future in futures.values())


def _raise(failures: Mapping[str, BaseException]) -> None:
    """The one failure as it is, under its source's name; several as one that names them all."""
    first = {s: e for s, e in failures.items() if not isinstance(e, Interrupted)} or dict(failures)
    for error in first.values():
        if not isinstance(error, BackupdError):
            raise error
    if len(first) == 1:
        ((source, error),) = first.items()
        assert isinstance(error, BackupdError)  # noqa: S101  seen above
        if not error.message.startswith((f"{source}:", f"{source} ")):
            error.message = f"{source}: {error.message}"
            error.args = (error.message,)
        raise error
    if first:
        hints = {e.hint for e in first.values() if isinstance(e, BackupdError) and e.hint}
        raise RestoreFailed(
            "; ".join(f"{source}: {error}" for source, error in first.items()), hint="; ".join(sorted(hints))
        )


# --- facts -----------------------------------------------------------------------------------------------


def flatten(facts: Facts) -> dict[str, Json]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists are values."""
    flat: dict[str, Json] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def compare(captured: Facts, measured: Facts) -> tuple[str, ...]:
    """What is not what it was, one line each, sorted; what only `measured` has is no loss but is told."""
    before, after = flatten(captured), flatten(measured)
    lines = []
    for key in sorted({*before, *after}):
        if key not in after:
            lines.append(f"{key}: was {_short(before[key])}, is not there")
        elif key not in before:
            lines.append(f"{key}: was not there, is {_short(after[key])}")
        elif before[key] != after[key]:
            lines.append(f"{key}: was {_short(before[key])}, is {_short(after[key])}")
    return tuple(lines)


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
