"""`python -m benchmarks`: everything, or a part of it, side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import ToolFailed
from benchmarks.report import MOST_MEMORY, medians, ratio_lines, ratios, table
from benchmarks.tools import Tool, all_tools, install_peers
from benchmarks.trees import bench_trees


def main(argv: list[str] | None = None) -> int:
    """0 when every tool did its work; ratios are told, not judged by the exit code."""
    options = _options(argv)
    parts = options.parts or ["trees", "postgres", "start"]
    if not options.no_install:
        install_peers()
    tools = _tools(options.tools)
    # Not /tmp, which is memory on many machines: the peers write to a disk there would be no comparison else.
    base = Path(options.work or (Path.home() / ".cache"))
    base.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="backupd-bench-", dir=base))
    results: dict[str, object] = _machine(tools)
    try:
        if "trees" in parts:
            results["trees"] = _trees(work, tools, options)
        if "postgres" in parts:
            from benchmarks.postgres import bench_postgres

            results["postgres"] = bench_postgres(work, small=options.small, rounds=options.rounds, say=_say)
        if "start" in parts:
            from benchmarks.start import bench_start

            results["start"] = bench_start(work, runs=3 if options.small else 15, say=_say)
    except ToolFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="trees|postgres|start", help="else all")
    parser.add_argument("--files", type=int, help="in the tree (60000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", help="comma-separated, of backupd, restic, borg, tar|zstd")
    parser.add_argument("--small", action="store_true", help="does it work? 400 files, one round")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument("--work", metavar="DIR", help="a directory on a disk (~/.cache)")
    parser.add_argument("--no-install", action="store_true", help="do not install restic and borg")
    options = parser.parse_args(argv)
    for part in set(options.parts) - {"trees", "postgres", "start"}:
        parser.error(f"there is no part {part!r}")
    if options.small:
        options.rounds = 1
    options.files = options.files or (400 if options.small else 60_000)
    return options


def _tools(names: str | None) -> list[Tool]:
    """Those asked for that are here. Raises SystemExit when backupd is not."""
    wanted = names.split(",") if names else None
    found = []
    for tool in all_tools():
        if wanted and tool.name not in wanted:
            continue
        version = tool.version()
        print(f"{tool.name}: {version or 'is not here: left out'} ({tool.note})")
        if version:
            found.append(tool)
    return found


def _trees(work: Path, tools: list[Tool], options: argparse.Namespace) -> dict[str, object]:
    corpus, taken = bench_trees(work, tools, files=options.files, rounds=options.rounds, say=_say)
    middle = medians(taken)
    found = ratios(middle) if "backupd" in middle else []
    print(
        f"\ntree: {corpus.files:,} files, {corpus.bytes / 1e6:,.0f} MB; medians of {options.rounds} rounds\n"
    )
    print(table(middle) + "\n")
    print("\n".join(ratio_lines(found)))
    if "backupd" in middle:
        most = max(value for name, value in middle["backupd"].items() if name.startswith("memory"))
        verdict = "met" if most <= MOST_MEMORY else "MISSED"
        print(f"backupd, most memory {most / 1e6:,.0f} MB  goal {MOST_MEMORY / 1e6:.0f} MB: {verdict}")
    return {
        "files": corpus.files,
        "bytes": corpus.bytes,
        "medians": middle,
        "ratios": found,
        "all": {name: {**steps.seconds, **steps.bytes} for name, steps in taken.items()},
    }


def _machine(tools: list[Tool]) -> dict[str, object]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {tool.name: tool.version() for tool in tools},
        "notes": {tool.name: tool.note for tool in tools},
    }


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
