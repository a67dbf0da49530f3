"""The parts that a configuration asks for, each made when it is first needed, and the verbs they carry out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backupd import log
from backupd.agent.findings import Finding, found_at
from backupd.agent.names import expand
from backupd.config import SOURCES, Config
from backupd.errors import BackupdError, NoRecoveryPoint, RepositoryMissing, StoreError, UsageError
from backupd.model import (
    Archive,
    Clock,
    Driver,
    Problem,
    Progress,
    RecordingDriver,
    RecoveryPoint,
    Run,
    RunStatus,
)

if TYPE_CHECKING:
    from backupd.agent.status import Protection
    from backupd.catalog import Catalog
    from backupd.chain import Chain
    from backupd.plan import RestorePlan, Step
    from backupd.prune import PruneReport
    from backupd.repository import Repository
    from backupd.restore import RestoreReport
    from backupd.sandbox.engine import Engine
    from backupd.stores.s3 import S3Options
    from backupd.verify import VerifyReport


FAULT = "run it again with BACKUPD_DEBUG=1 for the details, and report them: it is a fault of backupd"

_PLACES = {("sandbox", False), ("dir", True), ("container", True), ("in-place", False)}

_NAP = 0.2
"""Seconds: the longest that an interrupt goes unheard while sources are backed up."""


def utc_now() -> datetime:
    """The clock of a real agent."""
    return datetime.now(UTC)


def build(config: Config, *, clock: Clock = utc_now, env: dict[str, str] | None = None) -> Agent:
    """An agent for a configuration. From here on no log line shows one of its secrets."""
    for secret in secrets_of(config):
        log.hide(secret)
    return Agent(config, clock, env or {})


def secrets_of(config: Config) -> list[str]:
    """Every secret value in a configuration."""
    found = [
        config.repository.secret_access_key,
        *(getattr(s, "password", None) for s in config.sources.values()),
    ]
    return [secret.get_secret_value() for secret in found if secret is not None]


class Outcome(NamedTuple):
    """What became of one source: a run, or why there is none."""

    source: str
    run: Run | None = None
    error: BackupdError | None = None

    @property
    def exit_code(self) -> int:
        """0, 3 with warnings, else the error's."""
        if self.run is None:
            return self.error.exit_code if self.error else 1
        return 0 if self.run.status is RunStatus.OK else 3


