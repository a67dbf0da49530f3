"""The command line: each command parses, calls one function, prints and returns its exit code.

A command's module is imported when it is called: `backupd --version` must not wait for a database client.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

from backupd import __version__
from backupd.cli.options import Session, shared_options

COMMANDS = {
    "init": "backupd.cli.setup",
    "check": "backupd.cli.setup",
    "config": "backupd.cli.setup",
    "backup": "backupd.cli.backup",
    "list": "backupd.cli.points",
    "window": "backupd.cli.points",
    "status": "backupd.cli.status",
    "plan": "backupd.cli.restore",
    "restore": "backupd.cli.restore",
    "sandbox": "backupd.cli.sandbox",
    "prune": "backupd.cli.care",
    "verify": "backupd.cli.care",
    "ls": "backupd.cli.look",
    "cat": "backupd.cli.look",
    "export": "backupd.cli.look",
    "serve": "backupd.cli.serve",
    "demo": "backupd.cli.demo",
}
"""Command -> the module with a click command of that name. In the order of use."""

SUMMARIES = {
    "init": "Write a starter backupd.toml from the containers there are, and make the repository.",
    "check": "Configuration, connections, permissions: every problem, each with its fix.",
    "config": "Show the configuration as it is understood, or its JSON Schema.",
    "backup": "Back up sources or stacks now.",
    "list": "Recovery points.",
    "window": "From when to when each source can be restored.",
    "status": "What is protected, how old it is, what is overdue.",
    "plan": "What a restore would do; touches nothing.",
    "restore": "Bring sources back to an instant.",
    "sandbox": "List the sandboxes of earlier restores, or remove one.",
    "prune": "Remove what the retention no longer keeps.",
    "verify": "Compare what is stored with what was written.",
    "ls": "What is in a recovery point.",
    "cat": "One file of a recovery point, to standard output.",
    "export": "A recovery point as a plain .tar.zst.",
    "serve": "The agent: run what is scheduled until stopped.",
    "demo": "The whole story on a throwaway stack.",
}
"""Shown by `backupd --help` without importing a command."""


class Commands(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's
        if cmd_name not in COMMANDS:
            return None
        module = import_module(COMMANDS[cmd_name])
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "`backupd --help` lists the commands"
            from backupd.errors import UsageError

            raise UsageError(f'there is no command "{args[0]}"', hint=hint)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 done with warnings, 10 no repository, "
    "11 locked, 12 wrong key, 20 capture failed, 21 no recovery point, 22 damaged, 23 drill failed, "
    "130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", prog_name="backupd", message="%(prog)s %(version)s")
@shared_options
@click.pass_context
def root(ctx: click.Context) -> None:
    """Backup and disaster recovery for container stacks."""
    ctx.ensure_object(Session)


def main(argv: list[str] | None = None) -> None:
    """Run a command line and exit with its code. Nothing else in the package exits."""
    # Of what is made here hardly anything refers to itself: to look for that at every 700th object, and at all there is
    # once more at the end, took a tenth of a short run.
    gc.set_threshold(20_000)
    code = run(argv)
    gc.freeze()
    sys.exit(code)


def run(argv: list[str] | None = None) -> int:
    """Run a command line; the exit code. Never raises, unless BACKUPD_DEBUG=1 asks for the traceback."""
    from backupd.cli.failure import explain

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _Interrupt())
    session = Session()
    try:
        code = root.main(args=argv, prog_name="backupd", obj=session, standalone_mode=False)
    except SystemExit as end:  # click's own --help of an old habit
        return end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        if os.environ.get("BACKUPD_DEBUG") == "1":
            raise
        return explain(error, session)
    return code if isinstance(code, int) else 0


class _Interrupt:
    """Ctrl-C, and SIGTERM, which is Ctrl-C from an orchestrator: the first ends the work in good order, the
    second ends the process. What is stored is safe either way: without a manifest there is no point."""

    def __init__(self) -> None:
        self._again = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self._again:
            os._exit(130)
        self._again = True
        raise KeyboardInterrupt
