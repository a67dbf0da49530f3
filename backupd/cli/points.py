"""`backupd list` and `backupd window`: what can be restored."""

from __future__ import annotations

import click

from backupd.agent import expand
from backupd.cli.options import Session, command
from backupd.cli.output import age, plain, print_json, print_table, size
from backupd.model import RecoveryPoint
from backupd.plan import format_instant, parse_at, windows


def points_of(session: Session, names: tuple[str, ...]) -> list[RecoveryPoint]:
    """The points of sources and stacks, configured or only in the repository; of all when none is named."""
    found = session.agent.repository().points()
    if not names:
        return found
    known = dict.fromkeys([*session.config.sources, *(p.source for p in found)])
    wanted = expand(names, session.config, known)
    return [p for p in found if p.source in wanted]


@command("list", short_help="Recovery points.")
@click.argument("names", nargs=-1, metavar="[SOURCE|STACK]...")
@click.option("--at", metavar="T", help="Only those from which an instant could be restored.")
def list_command(session: Session, names: tuple[str, ...], at: str | None) -> int:
    """Recovery points, oldest first. The time of each can be handed to --at as it stands."""
    points = points_of(session, names)
    now = session.agent.clock()
    if at is not None:
        instant = parse_at(at, now=now, timezone=session.config.timezone)
        points = [p for p in points if p.instant <= instant]
    if session.json:
        print_json([plain(p) for p in points])
        return 0
    if not points:
        print("no recovery points")
        return 0
    print_table(
        ("SOURCE", "INSTANT", "AGE", "POINT", "SIZE", "NEW", "WARNINGS"),
        [
            (p.source, format_instant(p.instant), age(p.instant, now), p.id, size(p.size), size(p.stored),
             str(len(p.warnings)) if p.warnings else "")
            for p in points
        ],
        right=(4, 5, 6),
    )  # fmt: skip
    return 0


@command("window", short_help="From when to when each source can be restored.")
@click.argument("names", nargs=-1, metavar="[SOURCE|STACK]...")
def window_command(session: Session, names: tuple[str, ...]) -> int:
    """From when to when each source can be restored, and to how many separate instants in between."""
    found = windows(points_of(session, names))
    if session.json:
        print_json({s: {"first": w.first, "last": w.last, "points": len(w.points)} for s, w in found.items()})
        return 0
    now = session.agent.clock()
    if not found:
        print("no recovery points")
        return 0
    print_table(
        ("SOURCE", "FROM", "TO", "NEWEST", "POINTS"),
        [
            (w.source, format_instant(w.first), format_instant(w.last), age(w.last, now), str(len(w.points)))
            for w in found.values()
        ],
        right=(4,),
    )
    earliest = max(w.first for w in found.values())
    if len(found) > 1:
        print(f"all of them from {format_instant(earliest)}")
    return 0
