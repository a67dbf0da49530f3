"""`backupd list` and `backupd window`: what can be restored."""

from __future__ import annotations

from datetime import datetime

import click

from backupd.agent import expand
from backupd.cli.options import Session, command
from backupd.cli.output import age, note, plain, print_json, print_table, size
from backupd.model import RecoveryPoint
from backupd.plan import Window, first_of_all, format_instant, parse_at, windows


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
    """From when to when each source can be restored: to separate instants, or to every instant where its log is
    recorded."""
    points = points_of(session, names)
    every = windows(points, session.agent.chains(points))
    found = {source: w for source, w in every.items() if w.reaches}
    if session.json:
        print_json({source: _window_json(w) for source, w in found.items()})
        return 0
    now = session.agent.clock()
    for source, w in every.items():
        if w.waiting:
            note(
                session,
                f"{source}: {len(w.waiting)} points lack the log that they need; `backupd verify` tells more",
            )
    if not found:
        print("no recovery points")
        return 0
    rows = [row for w in found.values() for row in _window_rows(w, now)]
    print_table(("SOURCE", "FROM", "TO", "NEWEST", "POINTS", "IN BETWEEN"), rows, right=(4,))
    if any(w.bars for w in found.values()):
        _print_timeline(list(found.values()), now)
    if len(found) > 1:
        earliest = first_of_all(found.values())
        print(
            f"all of them from {format_instant(earliest)}"
            if earliest
            else "there is no instant that all of them have"
        )
    return 0


def _window_json(w: Window) -> dict[str, object]:
    bars = [{"first": first, "last": last} for first, last in w.bars]
    return {
        "first": w.first,
        "last": w.last,
        "points": len(w.points),
        **({"continuous": bars} if bars else {}),
    }


def _window_rows(w: Window, now: datetime) -> list[tuple[str, ...]]:
    """One, or one for each stretch without a hole."""
    separate = [r.point for r in w.reaches if r.chain is None]
    rows = []
    if separate:
        first, last = separate[0].instant, separate[-1].instant
        rows.append((first, last, len(separate), "these instants"))
    for first, last in w.bars:
        held = sum(first <= r.first <= last and r.chain is not None for r in w.reaches)
        rows.append((first, last, held, "every instant"))
    return [
        (w.source, format_instant(first), format_instant(last), age(last, now), str(count), how)
        for first, last, count, how in sorted(rows)
    ]


_WIDTH = 60


def _print_timeline(found: list[Window], now: datetime) -> None:
    """A picture: `#` every instant, `|` a point, `.` nothing."""
    begin = min(w.first for w in found)
    span = max((now - begin).total_seconds(), 1.0)
    width = max(len(w.source) for w in found)

    def place(at: datetime) -> int:
        return min(_WIDTH - 1, max(0, int((at - begin).total_seconds() / span * _WIDTH)))

    for w in found:
        line = ["."] * _WIDTH
        for reach in w.reaches:
            if reach.chain is None:
                line[place(reach.first)] = "|"
        for first, last in w.bars:
            line[place(first) : place(last) + 1] = "#" * (place(last) + 1 - place(first))
        print(f"{w.source.ljust(width)}  {''.join(line)}")
    print(f"{' ' * width}  {format_instant(begin)[:19]}{'now'.rjust(_WIDTH - 19)}")
