"""`backupd status`."""

from __future__ import annotations

from datetime import datetime

from backupd.agent.status import Protection
from backupd.cli.failure import WARNED
from backupd.cli.options import Session, command
from backupd.cli.output import age, plain, print_json, print_table, printable
from backupd.config.values import format_duration


@command("status", short_help="What is protected, how old it is, what is overdue.")
def status_command(session: Session) -> int:
    """What is protected, how old the newest recovery point is, what is overdue, how the last run ended.

    Of a source whose log is recorded: how much would be lost if it were gone now, by what the repository alone tells.
    Where nothing changes that goes up to a minute and back, though nothing would be lost; the agent's /metrics know.
    Exit code 3 when a source is overdue, failing, has no recovery point, its log is not recorded as it should, or its
    server keeps too much of it.
    """
    found = session.agent.status()
    now = session.agent.clock()
    if session.json:
        print_json([{**plain(p), "good": p.good} for p in found])
    elif not found:
        print(f"{session.config.origin} names no source")
    else:
        rows = [_row(p, now) for p in found]
        print_table(("SOURCE", "DRIVER", "NEWEST POINT", "RPO NOW", "STATE", "LAST RUN", "NEXT"), rows)
        for p in found:
            if p.failing and p.last and p.last.message:
                print(printable(f"{p.source}: {p.last.message}"))
            if p.worry:
                print(printable(f"{p.source}: {p.worry}"))
    return 0 if all(p.good for p in found) else WARNED


def _row(p: Protection, now: datetime) -> tuple[str, ...]:
    state = "ok"
    if p.point is None:
        state = "UNPROTECTED"
    elif p.failing:
        state = "FAILING"
    elif p.overdue:
        state = f"OVERDUE since {age(p.overdue, now)}"
    elif p.lagging:
        state = "NOT RECORDED" if p.rpo is None else "LAGGING"
    elif p.worry:
        state = "HOLDS LOG"
    last = f"{p.last.status}, {age(p.last.started, now)}" if p.last else "never here"
    return (
        p.source,
        p.driver,
        age(p.point.instant, now) if p.point else "none",
        format_duration(p.rpo) if p.rpo is not None else "",
        state,
        last,
        age(p.next, now) if p.next else "by hand",
    )