class Agent:
    """The parts of one configuration. Safe to use from several threads."""

    def __init__(self, config: Config, clock: Clock, env: dict[str, str]) -> None:
        self.config = config
        self.clock = clock
        self.stop = threading.Event()
        self.patience = 0.0
        """Seconds to wait for a store that does not answer when it is opened: a person wants to know at once,
        an agent waits. Work under way is always patient."""
        self._env = env
        self._lock = threading.RLock()
        self._repository: Repository | None = None
        self._drivers: dict[str, Driver] = {}

    # --- parts ---------------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The container engine; connected to when first used."""
        from backupd.sandbox.engine import Engine

        return Engine()

    @cached_property
    def catalog(self) -> Catalog:
        """What happened here. Raises UsageError where it cannot be written."""
        from backupd.catalog import Catalog, default_path

        state = self.config.state
        return Catalog(state / "catalog.sqlite" if state else default_path(self._env))

    def repository(self) -> Repository:
        """The repository, opened. Raises RepositoryMissing, StoreError."""
        from backupd.repository import Repository
        from backupd.stores import open_store

        with self._lock:
            if self._repository is None:
                where, options = self.config.repository.location, self._s3_options()
                opened = Repository.open(open_store(where, options, patience=self.patience))
                self._repository = opened.on(open_store(where, options))
            return self._repository

    def repository_to_fill(self) -> Repository:
        """The repository for a backup. Without a configuration file it is made where there is none: who mounts
        two directories and sets two variables has no `init` to run. Nothing that only reads makes one: its
        location may be misspelt."""
        if self.config.without_file and self.config.sources:
            self.ensure_repository()
        return self.repository()

    def ensure_repository(self) -> bool:
        """Make the repository unless there is one; whether it was made."""
        with self._lock:
            try:
                self.repository()
            except RepositoryMissing:
                self.create_repository()
                self.repository()
                return True
            return False

    def create_repository(self) -> Repository:
        """A new repository at the configured location. Raises UsageError where there is one."""
        from backupd.repository import Repository
        from backupd.stores import open_store

        where, options = self.config.repository.location, self._s3_options()
        return Repository.create(
            open_store(where, options, create=True, patience=self.patience), clock=self.clock
        )

    def _s3_options(self) -> S3Options | None:
        r = self.config.repository
        if not r.is_s3:
            return None
        from backupd.stores.s3 import S3Options

        return S3Options(
            endpoint_url=r.endpoint_url or "",
            region=r.region or "",
            access_key_id=r.access_key_id or "",
            secret_access_key=r.secret_access_key.get_secret_value() if r.secret_access_key else "",
            path_style=r.path_style,
            ca_bundle=str(r.ca_bundle or ""),
            request_checksum=r.request_checksum or "when_supported",
        )

    def driver(self, source: str) -> Driver:
        """The driver of a configured source. Raises UsageError for one that is not."""
        from backupd.drivers import make_driver

        self.select([source])
        with self._lock:
            if source not in self._drivers:
                config = self.config.sources[source]
                driver = make_driver(config, self.engine)
                if config.recorded_every is not None and not isinstance(driver, RecordingDriver):
                    raise UsageError(
                        f"the driver {driver.kind} cannot record the log of {source}",
                        hint='take mode = "pitr" out of this source',
                    )
                self._drivers[source] = driver
            return self._drivers[source]

    def driver_for(self, point: RecoveryPoint) -> Driver:
        """The driver that restores a point, also of a source that is configured no more, or on a machine that
        knows nothing but the repository."""
        from backupd.chain import need_of
        from backupd.drivers import make_driver

        configured = self.config.sources.get(point.source)
        recorded = need_of(point) is not None
        if (
            configured is not None
            and getattr(configured, "driver", "") == point.driver
            and (configured.recorded_every is not None) == recorded
        ):
            return self.driver(point.source)
        model = SOURCES.get(point.driver)
        if model is None:
            raise UsageError(
                f"{point.source} was captured by the driver {point.driver!r}, which is not installed",
                hint="install it, or restore the files alone: --to dir:PATH",
            )
        # The place it was captured from is not known here, and a restore into a fresh home does not need it.
        settings: dict[str, Any] = {"mode": "pitr"} if recorded else {}
        return make_driver(model(name=point.source, **settings), self.engine)

    # --- names -----------------------------------------------------------------------------------------

    def select(self, names: Sequence[str]) -> list[str]:
        """Sources and stacks by name as sources, each once; nothing named means all. Raises UsageError."""
        config = self.config
        if not config.sources:
            raise UsageError(
                f"{config.origin} has no source",
                hint="add a [sources.<name>] table; `backupd init` finds some",
            )
        return expand(names or list(config.sources), config, config.sources)

    # --- check -------------------------------------------------------------------------------------------

    def check(self) -> list[Finding]:
        """Every part in turn, each problem with its fix; a failure of one does not hide another's."""
        sources = [found_at(name, partial(self._check_source, name)) for name in self.config.sources]
        return [self._check_repository(), self._check_catalog(), *sources]

    def _check_source(self, name: str) -> Sequence[Problem]:
        return self.driver(name).check()

    def _check_repository(self) -> Finding:
        """Open it and take a lease: that writes, reads back and writes again."""

        def probe() -> list[Problem]:
            repository = self.repository()
            try:
                with repository.lease("backupd-check") as lease:
                    lease.check()
            except StoreError as error:
                # A server without conditional writes takes backups all the same; only prune needs a lease.
                if error.transient or "conditions" not in error.message:
                    raise
                return [Problem(error.message, error.hint, fatal=False)]
            return []

        return found_at(f"repository {self.config.repository.location}", probe)

    def _check_catalog(self) -> Finding:
        def probe() -> list[Problem]:
            self.catalog.running()
            return []

        return found_at("history", probe)

    # --- restore -------------------------------------------------------------------------------------

    def plan(
        self, names: Sequence[str], at: datetime, *, max_skew: timedelta | None = None, point: str = ""
    ) -> RestorePlan:
        """What restores sources and stacks, configured or only in the repository, to an instant; or the one
        point asked for. Nothing named means everything that has a point. Raises NoRecoveryPoint, UsageError."""
        from backupd.agent.landing import landed
        from backupd.plan import plan_point, plan_restore, refuse_skew

        repository = self.repository()
        if point:
            found = repository.find(point)
            if names and found.source not in expand(names, self.config, [*self.config.sources, found.source]):
                raise UsageError(
                    f"the point {found.id} is one of {found.source}", hint="leave the name out, or correct it"
                )
            return plan_point(found, self.chains([found]))
        points = repository.points()
        with_points = list(dict.fromkeys(p.source for p in points))
        known = list(dict.fromkeys([*self.config.sources, *with_points]))
        wanted = expand(names, self.config, known) if names else with_points
        if not wanted:
            raise NoRecoveryPoint(
                "the repository holds no recovery point", hint="`backupd backup` makes some"
            )
        logs = self.chains(point for point in points if point.source in wanted)
        made = landed(plan_restore(points, at, wanted, logs=logs), self.driver_for, repository)
        if max_skew is not None:
            refuse_skew(made, max_skew)
        return made

    def chains(self, points: Iterable[RecoveryPoint]) -> list[Chain]:
        """The logs that continue these points; nothing is listed for those that stand alone."""
        from backupd.chain import chains, need_of

        repository = self.repository()
        recorded = dict.fromkeys(point.source for point in points if need_of(point))
        return [chain for source in recorded for chain in chains(*repository.logs(source))]

    def expected(self, plan: RestorePlan) -> timedelta | None:
        """How long a restore of the plan will take, by the last good one of the same sources here, longer as
        there is more to load; None where there is none to go by."""
        try:
            last = self.catalog.last_ok("restore", _sources_of(plan))
        except BackupdError:
            return None
        if last is None or last.finished is None:
            return None
        return (last.finished - last.started) * max(1.0, plan.size / max(1, last.size))

    def restore(
        self, plan: RestorePlan, to: str, *, name: str, watch: Callable[[Step], Progress], keep: bool = False,
        target: Mapping[str, str] | None = None, listen: str = "", keep_expired: bool = False,
    ) -> RestoreReport:  # fmt: skip
        """Carry out a plan: `sandbox`, `dir:PATH`, `container:NAME` or `in-place`; recorded. `target`: where the log's
        replay ends instead of at an instant: lsn, xid or name. `listen`, `keep_expired`: see `backupd.live`.
        Raises UsageError, RestoreFailed, Damaged."""
        kind, _, place = to.partition(":")
        if (kind, bool(place)) not in _PLACES:
            raise UsageError(f"--to {to!r} is no place", hint="sandbox, dir:PATH, container:NAME or in-place")
        reports: list[RestoreReport] = []

        def work() -> Run:
            report = self._restore(
                plan, kind, place, name=name, watch=watch, keep=keep, target=target or {}, listen=listen,
                keep_expired=keep_expired,
            )  # fmt: skip
            reports.append(report)
            told = [f"{source}: {len(lines)} facts differ" for source, lines in report.differences.items()]
            status = RunStatus.FAILED if told else RunStatus.OK
            return Run("", "restore", "", status, report.started, report.finished, size=plan.size,
                       message=f"to {report.target}" if not told else "; ".join(told))  # fmt: skip

        self._recorder()("restore", _sources_of(plan), work)
        return reports[0]

    def _restore(
        self, plan: RestorePlan, kind: str, place: str, *, name: str, watch: Callable[[Step], Progress],
        keep: bool, target: Mapping[str, str], listen: str, keep_expired: bool,
    ) -> RestoreReport:  # fmt: skip
        from backupd import restore
        from backupd.agent.keeping import in_place, keeping, refuse_lasting
        from backupd.sandbox.docker import DockerSandbox

        work = restore.Work(self.repository(), self.clock, watch, self.stop, target)
        driver: Callable[[str], Driver] = self.driver
        driver_for: Callable[[RecoveryPoint], Driver] = self.driver_for
        if keep_expired:
            refuse_lasting(plan, driver_for)
            driver, driver_for = keeping(driver), keeping(driver_for)
        if kind == "in-place":
            return in_place(plan, driver, self._recorder(), work, listen)
        if kind == "dir":
            return restore.restore_to_directory(plan, Path(place), work)
        if kind == "container":
            waiter = DockerSandbox(self.engine, "none")  # makes nothing: it knows how to wait
            container = self.engine.container(place)
            return restore.restore_to_container(plan, driver_for, container, work, ready=waiter.wait_ready)
        return restore.restore_to_sandbox(plan, driver_for, DockerSandbox(self.engine, name), work, keep=keep)

    # --- jobs ----------------------------------------------------------------------------------------

    def back_up(
        self, source: str, progress: Progress, *, due: datetime | None = None, allow_shrink: bool = False,
        stop: threading.Event | None = None,
    ) -> Run:  # fmt: skip
        """One source, now; raises as `backup.back_up`. Not recorded: that is the caller's."""
        from backupd.backup import back_up

        return back_up(
            source, self.driver(source), self.repository_to_fill(), clock=self.clock, progress=progress,
            stop=stop or self.stop, due=due, allow_shrink=allow_shrink,
        )  # fmt: skip

    def back_up_all(
        self, sources: Sequence[str], watch: Callable[[str], Progress], *, allow_shrink: bool = False
    ) -> list[Outcome]:
        """Several sources, some at once, each recorded; one that fails keeps none of the others from being
        done. Raises what concerns them all: no repository, an interrupt."""
        self.repository_to_fill()
        record = self._recorder()

        def one(source: str) -> Outcome:
            try:
                work = partial(self.back_up, source, watch(source), allow_shrink=allow_shrink)
                return Outcome(source, record("backup", source, work))
            except BackupdError as error:
                return Outcome(source, error=error)
            except Exception as error:  # a fault of one driver must not cost the others their backup
                logging.getLogger(__name__).debug("%s", source, exc_info=error)
                return Outcome(source, error=BackupdError(f"{type(error).__name__}: {error}", hint=FAULT))

        pool = ThreadPoolExecutor(min(self.config.serve.jobs, len(sources)), thread_name_prefix="backup")
        try:
            futures = [pool.submit(log.carry(one), source) for source in sources]
            # A signal that comes just before the main thread sleeps does not wake it: so it sleeps in short naps.
            while wait(futures, timeout=_NAP).not_done:
                pass
            outcomes = [future.result() for future in futures]
            pool.shutdown()
        except BaseException:
            self.stop.set()  # each stops at its next block, and leaves no point
            pool.shutdown(cancel_futures=True)
            raise
        return outcomes

    def _recorder(self) -> Callable[[str, str, Callable[[], Run]], Run]:
        """Keeps the history; where that cannot be written, the work is done all the same and this is told."""
        from backupd.catalog import carry_out

        try:
            catalog = self.catalog
            catalog.abandon_stale(self.clock())  # of commands that were killed
        except BackupdError as error:
            logging.getLogger(__name__).warning("the history is not kept: %s", error)
            return lambda _job, _source, work: work()
        return lambda job, source, work: carry_out(catalog, job, source, work, clock=self.clock)

    def status(self) -> list[Protection]:
        """How well each configured source is protected, as of now."""
        from backupd.agent.status import protections
        from backupd.agent.watch import retained_of_all
        from backupd.logs import reached

        self.catalog.abandon_stale(self.clock())
        repository = self.repository()
        # A key begins with the time: one manifest of each source is read, not all that there are.
        keys = [max(found) for name in self.config.sources if (found := repository.point_keys(name))]
        newest = [repository.manifest_at(key).point for key in keys]
        recorded = [name for name, source in self.config.sources.items() if source.recorded_every]
        logs = {name: repository.logs(name)[0] for name in recorded}
        retained = retained_of_all(logs, self.driver)
        return protections(self.config, newest, self.catalog, self.clock(), reached(logs), retained)

    def open(self, point: str) -> Archive:
        """The archive of a point by id or its beginning, or of the newest point of a source."""
        from backupd.archive import open_archive
        from backupd.plan import LATEST, plan_restore

        repository = self.repository()
        if point in self.config.sources or point in repository.sources():
            points = repository.points(point)
            newest = plan_restore(points, LATEST, [point], logs=self.chains(points))
            return open_archive(repository, newest.steps[0].point)
        return open_archive(repository, repository.find(point))

    def prune_now(self, *, dry_run: bool, progress: Progress, max_unused: float | None = None) -> PruneReport:
        """Carry out the retention of every configured source, recorded unless it is a dry run."""
        from backupd.prune import prune

        reports: list[PruneReport] = []

        def work() -> Run:
            started = self.clock()
            reports.append(
                prune(
                    self.repository(), self.config.policies, clock=self.clock, dry_run=dry_run,
                    max_unused=max_unused, progress=progress,
                )
            )  # fmt: skip
            return Run("", "prune", "", RunStatus.OK, started, self.clock())

        if dry_run:
            work()
        else:
            self.repository()
            self._recorder()("prune", "", work)
        return reports[0]

    def verify_now(
        self, sources: Sequence[str] | None, data_percent: float, progress: Progress
    ) -> VerifyReport:
        """Verify sources, or everything; what is damaged stands in the report."""
        from backupd.verify import verify

        return verify(self.repository(), sources=sources, data_percent=data_percent, progress=progress)


def _sources_of(plan: RestorePlan) -> str:
    return ",".join(sorted(step.source for step in plan.steps))
