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
from backupd.logs import check_logs
from backupd.plan import LATEST, RestorePlan, Step, format_instant, parse_at
from backupd.restore import Restored, RestoreReport

_RECOVERED = {
    "last_commit": "last commit that is in it:",
    "first_left_out": "first that is not:",
    "held_before": "what it held before is the recovery point",
    "expired": "keys whose time to live had passed, which go:",
    "as_of": "exactly as it was at:",
    "more_by": "more had been done by:",
    "holds_until": "all is in it that was done by:",
}
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
    with_log = any(s.logs for s in plan.steps)
    print_table(
        ("SOURCE", "POINT", "LANDS AT", "EARLIER BY", "SIZE", *(["LOG TO REPLAY"] if with_log else [])),
        [
            (s.source, s.point.id, format_instant(s.lands_at), format_duration(s.skew), size(s.point.size),
             *([_log(s)] if with_log else []))
            for s in plan.steps
        ],
        right=(3, 4, 5),
    )  # fmt: skip
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


def _log(step: Step) -> str:
    if not step.logs:
        return ""
    replayed = step.logs[-1].end - step.logs[0].start
    objects = f"{len(step.logs)} object{'s' * (len(step.logs) > 1)}"
    return f"{size(replayed)} in {objects}, {size(step.log_stored)} stored"


def _plan_json(plan: RestorePlan) -> dict[str, object]:
    steps = [
        {"source": s.source, "point": s.point.id, "driver": s.point.driver, "lands_at": s.lands_at,
         "skew": s.skew, "size": s.point.size, "warnings": s.point.warnings,
         **({"replay_to": s.replay_to, "logs": s.logs, "log_stored": s.log_stored} if s.logs else {})}
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
    nothing. A log that is torn, or there twice with other content, is told: the exit code is 22."""
    made = _plan(session, names, at, max_skew, point)
    for step in made.steps:
        check_logs(session.agent.repository(), step.logs)
    if session.json:
        print_json({**_plan_json(made), "expected_seconds": session.agent.expected(made)})
    return 0


@command("restore", short_help="Bring sources back to an instant.")
@_selection
@click.option(
    "--to",
    default="sandbox",
    show_default=True,
    metavar="sandbox|dir:PATH|container:NAME|in-place",
    help="Fresh containers on a private network; files; one fresh container; or the running service itself.",
)
@click.option(
    "--listen", default="", metavar="HOST[:PORT]", help="in-place: where the service reaches backupd."
)
@click.option(
    "--expired",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Redis: keys whose time to live has passed since T. keep: all times run on from where they stood.",
)
@click.option("--target-lsn", metavar="LSN", help="Replay the log up to this position instead.")
@click.option("--target-xid", metavar="XID", help="Replay the log up to this transaction instead.")
@click.option("--target-name", metavar="NAME", help="Replay the log up to this restore point instead.")
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
    listen: str,
    expired: str,
    **targets: str | None,
) -> int:
    """Bring sources and stacks back as they were at T; everything that has a recovery point when none is named.

    A restore never deletes and never writes over anything, but with --to in-place: then what the running service held
    is backed up first, as a recovery point of its own. What a restore brought back is compared with what was
    measured at capture; exit code 1 when anything differs, 3 when the target could not take an owner or an
    attribute, with all of it named.

    With a --target, of one source whose log is recorded, --at and --point only say which point the replay begins
    from and how much of the log there is to go through: everything, where neither is given.
    """
    target = {name.removeprefix("target_"): value for name, value in targets.items() if value}
    _check_target(target, names)
    if listen and to != "in-place":
        raise UsageError("--listen is for a restore in place", hint="add --to in-place")
    if expired == "keep" and to.startswith("dir:"):
        raise UsageError(
            "files are restored as they are: only a server that loads them drops keys, or keeps them",
            hint="leave --expired out, or restore to a sandbox or container:NAME",
        )
    made = _plan(session, names, at or ("latest" if target and not point else None), max_skew, point)
    if target:
        note(session, f"the log is replayed to {_said(target)}, not to an instant")
    name = name or _sandbox_name(session.agent.clock())
    with watching(session) as watch:
        report = session.agent.restore(
            made, to, name=name, keep=keep, target=target, listen=listen, keep_expired=expired == "keep",
            watch=lambda step: watch(step.source, step.point.size + sum(s.end - s.start for s in step.logs)),
        )  # fmt: skip
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


def _check_target(target: dict[str, str], names: tuple[str, ...]) -> None:
    if len(target) > 1:
        raise UsageError(f"{_said(target)} exclude each other", hint="name one target")
    if target and len(names) != 1:
        raise UsageError(
            f"{_said(target)} is a place in one source's log", hint="name that source, and no other"
        )


def _said(target: dict[str, str]) -> str:
    return " and ".join(f"{name} {value}" for name, value in target.items())


def _sandbox_name(now: datetime) -> str:
    return f"restore-{now:%Y%m%d-%H%M%S}"


def _print_report(report: RestoreReport, session: Session) -> None:
    print_table(
        ("SOURCE", "RESTORED TO", "LANDED AT", "EARLIER BY", "SIZE", "TOOK", "COMPARED", "REACH IT AT"),
        [_row(r) for r in report.restored],
        right=(3, 4, 5),
    )
    for restored in report.restored:
        for name, told in _RECOVERED.items():
            if name in restored.recovered:
                print(printable(f"{restored.step.source}: {told} {restored.recovered[name] or 'none'}"))
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
    if r.step.logs and r.image and not r.compared:
        compared += ", log replayed"
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
             "differences": r.differences, "warnings": r.warnings, "address": r.address, "image": r.image,
             "recovered": dict(r.recovered)}
            for r in report.restored
        ],
    }  # fmt: skip
