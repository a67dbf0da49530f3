"""`backupd plan` and `backupd restore`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import click

from backupd.cli.failure import WARNED, conclude
from backupd.cli.options import Session, command
from backupd.cli.output import note, plain, print_json, print_table, printable, seconds, size, watching
from backupd.config.values import Mistaken, format_duration, parse_duration
from backupd.errors import RestoreFailed, UsageError
from backupd.plan import LATEST, RestorePlan, format_instant, parse_at
from backupd.restore import Restored, RestoreReport

_SHOWN = 20  # warnings a source; --json has them all

F = TypeVar("F", bound=Callable[..., Any])


def _selection(function: F) -> F:
    for option in (
        click.option("--point", metavar="ID", default="", help="One recovery point, by id or its beginning."),
        click.option(
            "--max-skew", metavar="5s", help="Refuse when a source lands further than this before T."
        ),
        click.option("--at", metavar="T", help='RFC 3339, "2026-03-01 14:30", "2 hours ago" or "latest".'),
        click.argument("names", nargs=-1, metavar="[SOURCE|STACK]..."),
    ):
        function = option(function)
    return function


def _plan(
    session: Session, names: tuple[str, ...], at: str | None, max_skew: str | None, point: str
) -> RestorePlan:
    """The plan, with the instant echoed in UTC before anything starts."""
    if point and at:
        raise UsageError("--point and --at exclude each other", hint="a point has its own instant")
    if not point and not at:
        raise UsageError(
            "--at is needed: to which instant?", hint='--at latest, --at "2 hours ago", or --point ID'
        )
    instant = LATEST
    if at:
        instant = parse_at(at, now=session.agent.clock(), timezone=session.config.timezone)
        if instant != LATEST:
            note(session, f"at {format_instant(instant)}")
    made = session.agent.plan(names, instant, max_skew=_skew(max_skew), point=point)
    if not session.json:
        _print_plan(made, session)
    for source in session.config.sources if not names and not point else ():
        if source not in {step.source for step in made.steps}:
            note(session, f"{source} is left out: it has no recovery point")
    return made


def _skew(text: str | None) -> timedelta | None:
    try:
        return parse_duration(text) if text else None
    except Mistaken as wrong:
        raise UsageError(f"--max-skew {wrong.message}", hint=wrong.hint) from None


def _print_plan(plan: RestorePlan, session: Session) -> None:
    print_table(
        ("SOURCE", "POINT", "LANDS AT", "EARLIER BY", "SIZE"),
        [
            (s.source, s.point.id, format_instant(s.lands_at), format_duration(s.skew), size(s.point.size))
            for s in plan.steps
        ],
        right=(3, 4),
    )
    if len(plan.steps) > 1:
        apart = format_duration(plan.spread)
        note(session, f"{size(plan.size)} in all; the sources land {apart} apart, the first at "
             f"{format_instant(plan.effective)}")  # fmt: skip
    expected = session.agent.expected(plan)
    if expected is not None:
        note(session, f"expected to take {format_duration(expected)}, as the last one did")
    for step in plan.steps:
        for warning in step.point.warnings:
            note(session, f"{step.source}: captured with a warning: {warning}")


def _plan_json(plan: RestorePlan) -> dict[str, object]:
    steps = [
        {"source": s.source, "point": s.point.id, "driver": s.point.driver, "lands_at": s.lands_at,
         "skew": s.skew, "size": s.point.size, "warnings": s.point.warnings}
        for s in plan.steps
    ]  # fmt: skip
    return {
        "at": plan.at,
        "effective": plan.effective,
        "spread": plan.spread,
        "size": plan.size,
        "steps": steps,
    }


@command("plan", short_help="What a restore would do; touches nothing.")
@_selection
def plan_command(
    session: Session, names: tuple[str, ...], at: str | None, max_skew: str | None, point: str
) -> int:
    """What a restore would do: the point of each source, where it lands, how far from T, how much. Touches
    nothing."""
    made = _plan(session, names, at, max_skew, point)
    if session.json:
        print_json({**_plan_json(made), "expected_seconds": session.agent.expected(made)})
    return 0


@command("restore", short_help="Bring sources back to an instant.")
@_selection
@click.option(
    "--to",
    default="sandbox",
    show_default=True,
    metavar="sandbox|dir:PATH|container:NAME",
    help="Fresh containers on a private network; files; or one fresh container.",
)
@click.option("--name", metavar="N", help="Of the sandbox; else made of the time.")
@click.option("--keep", is_flag=True, help="Leave what a failed restore made, to look into it.")  # fmt: skip
def restore_command(
    session: Session,
    names: tuple[str, ...],
    at: str | None,
    max_skew: str | None,
    point: str,
    to: str,
    name: str | None,
    keep: bool,
) -> int:
    """Bring sources and stacks back as they were at T; everything that has a recovery point when none is named.

    A restore never deletes and never writes over anything. What it brought back is compared with what was
    measured at capture; exit code 1 when anything differs, 3 when the target could not take an owner or an
    attribute, with all of it named.
    """
    made = _plan(session, names, at, max_skew, point)
    name = name or _sandbox_name(session.agent.clock())
    with watching(session) as watch:
        report = session.agent.restore(
            made, to, name=name, keep=keep, watch=lambda step: watch(step.source, step.point.size)
        )
    if session.json:
        print_json(_report_json(report))
    else:
        _print_report(report, session)
    if report.differences:
        return conclude(
            RestoreFailed(
                f"what was restored differs from what was captured: {', '.join(report.differences)}",
                hint="the differences are listed above; what was restored is still there to be looked at",
            )
        )
    return WARNED if report.warned else 0


def _sandbox_name(now: datetime) -> str:
    return f"restore-{now:%Y%m%d-%H%M%S}"


def _print_report(report: RestoreReport, session: Session) -> None:
    print_table(
        ("SOURCE", "RESTORED TO", "LANDED AT", "EARLIER BY", "SIZE", "TOOK", "COMPARED", "REACH IT AT"),
        [_row(r) for r in report.restored],
        right=(3, 4, 5),
    )
    for restored in report.restored:
        for difference in restored.differences:
            print(printable(f"DIFFERS {restored.step.source}: {difference}"))
        for warning in restored.warnings[:_SHOWN]:
            print(printable(f"WARNING {restored.step.source}: {warning}"))
        if len(restored.warnings) > _SHOWN:
            print(f"WARNING {restored.step.source}: and {len(restored.warnings) - _SHOWN} more like these")
    note(session, f"restored to {report.target}: {size(report.plan.size)} in {seconds(report.seconds)}")
    if report.target.startswith("sandbox "):
        name = report.target.removeprefix("sandbox ")
        note(session, f"on the network backupd-{name} each answers to its source's name")
        note(session, f"when you are done: backupd sandbox remove {name}")


def _row(r: Restored) -> tuple[str, ...]:
    compared = f"{r.compared} facts equal" if r.compared else "every byte's digest"
    if r.differences:
        compared = f"{len(r.differences)} of {r.compared} DIFFER"
    return (
        r.step.source,
        r.where,
        format_instant(r.step.lands_at),
        format_duration(r.step.skew),
        size(r.step.point.size),
        seconds(r.seconds),
        compared,
        f"{r.address[0]}:{r.address[1]}" if r.address else "",
    )


def _report_json(report: RestoreReport) -> dict[str, object]:
    return {
        "target": report.target,
        "started": report.started,
        "seconds": report.seconds,
        "plan": plain(_plan_json(report.plan)),
        "restored": [
            {"source": r.step.source, "where": r.where, "seconds": r.seconds, "compared": r.compared,
             "differences": r.differences, "warnings": r.warnings, "address": r.address, "image": r.image}
            for r in report.restored
        ],
    }  # fmt: skip
