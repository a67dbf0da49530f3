"""`backupd init`, `backupd check`, `backupd config`: from nothing to a configuration that works."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from backupd.cli.failure import conclude
from backupd.cli.options import Session, command
from backupd.cli.output import note, plain, print_json, printable
from backupd.config import parse
from backupd.errors import BackupdError, ContainerError, UsageError


@command("init", short_help="Write a starter backupd.toml and make the repository.")
@click.argument("location", required=False, default="")
def init_command(session: Session, location: str) -> int:
    """Write a starter backupd.toml from the containers that run here, and make its repository.

    LOCATION is a directory or s3://bucket/prefix (else ./backups). A file that is there already is used as it
    is, and so is a repository: nothing is ever overwritten.
    """
    path = session.config_path or Path(os.environ.get("BACKUPD_CONFIG") or "backupd.toml")
    text = "" if path.exists() else _starter(session, location or session.location or "./backups")
    if text:
        session.config = parse(text, origin=str(path), base=path.absolute().parent, env=os.environ)
    else:
        session.config_path = path
        note(session, f"{path} is there already and is used as it is")
    made = session.agent.ensure_repository()
    where = session.config.repository.location
    note(session, f"{'made the repository' if made else 'there is a repository already'} at {where}")
    if text:  # last: a location that cannot be is not left behind in a file
        _write(path, text)
        note(session, f"wrote {path}: read it, correct it, then `backupd check`")
    if session.json:
        print_json({"config": path, "wrote": bool(text), "repository": where, "made": made,
                    "sources": list(session.config.sources)})  # fmt: skip
    return 0


def _starter(session: Session, location: str) -> str:
    from backupd.discovery import discover, starter
    from backupd.sandbox.docker import Engine

    try:
        found = discover(Engine().containers(running_only=True))
    except ContainerError as error:
        note(session, f"no containers were looked at: {error.message}")
        found = []
    for f in found:
        note(session, f"found {f.name}: {f.driver} ({f.why})")
    return starter(found, location)


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", hint="name another with --config"
        ) from None


@command("check", short_help="Configuration, connections, permissions: every problem, each with its fix.")
def check_command(session: Session) -> int:
    """Look at everything a backup needs: configuration, repository, history, each source. Every problem is told
    at once, each with its fix. Exit code 1 when one of them would make a backup fail."""
    findings = session.agent.check()
    if session.json:
        print_json(findings)
    for finding in () if session.json else findings:
        verdict = "FAILED" if finding.fatal else "warning" if finding.problems else "ok"
        print(printable(f"{verdict:8} {finding.where}"))
        for problem in finding.problems:
            print(printable(f"         {problem.message}"))
            if problem.hint:
                print(printable(f"         hint: {problem.hint}"))
    failed = [f for f in findings if f.fatal]
    if failed:
        names = ", ".join(f.where for f in failed)
        return conclude(
            BackupdError(
                f"{len(failed)} of {len(findings)} checks failed: {names}",
                hint="each is explained above, with its fix",
            )
        )
    return 0


@command("config", short_help="Show the configuration as it is understood, or its JSON Schema.")
@click.argument("what", type=click.Choice(["show", "schema"]), default="show")
def config_command(session: Session, what: str) -> int:
    """Show the configuration as it is understood, defaults filled in and secrets hidden; or its JSON Schema."""
    if what == "schema":
        from backupd.config.schema import json_schema

        print(json.dumps(json_schema(), indent=2))
        return 0
    config = session.agent.config
    note(session, f"from {config.origin}")
    shown = plain(config)
    del shown["origin"]  # no keys of the file, both
    for source in shown["sources"].values():
        del source["name"]
    print_json(shown)
    return 0
