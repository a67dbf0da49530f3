"""How long a person waits for `backupd --version`, beside the interpreter's own start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import run
from benchmarks.tools import backupd_argv, clean_env

GOAL = 0.150
"""Seconds more than `python -c pass`."""


def bench_start(work: Path, *, runs: int, say: Callable[[str], None]) -> dict[str, object]:
    """Medians of runs in turn."""
    work.mkdir(parents=True)
    env = clean_env(work)
    seconds: dict[str, list[float]] = {"python": [], "backupd --version": []}
    for _ in range(runs):
        for name, argv in (
            ("python", [sys.executable, "-c", "pass"]),
            ("backupd --version", [*backupd_argv(), "--version"]),
        ):
            seconds[name].append(run(argv, cwd=work, env=env, log=work / "log").seconds)
    middle = {name: median(values) for name, values in seconds.items()}
    more = middle["backupd --version"] - middle["python"]
    verdict = "met" if more <= GOAL else "MISSED"
    say(
        f"backupd --version takes {more * 1000:.0f} ms more than python -c pass  goal {GOAL * 1000:.0f}: {verdict}"
    )
    return {"medians": middle, "more": more, "goal": GOAL, "all": seconds}
