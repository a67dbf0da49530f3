"""`backupd backup`."""

from __future__ import annotations

import sys

import click

from backupd.agent import Outcome
from backupd.cli.failure import say, worst
from backupd.cli.options import Session, command
from backupd.cli.output import plain, print_json, printable, seconds, size, watching


@command("backup", short_help="Back up sources or stacks now.")
@click.argument("names", nargs=-1, metavar="[SOURCE|STACK]...")
@click.option(
    "--allow-shrink", is_flag=True, help="A source that is empty, or much smaller, is meant to be so."
)
def backup_command(session: Session, names: tuple[str, ...], allow_shrink: bool) -> int:
    """Back up sources or stacks now; all sources when none is named.

    One that fails does not keep the others from being done. The exit code is 0 when all of them were, 3 when
    there were warnings, else the worst failure's.
    """
    agent = session.agent
    sources = agent.select(names)
    with watching(session) as watch:
        outcomes = agent.back_up_all(sources, lambda name: watch(name, 0), allow_shrink=allow_shrink)
    if session.json:
        print_json([_as_json(outcome) for outcome in outcomes])
    for outcome in outcomes:
        _tell(outcome, quiet=session.quiet or session.json)
    return worst(outcome.exit_code for outcome in outcomes)


def _tell(outcome: Outcome, *, quiet: bool) -> None:
    if outcome.error is not None:
        said = outcome.error.message
        sys.stdout.flush()
        say(
            said
            if said.startswith((f"{outcome.source}:", f"{outcome.source} "))
            else f"{outcome.source}: {said}",
            outcome.error.hint,
        )
        return
    run = outcome.run
    if run is None or quiet:
        return
    took = seconds((run.finished - run.started).total_seconds()) if run.finished else "?"
    print(printable(f"{run.source}: point {run.point}, {size(run.size)} ({size(run.stored)} new) in {took}"))
    for warning in run.warnings:
        print(printable(f"  warning: {warning}"))


def _as_json(outcome: Outcome) -> object:
    error = outcome.error
    failure = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code} if error else None
    return {"source": outcome.source, "run": plain(outcome.run), "error": failure}
