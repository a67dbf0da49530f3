"""`backupd sandbox`: what earlier restores made."""

from __future__ import annotations

from contextlib import suppress

import click

from backupd.cli.options import Session, command
from backupd.cli.output import note, print_json, print_table
from backupd.errors import ContainerError, UsageError


@command("sandbox", short_help="List the sandboxes of earlier restores, or remove one.")
@click.argument("action", type=click.Choice(["list", "remove"]), default="list")
@click.argument("name", required=False)
def sandbox_command(session: Session, action: str, name: str | None) -> int:
    """List the sandboxes of earlier restores with their containers, or remove one by its name.

    Removing takes containers, volumes and network with that sandbox's label, and nothing else.
    """
    from backupd.sandbox.docker import DockerSandbox, Engine

    engine = Engine()
    if action == "remove":
        if name is None:
            raise UsageError(
                "which sandbox?", hint="backupd sandbox remove NAME; `backupd sandbox` lists them"
            )
        DockerSandbox.find(engine, name).destroy()
        note(session, f"removed the sandbox {name}")
        return 0
    rows: list[tuple[str, str, str, str]] = []
    for sandbox in DockerSandbox.names(engine):
        with suppress(ContainerError):  # removed by somebody since it was listed
            made = sorted(DockerSandbox.find(engine, sandbox).containers().items())
            rows += [(sandbox, source, container.name, container.status) for source, container in made]
    if session.json:
        print_json(
            [dict(zip(("sandbox", "source", "container", "status"), row, strict=True)) for row in rows]
        )
    elif rows:
        print_table(("SANDBOX", "SOURCE", "CONTAINER", "STATUS"), rows)
    else:
        print("no sandboxes")
    return 0
