"""When jobs run: schedules, catch-up after downtime, no overlap, an orderly end.

APScheduler keeps the time and nothing else; what is due, late, missed or refused is decided here, by pure
functions (`schedule`), and carried out by the loop (`loop`) until a signal ends it (`until_stopped`).
"""

from backupd.scheduler.loop import Health, Job, Scheduler, Work
from backupd.scheduler.schedule import Schedule, due_now, overdue
from backupd.scheduler.until_stopped import run_until_stopped

__all__ = ["Health", "Job", "Schedule", "Scheduler", "Work", "due_now", "overdue", "run_until_stopped"]
