"""How a run grows with bytes and with files: time should be linear, memory flat."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.chart import Line, Panel, write_svg
from benchmarks.corpus import Maker
from benchmarks.goals import MOST_MEMORY, Goal, Verdict
from benchmarks.large import write_file
from benchmarks.measure import Taken, run
from benchmarks.report import layout, tell_verdicts
from benchmarks.scenario import Say
from benchmarks.tools import Bench, Tool

GB = 10**9
STEEPER = 1.25
"""So much more may a unit cost between the last two points than between the first two: linear, as far as a machine
that others use can tell."""
_FILE = 64 * 10**6
_FILES_PER_DIRECTORY = 100


@dataclass(frozen=True, slots=True)
class Point:
    """One size."""

    amount: float
    full: Taken
    unchanged: Taken


def growth(
    work: Path,
    tool: Tool,
    *,
    gigabytes: Sequence[float],
    counts: Sequence[float],
    looks: int,
    svg: Path | None,
    say: Say,
) -> dict[str, object]:
    """Along both axes; the trees grow from point to point. `looks`: unchanged runs at each, for a median."""
    by_size = _measure(work / "size", tool, gigabytes, "GB", _grow_to_size, looks, say)
    by_count = _measure(work / "count", tool, counts, "files", _grow_to_count, looks, say)
    print()
    verdicts = [*_tell("GB", by_size), *_tell("files", by_count)]
    tell_verdicts(verdicts)
    if svg is not None:
        write_svg(svg, [*_panels("GB", by_size), *_panels("files", by_count)])
        say(f"drawn: {svg}")
    return {
        "by size": [asdict(point) for point in by_size],
        "by count": [asdict(point) for point in by_count],
        "goals": [verdict.row() for verdict in verdicts],
    }


def _measure(
    work: Path,
    tool: Tool,
    amounts: Sequence[float],
    unit: str,
    grow: Callable[[Path, float], None],
    looks: int,
    say: Say,
) -> list[Point]:
    tree = work / "tree"
    tree.mkdir(parents=True)
    points = []
    for amount in sorted(amounts):
        say(f"growth: {amount:,g} {unit}")
        grow(tree, amount)
        bench = Bench(work / "bench", tree)
        bench.base.mkdir()
        env, log = tool.env(bench), bench.base / "log"
        run(tool.init(bench), cwd=tree, env=env, log=log)
        full = run(tool.backup(bench, 1), cwd=tree, env=env, log=log)
        again = [
            run(tool.backup(bench, number), cwd=tree, env=env, log=log) for number in range(2, 2 + looks)
        ]
        unchanged = sorted(again, key=lambda taken: taken.seconds)[len(again) // 2]
        points.append(Point(amount, full, unchanged))
        say(
            f"  full {full.seconds:.2f} s, {full.memory / 1e6:.0f} MB; "
            f"unchanged {unchanged.seconds:.2f} s, {unchanged.memory / 1e6:.0f} MB"
        )
        shutil.rmtree(bench.base)
    return points


def _grow_to_size(tree: Path, amount: float) -> None:
    """Large files, half as large when compressed; those that are there stay."""
    there = sum(path.stat().st_size for path in tree.iterdir())
    maker = Maker(seed=there % 1000003 + 21)
    number = len(list(tree.iterdir()))
    while there < amount * GB:
        size = int(min(_FILE, amount * GB - there))
        write_file(tree / f"{number:05d}.raw", maker.binary, size)
        there, number = there + size, number + 1


def _grow_to_count(tree: Path, amount: float) -> None:
    """Small files, a hundred in a directory; a few hundred bytes each, none like another."""
    first = len(list(tree.iterdir())) * _FILES_PER_DIRECTORY
    for number in range(first, int(amount)):
        folder = tree / f"{number // _FILES_PER_DIRECTORY:05d}"
        if number % _FILES_PER_DIRECTORY == 0:
            folder.mkdir()
        text = f"file {number} of many\n" * (1 + number % 31)
        (folder / f"{number:07d}.txt").write_text(text)


def _tell(unit: str, points: list[Point]) -> list[Verdict]:
    rows = [[unit, "full, s", "unchanged, s", "memory full, MB", "memory unchanged, MB"]]
    rows += [
        [
            f"{point.amount:,g}", f"{point.full.seconds:.2f}", f"{point.unchanged.seconds:.2f}",
            f"{point.full.memory / 1e6:.1f}", f"{point.unchanged.memory / 1e6:.1f}",
        ]
        for point in points
    ]  # fmt: skip
    print(layout(rows) + "\n")
    verdicts = [
        Verdict(Goal(f"memory {step}, {point.amount:,g} {unit}, bytes", "", MOST_MEMORY), taken.memory)
        for point in points
        for step, taken in (("full", point.full), ("unchanged", point.unchanged))
    ]
    for step in ("full", "unchanged"):
        steeper = _steeper([(point.amount, getattr(point, step).seconds) for point in points])
        if steeper is not None:
            verdicts.append(Verdict(Goal(f"{step} by {unit}, last slope / first", "", STEEPER), steeper))
    return verdicts


def _steeper(points: list[tuple[float, float]]) -> float | None:
    """How much more a unit costs between the last two points than between the first two; None where the time hardly
    grows at all."""
    if len(points) < 3 or points[-1][1] < 2 * points[0][1]:
        return None
    slopes = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(points)]
    return slopes[-1] / slopes[0] if slopes[0] > 0 else None


def _panels(unit: str, points: list[Point]) -> list[Panel]:
    amounts = [point.amount for point in points]
    if len(amounts) < 2:
        return []
    seconds = [
        Line("full", [point.full.seconds for point in points]),
        Line("unchanged", [point.unchanged.seconds for point in points]),
    ]
    memory = [
        Line("full", [point.full.memory / 1e6 for point in points]),
        Line("unchanged", [point.unchanged.memory / 1e6 for point in points]),
    ]
    return [
        Panel(f"seconds by {unit}; dashed: a straight line", amounts, seconds, linear=True),
        Panel(f"peak memory by {unit}, MB; dashed: the goal", amounts, memory, limit=MOST_MEMORY / 1e6),
    ]
