"""Errors as people read them, and as programs do: two lines on standard error, and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

import click

from backupd.cli.options import Session
from backupd.errors import BackupdError, Interrupted

INTERRUPTED = Interrupted.exit_code
WARNED = 3


def explain(error: BaseException, session: Session) -> int:
    """Say what happened and what to do; the exit code."""
    message, hint, code = describe(error)
    from backupd.log import mask

    message, hint = mask(message), mask(hint)
    if session.json:
        import json

        print(json.dumps({"error": {"message": message, "hint": hint, "exit_code": code}}))
    with contextlib.suppress(BrokenPipeError):  # whoever read our output has gone
        sys.stdout.flush()
        say(message, hint)
    return code


def conclude(error: BackupdError) -> int:
    """End with a failure whose details were printed already, as the one JSON document perhaps."""
    sys.stdout.flush()
    say(error.message, error.hint)
    return error.exit_code


def say(message: str, hint: str = "") -> None:
    """`backupd: <what happened>`, then `hint: <what to do>`, on standard error."""
    print(f"backupd: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def describe(error: BaseException) -> tuple[str, str, int]:  # noqa: PLR0911  a table, read downward
    """What happened, what to do, the exit code; for anything that can be raised."""
    if isinstance(error, BackupdError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "a command is needed", "`backupd --help` lists them", 2
    if isinstance(error, click.UsageError):
        message = error.format_message().rstrip(".")
        path = error.ctx.command_path if error.ctx else "backupd"
        return message[:1].lower() + message[1:], f"`{path} --help` shows how it is written", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), "", 1
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", "", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "the reader of our output went away", "", 1
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror or error}", _os_hint(error), 1
    kind = type(error).__name__
    return (
        f"this should not have happened: {kind}: {error}",
        "run it again with BACKUPD_DEBUG=1 for the details, and report them: it is a fault of backupd",
        1,
    )


def _os_hint(error: OSError) -> str:
    import errno

    return {
        errno.ENOSPC: "the disk is full: make room, then run it again",
        errno.EDQUOT: "the quota is used up: make room, then run it again",
        errno.EACCES: "run it as a user who may do that",
        errno.EROFS: "the file system is read-only",
    }.get(error.errno or 0, "")


def worst(codes: Iterable[int]) -> int:
    """One code for several results, so that no failure hides behind another's success: the highest of the
    failures; 3 where there are only warnings. The numbers rise with what a person should look at first."""
    given = set(codes)
    failures = given - {0, WARNED}
    return max(failures) if failures else max(given, default=0)
