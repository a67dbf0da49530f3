"""`backupd prune` and `backupd verify`: looking after what is stored."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from backupd.agent import expand
from backupd.cli.options import Session, command
from backupd.cli.output import plain, print_json, print_table, printable, size, watching
from backupd.errors import Damaged, UsageError
from backupd.plan import format_instant
from backupd.retention import Verdict


@command("prune", short_help="Remove what the retention no longer keeps.")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would go, and why the rest stays.")
@click.option(
    "--max-unused",
    metavar="N%",
    help="Repack until at most this share of what is stored is unneeded, whatever that writes; 100% repacks nothing. "
    "Without it, what frees at least as much as it writes.",
)
def prune_command(session: Session, dry_run: bool, max_unused: str | None) -> int:
    """Remove the recovery points that no rule of the retention keeps, and what only they needed.

    The newest point of each source stays whatever the rules say; a source without rules keeps everything. Objects
    of which little is needed any more are written anew without the rest; the old ones go a day later.
    """
    share = None if max_unused is None else _percent("--max-unused", max_unused) / 100
    agent = session.agent
    with watching(session) as watch:
        report = agent.prune_now(dry_run=dry_run, max_unused=share, progress=watch("prune", 0))
    if session.json:
        print_json({"dry_run": dry_run, **plain(report)})
        return 0
    _print_verdicts(report.verdicts)
    gone = sum(not v.keep for v in report.verdicts)
    would = "would be" if dry_run else "were"
    print(f"{gone} of {len(report.verdicts)} points {would} removed, {size(report.bytes_freed)} freed")
    if report.logs_removed:
        print(
            f"{report.logs_removed} objects of logs {would} removed: no kept point and no window needs them"
        )
    if report.packs_repacked:
        print(f"{report.packs_repacked} packs {would} repacked, {size(report.bytes_rewritten)} written")
    if report.bytes_waiting:
        print(f"{size(report.bytes_waiting)} in repacked packs {'would ' * dry_run}go a day after that")
    return 0


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    if verdicts:
        print_table(
            ("", "SOURCE", "INSTANT", "POINT", "WHY"),
            [
                ("keep" if v.keep else "REMOVE", v.point.source, format_instant(v.point.instant), v.point.id,
                 ", ".join(v.reasons))
                for v in verdicts
            ],
        )  # fmt: skip


@command("verify", short_help="Compare what is stored with what was written.")
@click.argument("names", nargs=-1, metavar="[SOURCE|STACK]...")
@click.option(
    "--data", metavar="N%", default="0%", show_default=True, help="How much content to read back, too."
)
def verify_command(session: Session, names: tuple[str, ...], data: str) -> int:
    """Compare what is stored with what was written: every manifest, index and object, and of the content as
    much as --data says. Exit code 22 when anything is damaged, with all of it named."""
    percent = _percent("--data", data)
    agent = session.agent
    known = dict.fromkeys([*session.config.sources, *agent.repository().sources()]) if names else {}
    sources = expand(names, session.config, known) if names else None
    with watching(session) as watch:
        report = agent.verify_now(sources, percent, watch("verify", 0))
    if session.json:
        print_json(report)
    else:
        for problem in report.problems:
            print(printable(f"DAMAGED: {problem}"))
        for line in report.notes:
            print(printable(f"note: {line}"))
        read = f"{report.points} points, {report.objects} objects, {size(report.bytes_read)} read"
        print(f"{read}: {'all well' if not report.problems else f'{len(report.problems)} problems'}")
    return Damaged.exit_code if report.problems else 0


def _percent(option: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text.strip())
    if match is None or float(match[1]) > 100:
        raise UsageError(f"{option} {text!r} is no share", hint='write "5%" or "100%"')
    return float(match[1])
