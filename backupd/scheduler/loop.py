"""The loop: due jobs go to worker threads, one doing of a job at a time; every decision becomes a `Run`."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from backupd.catalog import DIED, GOOD, Catalog, carry_out, explain, new_run_id, record_or_log
from backupd.errors import BackupdError, Interrupted, Locked, StoreError, UsageError
from backupd.log import run_context
from backupd.model import Clock, Json, Run, RunStatus
from backupd.scheduler.schedule import Schedule, due_now, overdue

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

log = logging.getLogger(__name__)

TICK = 15.0  # seconds; also the longest that a clock set forward or a resumed laptop goes unnoticed
_DEAD = 4 * TICK  # without a tick for this long the loop is stuck
_AGAIN_AFTER = (60.0, 300.0, 900.0)  # seconds
_DEATHS = 3  # of the agent during one due run: one killed by its own backup must not begin it for ever


Work: TypeAlias = Callable[[threading.Event, "datetime | None"], Run]
"""Does it, for the due time given; looks at the event often and raises Interrupted soon after it is set."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to be done again and again."""

    name: str
    """`backup`, `compact`, `prune`, `verify`."""
    source: str
    work: Work
    schedule: Schedule | None = None
    """None: only run as the `then` of another, or by hand."""
    then: Job | None = None
    """Follows a good run at once, as a run of its own: the prune after a backup."""
    lane: str = "backup"
    """Jobs of a lane share its worker threads; every lane but `backup` has one, so its jobs go one by one."""
    tolerance: timedelta | None = None
    """See `Schedule.tolerance`, which holds when this is None."""

    eager: bool = True
    """Never done yet is due at once: right for a backup. A verify waits for its first due time instead."""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.source


@dataclass(frozen=True, slots=True)
class Health:
    """How it stands. `status` is `ok`, `starting`, `failing` or `stopping`; the first two are healthy."""

    status: str
    healthy: bool
    alive: bool
    """The loop ticks. What is not alive should be restarted; what merely fails should not."""
    problems: tuple[dict[str, Json], ...] = ()

    def json(self) -> dict[str, Json]:
        return {"status": self.status, "alive": self.alive, "problems": list(self.problems)}


@dataclass(slots=True)
class _Task:
    job: Job
    due: datetime | None
    since: datetime
    run_id: str
    attempt: int = 0
    at_work: bool = False


@dataclass(slots=True)
class _Lane:
    tasks: queue.SimpleQueue[_Task | None] = field(default_factory=queue.SimpleQueue)
    threads: list[threading.Thread] = field(default_factory=list)


