"""What `serve` does: every scheduled source, prune and verify, until a signal says stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from backupd.agent.recording import RecorderState, Recordings
from backupd.chain import chains, needs_base
from backupd.config import SourceConfig
from backupd.errors import BackupdError, Damaged, Interrupted, UsageError
from backupd.logs import compact_logs
from backupd.metrics import CONTENT_TYPE, Gauge, exposition
from backupd.model import Json, RecoveryPoint, Run, RunStatus, Silence
from backupd.prune import prune
from backupd.scheduler import Health, Job, Schedule, Scheduler, Work, run_until_stopped
from backupd.web import Answer, StatusServer, Text

if TYPE_CHECKING:
    from backupd.agent.agent import Agent

log = logging.getLogger(__name__)

_COMPACT = "17 * * * *"
_LATE = timedelta(days=1)  # a long base backup holds the lease that putting the log together needs

PATIENCE = 300.0
"""Seconds that a job waits for a store that does not answer; a person at a terminal is told at once."""


def serve(agent: Agent) -> int:
    """Run the jobs until a signal says stop; the exit code. Raises UsageError where nothing is scheduled and
    nothing recorded."""
    recorded = {
        name: every for name, s in agent.config.sources.items() if (every := s.recorded_every) is not None
    }
    recordings = Recordings(
        recorded, driver=agent.driver, repository=agent.repository_to_fill, clock=agent.clock,
        on_begin=lambda *stretch: _back_up_new_stretch(agent, scheduler, *stretch),
    )  # fmt: skip
    jobs = jobs_of(agent, recordings)
    if not any(job.name == "backup" for job in jobs):
        raise UsageError(
            f"{agent.config.origin} schedules no backup, and records no log",
            hint='set schedule = "0 2 * * *" in [defaults], or the variable BACKUP_SCHEDULE',
        )
    for job in jobs:
        if job.name == "backup" and job.schedule is None:
            log.warning("%s has no schedule: one base is made, and all of the log after it stays", job.source)
    _release_left_paused(agent)
    agent.catalog.learn(_known_points(agent))
    agent.patience = PATIENCE
    settings = agent.config.serve
    scheduler = Scheduler(jobs, agent.catalog, clock=agent.clock, parallel=settings.jobs)

    def healthz() -> Answer:
        return health_of(scheduler.health(), recordings.states())

    def livez() -> Answer:
        health = scheduler.health()
        return health.alive, health.json()

    pages: dict[str, Callable[[], Answer]] = {
        "healthz": healthz,
        "livez": livez,
        "status": lambda: (True, {**scheduler.status(), **_recorders(recordings.states())}),
        "metrics": lambda: (True, Text(exposition(gauges_of(recordings.states())), CONTENT_TYPE)),
    }
    web = StatusServer(settings.address, pages)
    try:
        return run_until_stopped(scheduler, grace=settings.grace.total_seconds(), beside=[web, recordings])
    finally:
        agent.catalog.close()  # not left to the interpreter's end, at which a thread may still hold it


def health_of(health: Health, states: Sequence[RecorderState]) -> Answer:
    """The health of the jobs and of the recorders, as one document."""
    if not states:
        return health.healthy, health.json()
    told = [
        *((s, "lagging", s.error or "the log is not stored as it should be") for s in states if s.lagging),
        *((s, "retaining", s.worry) for s in states if s.worry),
    ]
    problems: list[Json] = [*health.problems]
    for state, problem, message in told:
        problems.append({"job": "record", "source": state.source, "problem": problem, "message": message,
                         "since": state.since.isoformat()})  # fmt: skip
    document: dict[str, Json] = {**health.json(), **_recorders(states), "problems": problems}
    if told and health.status != "stopping":
        document["status"] = "failing"
    return health.healthy and not told, document


def gauges_of(states: Sequence[RecorderState]) -> list[Gauge]:
    """What is measured of the recorders."""

    def gauge(name: str, about: str, value: Callable[[RecorderState], float | None]) -> Gauge:
        return Gauge(name, about, {state.source: value(state) for state in states})

    return [
        gauge("backupd_restorable_until_timestamp_seconds",
              "The newest instant that a restore can be asked for. Of an idle source it moves on once a minute.",
              lambda s: s.reach.timestamp() if s.reach else None),
        gauge("backupd_recovery_point_age_seconds",
              "How much would be lost now: seconds since the newest instant before which all that the source "
              "acknowledged is stored. Near 0 while nothing changes, though nothing is put then.",
              lambda s: s.rpo.total_seconds() if s.rpo is not None else None),
        gauge("backupd_recorder_up", "1 while the log is recorded.", lambda s: s.state == "recording"),
        gauge("backupd_recorder_lagging", "1 where the log is behind by more than a failure or two may cost.",
              lambda s: s.lagging),
        gauge("backupd_log_retained_bytes", "What the server keeps of the log because it is not stored.",
              lambda s: s.retained.size if s.retained else None),
        gauge("backupd_log_retained_room_bytes", "What may be written until the server gives up what it keeps.",
              lambda s: s.retained.room if s.retained else None),
        gauge("backupd_log_unsent_bytes", "What the server's memory for our connection held at most, lately.",
              lambda s: s.retained.unsent if s.retained else None),
    ]  # fmt: skip


def _recorders(states: Sequence[RecorderState]) -> dict[str, Json]:
    return {"recorders": {state.source: state.json() for state in states}} if states else {}


def _back_up_new_stretch(agent: Agent, scheduler: Scheduler, source: str, epoch: str, position: int) -> None:
    """A stretch of log that continues no recovery point restores nothing: a base is made at once. The very first one
    of a source that has a schedule is due anyway."""
    try:
        if agent.config.sources[source].schedule and agent.catalog.last_ok("backup", source) is None:
            return
    except BackupdError as error:
        log.warning("%s: when it was backed up last is not known: %s", source, error)
        return
    if not _continues_none(agent, source, epoch, position):
        return
    if any(job.key == ("backup", source) for job in scheduler.jobs) and not scheduler.is_busy(
        "backup", source
    ):
        log.info("%s: a new base is made, its log continues none", source)
        scheduler.run_now("backup", source)


def _continues_none(agent: Agent, source: str, epoch: str, position: int) -> bool:
    """Whether what is recorded there continues no recovery point, for certain."""
    try:
        repository = agent.repository()
        spans, marks = repository.logs(source)
        return needs_base(repository.points(source), chains(spans, marks), epoch, position, marks)
    except BackupdError as error:
        log.warning("%s: whether its log continues a recovery point is not known: %s", source, error)
        return False


def jobs_of(agent: Agent, recordings: Recordings | None = None) -> list[Job]:
    """Each source that has a schedule or a log; then the logs, prune and verify of the repository, one at a time."""
    config = agent.config
    jobs = [
        _backup_job(agent, name, source, recordings)
        for name, source in config.sources.items()
        if source.schedule or source.recorded_every is not None
    ]
    for name, source in config.sources.items():
        if source.recorded_every is not None:
            when = Schedule.parse(_COMPACT, "UTC")
            jobs.append(
                Job(
                    "compact",
                    name,
                    _compact_of(agent, name, recordings),
                    when,
                    lane="repository",
                    tolerance=_LATE,
                    eager=False,
                )
            )
    settings, zone = config.serve, config.defaults.timezone
    if settings.prune_schedule and any(config.policies.values()):
        when = Schedule.parse(settings.prune_schedule, zone)
        jobs.append(
            Job("prune", "", lambda stop, _due: _prune(agent, stop), when, lane="repository", eager=False)
        )
    if settings.verify_schedule:
        when = Schedule.parse(settings.verify_schedule, zone)
        jobs.append(
            Job("verify", "", lambda stop, _due: _verify(agent, stop), when, lane="repository", eager=False)
        )
    return jobs


def _backup_job(agent: Agent, name: str, source: SourceConfig, recordings: Recordings | None) -> Job:
    def work(stop: threading.Event, due: datetime | None) -> Run:
        if recordings is None:
            return agent.back_up(name, Silence(), due=due, stop=stop)
        recordings.wait_begun(name, stop)
        before, *_ = recordings.stretch(name)
        run = agent.back_up(name, Silence(), due=due, stop=stop)
        now, epoch, position = recordings.stretch(name)
        # A stretch that began meanwhile led to no base of its own, as this one was being made.
        if now == before or not epoch or not _continues_none(agent, name, epoch, position):
            return run
        log.info("%s: another base is made, its log was torn while the last one was", name)
        return agent.back_up(name, Silence(), due=due, stop=stop)

    when = Schedule.parse(source.schedule, source.timezone or "UTC", seed=name) if source.schedule else None
    return Job("backup", name, work, when)


class _Stoppable:
    """A Progress that ends the work it is told of once the agent is told to stop.

    Compaction, prune and verify may be left at any step, as when they are killed: what is half removed is no point
    any more.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def stage(self, text: str) -> None:  # noqa: ARG002 -- named by the seam
        self.advance()

    def advance(self, size: int = 0, members: int = 0) -> None:  # noqa: ARG002 -- named by the seam
        if self._stop.is_set():
            raise Interrupted("told to stop", hint="it is done again at its next time")


