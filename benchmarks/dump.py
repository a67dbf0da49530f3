"""An uncompressed pg_dump, kept as a file: rows changed, a byte put before it, back to what it was."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.containers import postgres, sql
from benchmarks.goals import usual
from benchmarks.large import byte_ahead
from benchmarks.measure import ToolFailed
from benchmarks.postgres import CHANGE, FILL
from benchmarks.scenario import Say, Scenario, Step
from benchmarks.states import put_back


def dump(work: Path, *, rows: int, say: Say) -> Scenario:
    """Both dumps are taken now, so that no server runs while anything is measured."""
    say(f"dumping a database of {rows:,} rows, before and after 1 % of them change")
    tree, before, after = work / "tree", work / "before", work / "after"
    with postgres("fsync=off", "autovacuum=off") as server:
        sql(server, FILL.format(rows=rows))
        _dump(server, before)
        sql(server, CHANGE)
        _dump(server, after)
    tree.mkdir()
    put_back(before, tree)
    steps = (
        Step("full", restore="restore"),
        Step("unchanged", runs=3),
        Step("1% changed", lambda _: put_back(after, tree)),
        Step("byte ahead", lambda number: byte_ahead(tree / "orders.sql", number)),
        Step("went back", lambda _: put_back(before, tree), restore="restore last"),
    )
    what = f"one file, {(before / 'orders.sql').stat().st_size / 1e6:,.0f} MB"
    changes = {"1% changed": 1.0, "byte ahead": 1.0, "went back": 1.0}
    return Scenario("dump", what, tree, steps, tuple(usual(changes)))


def _dump(server: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "orders.sql").open("wb") as file:
        argv = ["docker", "exec", server, "pg_dump", "-U", "postgres", "postgres"]
        if subprocess.run(argv, stdout=file, check=False).returncode:
            raise ToolFailed("pg_dump failed")