class Scheduler:
    """Runs jobs when they are due until stopped. Nothing that a job does ends it.

    `parallel` backups at a time go to the repository; `starting` is how long after the start older
    problems are shown but do not count: they are being caught up.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        catalog: Catalog,
        *,
        clock: Clock,
        parallel: int = 2,
        starting: timedelta = timedelta(minutes=2),
    ) -> None:
        self.jobs = tuple(jobs)
        self._catalog = catalog
        self._clock = clock
        self._starting = starting
        self._lock = threading.Lock()
        self._active: dict[tuple[str, str], _Task] = {}
        self._stopping = False
        self._stop = threading.Event()
        self._started = clock()
        self._since = self._started  # the first that is known of this agent: what was due before was not ours
        self._ticked = time.monotonic()
        self._timer: BackgroundScheduler | None = None
        everything = [*self.jobs, *(job.then for job in self.jobs if job.then)]
        twice = {job.key for job in everything if sum(other.key == job.key for other in everything) > 1}
        if twice:
            raise UsageError(
                f"two jobs have the same name: {sorted(twice)}", hint="give each source one name"
            )
        self._everything = everything
        self._lanes = {lane: _Lane() for lane in {job.lane for job in everything}}
        self._parallel = {lane: max(1, parallel) if lane == "backup" else 1 for lane in self._lanes}

    # --- from start to stop ----------------------------------------------------------------------------

    def start(self) -> None:
        """Tell what an agent before us left undone, catch up what was missed, then keep the schedules."""
        from apscheduler.executors.pool import ThreadPoolExecutor
        from apscheduler.schedulers.background import BackgroundScheduler

        self._started = self._clock()
        self._since = min(self._started, self._catalog.began() or self._started)
        self._keep_house()
        for name, lane in self._lanes.items():
            for number in range(self._parallel[name]):
                thread = threading.Thread(
                    target=self._work, args=(lane,), name=f"{name}-{number}", daemon=True
                )
                lane.threads.append(thread)
                thread.start()
        # Its threads only hand over; a job that waits its turn never keeps another from being fired.
        self._timer = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(1)},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._timer.add_job(self._tick, "interval", seconds=TICK)
        self._timer.add_job(self._keep_house, "interval", minutes=10)
        trigger = _trigger_class()
        for job in self.jobs:
            if job.schedule is not None:
                self._timer.add_job(self._fire, trigger(job.schedule), args=(job, job.schedule))
        self._catch_up()
        self._timer.start()
        log.info("started: %d jobs, %d at a time", len(self.jobs), self._parallel.get("backup", 0))

    def stop(self, *, grace: float, abandon: float = 4.0) -> bool:
        """Start nothing more; let what is at work go on for `grace` seconds, then tell it to stop and give it
        `abandon` seconds more. False where something did not stop even then: it is recorded as ABANDONED, and
        its threads live on until the process ends.
        """
        with self._lock:
            self._stopping = True
            at_work = [" ".join(key).strip() for key, active in self._active.items() if active.at_work]
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.shutdown(wait=False)
        for lane in self._lanes.values():
            for _ in lane.threads:
                lane.tasks.put(None)
        if at_work:
            log.info("stopping; %g s for what is at work: %s", grace, ", ".join(sorted(at_work)))
        if not self._join(grace):
            log.warning("telling the work to stop: it was not done within %g s", grace)
            self._stop.set()
            if not self._join(abandon):
                self._write_off()
                return False
        log.info("stopped")
        return True

    def _join(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        threads = [thread for lane in self._lanes.values() for thread in lane.threads]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _write_off(self) -> None:
        with self._lock:
            left = [task for task in self._active.values() if task.at_work]
        message = "cut off: it did not stop when told to; hint: give the agent a longer grace period"
        for task in left:
            log.error("%s %s did not stop when told to; cut off", *task.job.key)
            run = Run(task.run_id, *task.job.key, RunStatus.ABANDONED, task.since, self._clock(), task.due)
            record_or_log(self._catalog, run._replace(message=message))

    # --- deciding ----------------------------------------------------------------------------------------

    def run_now(self, name: str, source: str) -> bool:
        """Have a job done outside its schedule. False where it is refused: at work already, or stopping."""
        job = next(job for job in self._everything if job.key == (name, source))
        return self._submit(job, None)

    def is_busy(self, name: str, source: str) -> bool:
        """At work on it, or about to be."""
        with self._lock:
            return (name, source) in self._active

    def _fire(self, job: Job, schedule: Schedule) -> None:
        now = self._clock()
        self._submit(job, schedule.fired(now) or now)

    def _catch_up(self) -> None:
        now = self._clock()
        for job in self.jobs:
            if job.schedule is None:
                continue
            due = due_now(job.schedule, self._last_ok(job), now)
            if due is None:
                continue
            tries = [run for run in self._catalog.runs(job.source, job.name, limit=20) if run.due == due]
            if sum(run.message == DIED for run in tries) >= _DEATHS:
                log.error("%s %s waits for its next time: the agent died of it %d times", *job.key, _DEATHS)
                continue
            last = self._catalog.last(*job.key)
            if last is not None and last.started < due:
                log.warning("%s %s was missed: due at %s", *job.key, due.isoformat())
                record_or_log(self._catalog, _missed(job, due, now))
            self._submit(job, due)

    def _last_ok(self, job: Job) -> datetime | None:
        run = self._catalog.last_ok(*job.key)
        return run.started if run is not None else None if job.eager else self._since

    def _submit(self, job: Job, due: datetime | None, attempt: int = 0) -> bool:
        now = self._clock()
        with self._lock:
            if self._stopping:
                return False
            before = self._active.get(job.key)
            if before is None:
                self._active[job.key] = task = _Task(job, due, now, new_run_id(now), attempt)
                self._lanes[job.lane].tasks.put(task)
                return True
        doing = "at work" if before.at_work else "waiting"
        message = f"the one before it is still {doing}, since {before.since.isoformat(timespec='seconds')}"
        log.warning("%s %s refused: %s", job.name, job.source, message)
        record_or_log(
            self._catalog,
            Run(new_run_id(now), *job.key, RunStatus.REFUSED, now, finished=now, due=due, message=message),
        )
        return False

    # --- doing -------------------------------------------------------------------------------------------

    def _work(self, lane: _Lane) -> None:
        while (task := lane.tasks.get()) is not None:
            good = False
            try:
                with self._lock:
                    task.at_work = not self._stopping
                if task.at_work:
                    good = self._do(task)
            finally:
                with self._lock:
                    del self._active[task.job.key]
            if good and task.job.then is not None:
                self._submit(task.job.then, None)

    def _do(self, task: _Task) -> bool:
        job = task.job
        what = f"{job.name} {job.source}".strip()
        with run_context(run=task.run_id, job=job.name, source=job.source):
            log.info("%s began", what)
            try:
                run = carry_out(
                    self._catalog,
                    *job.key,
                    lambda: job.work(self._stop, task.due),
                    clock=self._clock,
                    due=task.due,
                    run_id=task.run_id,
                )
            except Interrupted as error:
                log.warning("%s abandoned: %s", what, explain(error))
                return False
            except Locked as error:
                log.warning("%s refused: %s", what, explain(error))
                self._try_again(task)
                return False
            except BaseException as error:  # nothing that a job does may end the loop
                expected = isinstance(error, BackupdError)
                log.error("%s failed: %s", what, explain(error), exc_info=None if expected else error)
                if isinstance(error, StoreError) and error.transient:
                    self._try_again(task)
                return False
            seconds = ((run.finished or run.started) - run.started).total_seconds()
            told = "".join(f"; warning: {warning}" for warning in run.warnings[:5])
            level = logging.INFO if run.status is RunStatus.OK else logging.WARNING
            log.log(level, "%s %s in %.1f s%s%s", what, run.status.value, seconds, told, _point(run))
            return run.status in GOOD

    def _try_again(self, task: _Task) -> None:
        """What was due and only met a locked or absent repository has another try after a while: the lease of
        an agent that was killed takes a minute to fall free, and tomorrow is late for today's backup."""
        timer = self._timer  # None once stopping
        if task.due is None or task.attempt >= len(_AGAIN_AFTER) or timer is None:
            return
        wait = timedelta(seconds=_AGAIN_AFTER[task.attempt])
        log.info("another try at %s", (self._clock() + wait).isoformat(timespec="seconds"))
        timer.add_job(
            self._submit,
            "date",
            run_date=datetime.now(UTC) + wait,
            args=(task.job, task.due, task.attempt + 1),
        )

    def _tick(self) -> None:
        self._ticked = time.monotonic()

    def _keep_house(self) -> None:
        try:
            for run in self._catalog.abandon_stale(self._clock()):
                began = run.started.isoformat(timespec="seconds")
                log.error(
                    "%s %s was cut off: its agent ended in the middle of it (began %s)",
                    run.job,
                    run.source,
                    began,
                )
            self._catalog.forget(self._clock())
        except BackupdError as error:
            log.error("%s", explain(error))

    # --- telling -----------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Whether every source is as well protected as its schedule says."""
        now = self._clock()
        alive = time.monotonic() - self._ticked < _DEAD
        problems = [] if alive else [_problem("", "", "stuck", "the scheduler's loop does not tick")]
        try:
            for job in self._everything:
                problems += self._problems(job, now)
        except BackupdError as error:
            problems.append(_problem("", "", "catalog", explain(error)))
        if self._stopping:
            return Health("stopping", False, alive, tuple(problems))
        settling = alive and now - self._started < self._starting
        # what failed since the start is news; what was late or had failed before is being seen to
        if (
            problems
            and settling
            and all(str(p["since"] or "~") < self._started.isoformat() for p in problems)
        ):
            return Health("starting", True, alive, tuple(problems))
        return Health("failing" if problems else "ok", not problems, alive, tuple(problems))

    def _problems(self, job: Job, now: datetime) -> list[dict[str, Json]]:
        found = []
        last = self._catalog.last(*job.key, *GOOD, RunStatus.FAILED)
        if last is not None and last.status is RunStatus.FAILED:
            found.append(_problem(*job.key, "failing", last.message, last.started))
        if job.schedule is not None:
            last_ok = self._last_ok(job)
            tolerance = job.tolerance or job.schedule.tolerance(now)
            due = overdue(job.schedule, last_ok, now, tolerance)
            if due is not None and not self._in_good_time(job, tolerance, now):
                when = f"last good one {last_ok.isoformat()}" if last_ok else "never a good one"
                found.append(_problem(*job.key, "overdue", f"was due {due.isoformat()}; {when}", due))
        return found

    def _in_good_time(self, job: Job, tolerance: timedelta, now: datetime) -> bool:
        """Being done at this moment, and not for longer than the tolerance: then it is not called overdue, so
        that no orchestrator ends an agent that is just catching up."""
        active = self._active.get(job.key)
        return active is not None and now - active.since < tolerance

    def status(self) -> dict[str, Json]:
        """Every job: what is next, what was last."""
        now = self._clock()
        jobs: list[Json] = []
        for job in self._everything:
            last, last_ok = self._catalog.last(*job.key), self._catalog.last_ok(*job.key)
            active = self._active.get(job.key)
            jobs.append(
                {
                    "job": job.name,
                    "source": job.source,
                    "schedule": job.schedule.text if job.schedule else None,
                    "timezone": job.schedule.timezone if job.schedule else None,
                    "next": job.schedule.next_fire(now).isoformat() if job.schedule else None,
                    "doing": None if active is None else "running" if active.at_work else "waiting",
                    "last": _run_json(last),
                    "last_ok": _run_json(last_ok),
                }
            )
        return {"now": now.isoformat(), "started": self._started.isoformat(), "jobs": jobs}


