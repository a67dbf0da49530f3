"""`backupd serve`."""

from __future__ import annotations

import click

from backupd.cli.options import Session, command


@command("serve", short_help="The agent: run what is scheduled until stopped.")
@click.option("--log", "style", type=click.Choice(["auto", "json", "plain"]), default="auto", show_default=True,
              help="How lines are written; auto: plain on a terminal, else JSON.")  # fmt: skip
def serve_command(session: Session, style: str) -> int:
    """Run what is scheduled until SIGTERM. Missed runs are caught up at the start; /healthz says how it stands."""
    from backupd import log
    from backupd.agent.serving import serve

    log.configure("json" if session.json else style)
    return serve(session.agent)