def _compact_of(agent: Agent, source: str, recordings: Recordings | None) -> Work:
    def work(stop: threading.Event, _due: datetime | None) -> Run:
        started = agent.clock()
        compact_logs(agent.repository(), source, progress=_Stoppable(stop))
        if recordings is not None:
            recordings.ask_for_base(source)
        return Run("", "compact", source, RunStatus.OK, started, agent.clock())

    return work


def _prune(agent: Agent, stop: threading.Event) -> Run:
    started = agent.clock()
    prune(agent.repository(), agent.config.policies, clock=agent.clock, progress=_Stoppable(stop))
    return Run("", "prune", "", RunStatus.OK, started, agent.clock())


def _verify(agent: Agent, stop: threading.Event) -> Run:
    started = agent.clock()
    report = agent.verify_now(None, agent.config.serve.verify_data_percent, _Stoppable(stop))
    if report.problems:
        raise Damaged(
            f"the repository is damaged: {'; '.join(report.problems[:5])}",
            hint="`backupd verify` names everything; copy what is damaged from another copy",
        )
    return Run("", "verify", "", RunStatus.OK, started, agent.clock(), size=report.bytes_read)


def _release_left_paused(agent: Agent) -> None:
    """First of all, let go on what an agent that was killed left standing still."""
    from backupd.drivers.chroma import release_left_paused

    try:
        for name in release_left_paused(agent.engine):
            log.warning("%s was left paused by an agent that was killed; it goes on now", name)
    except BackupdError as error:
        log.error("a container may be left paused: %s", error)


def _known_points(agent: Agent) -> list[RecoveryPoint]:
    """What the repository tells of earlier runs. One out of reach is no reason not to start: the jobs tell."""
    try:
        return agent.repository_to_fill().points()
    except BackupdError as error:
        log.warning("the repository cannot be read yet: %s", error)
        return []
