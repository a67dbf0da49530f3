"""`python -m benchmarks`: everything, or a part of it, side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import MEMORY, ToolFailed
from benchmarks.parts import MANY_FILES, PARTS, Asked, say
from benchmarks.peers import all_tools, install_peers
from benchmarks.tools import Tool

_REUSED = 65
"""Seconds after which ext4 without a journal gives the inodes of removed files out again; before that, whoever
makes many files waits for it to look at each of them."""


def main(argv: list[str] | None = None) -> int:
    """0 when every tool did its work; ratios are told, not judged by the exit code."""
    options = _options(argv)
    if not options.no_install:
        install_peers()
    tools = _tools(options.tools)
    MEMORY.made_ready = not options.small
    # Not /tmp, which is memory on many machines: the peers write to a disk there would be no comparison else.
    base = Path(options.work or "/var/tmp")
    base.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="backupd-bench-", dir=base))
    work.chmod(0o711)  # servers run as users of their own
    results: dict[str, object] = _machine(tools)
    asked = Asked(
        tools,
        options.rounds,
        options.small,
        options.files,
        options.gigabytes,
        options.counts,
        options.point_gb,
        options.scale,
        options.initial_gb,
    )
    try:
        for index, part in enumerate(options.parts):
            results[part] = PARTS[part](work / part, asked)
            _write(results, options.json)
            shutil.rmtree(work / part, ignore_errors=True)
            if part in MANY_FILES and not options.small and index + 1 < len(options.parts):
                os.sync()
                time.sleep(_REUSED)
    except ToolFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="else all, in this order")
    parser.add_argument("--files", type=int, help="in a tree (60000; 20000 in the directory that is moved)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", help="comma-separated, of backupd, restic, borg, tar|zstd, pgbackrest")
    parser.add_argument("--gigabytes", type=_numbers, help="sizes for `growth` (1,4,16)")
    parser.add_argument(
        "--counts", type=_numbers, help="numbers of files for `growth` (10000,100000,1000000)"
    )
    parser.add_argument("--point-gb", type=float, help="size of the point for `files` (4)")
    parser.add_argument("--scale", type=int, help="pgbench's, of the database for `cluster` (335: 5 GB)")
    parser.add_argument(
        "--initial-gb", type=float, help="held by the server of `initial` (1); the goal names 5"
    )
    parser.add_argument("--small", action="store_true", help="does it work? Seconds, one round")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    parser.add_argument("--work", metavar="DIR", help="a directory on a disk (/var/tmp)")
    parser.add_argument("--no-install", action="store_true", help="do not install the peers")
    options = parser.parse_args(argv)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}")
    options.parts = options.parts or list(PARTS)
    if options.small:
        options.rounds = 1
    return options


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _tools(names: str | None) -> list[Tool]:
    """Those asked for that are here."""
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


def _write(results: dict[str, object], file: str | None) -> None:
    """After each part: what was measured is not lost when a later one fails."""
    if file:
        Path(file).write_text(json.dumps(results, indent=1) + "\n")
    say("")


if __name__ == "__main__":
    sys.exit(main())