def _missed(job: Job, due: datetime, now: datetime) -> Run:
    return Run(
        id=f"missed-{due:%Y%m%dT%H%M%SZ}-{job.name}-{job.source}",
        job=job.name,
        source=job.source,
        status=RunStatus.MISSED,
        started=due,
        finished=now,
        due=due,
        message="the agent was not there when it was due; caught up at its start",
    )


def _point(run: Run) -> str:
    return f"; recovery point {run.point}, {run.size} bytes, {run.stored} stored" if run.point else ""


def _problem(
    job: str, source: str, kind: str, message: str, since: datetime | None = None
) -> dict[str, Json]:
    return {
        "job": job,
        "source": source,
        "problem": kind,
        "message": message,
        "since": since.isoformat() if since else None,
    }


def _run_json(run: Run | None) -> Json:
    if run is None:
        return None
    return {
        "id": run.id,
        "status": run.status.value,
        "started": run.started.isoformat(),
        "finished": run.finished.isoformat() if run.finished else None,
        "due": run.due.isoformat() if run.due else None,
        "point": run.point,
        "message": run.message,
        "warnings": list(run.warnings),
    }


def _trigger_class() -> Callable[[Schedule], Any]:
    from apscheduler.triggers.base import BaseTrigger

    class ScheduleTrigger(BaseTrigger):  # type: ignore[misc]  # the library has no types
        """APScheduler asks, our schedule answers."""

        def __init__(self, schedule: Schedule) -> None:
            self.schedule = schedule

        def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
            # From now on even when late: of several due times that passed while asleep one run is enough.
            return self.schedule.next_fire(max(previous or now, now))

    return ScheduleTrigger
