"""`backupd demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backupd.cli.options import Session, command
from backupd.cli.output import note, printable
from backupd.errors import ContainerError

if TYPE_CHECKING:
    from backupd.demo.stack import Stack


@command("demo", short_help="The whole story on a throwaway stack.")
@click.option("--embedded", is_flag=True, help="Servers without containers, even where Docker answers.")
def demo_command(session: Session, embedded: bool) -> int:
    """Fill a small stack, back it up, change it, lose it, bring it back to one instant, and compare.

    In containers where a Docker engine answers, else on the same servers without one. Nothing is left behind.
    """
    from backupd.demo import run

    def make(folder: Path) -> Stack:
        from backupd.demo.stack import DockerStack
        from backupd.sandbox.docker import Engine

        if not embedded:
            try:
                return DockerStack(Engine())
            except ContainerError as error:
                note(session, f"{error.message}; so the servers run here, without containers")
        from backupd.demo.embedded import EmbeddedStack

        return EmbeddedStack(folder)

    run(make, lambda line: print(printable(line), flush=True))
    return 0
