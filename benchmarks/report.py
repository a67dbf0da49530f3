"""Medians and ratios, as a table to read and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.trees import Steps

STEPS = ("full", "unchanged", "1% changed", "restore")


@dataclass(frozen=True, slots=True)
class Goal:
    """backupd's figure over a peer's must not be more than `most`."""

    what: str
    peer: str
    most: float


GOALS = (
    Goal("full, s", "restic", 0.4),
    Goal("full, s", "borg", 0.4),
    Goal("full, s", "tar|zstd", 1.2),
    Goal("unchanged, s", "restic", 0.2),
    Goal("1% changed, s", "restic", 0.3),
    Goal("restore, s", "restic", 0.8),
    Goal("repository, bytes", "restic", 1.0),
)
MOST_MEMORY = 200 << 20


def table(middle: Mapping[str, Mapping[str, float]]) -> str:
    """Tools across, steps down."""
    names = list(middle)
    rows = [["", *names]]
    rows += [[f"{step}, s", *(f"{middle[n][f'{step}, s']:.2f}" for n in names)] for step in STEPS]
    rows += [
        [f"{step}, processor s", *(f"{middle[n][f'{step}, processor s']:.2f}" for n in names)]
        for step in STEPS
    ]
    rows += [
        [f"{what}, MB", *(f"{middle[n][f'{what}, bytes'] / 1e6:,.1f}" for n in names)]
        for what in ("grown", "repository", *(f"memory {step}" for step in STEPS))
    ]
    return layout(rows)


def layout(rows: list[list[str]]) -> str:
    """Markdown, columns as wide as their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def ratios(middle: Mapping[str, Mapping[str, float]]) -> list[dict[str, object]]:
    """backupd over each peer, with the goal where there is one."""
    ours = middle["backupd"]
    goals = {(goal.what, goal.peer): goal.most for goal in GOALS}
    return [
        {"what": what, "peer": peer, "ratio": value / theirs[what], "goal": goals.get((what, peer))}
        for peer, theirs in middle.items()
        if peer != "backupd"
        for what, value in ours.items()
        if not what.startswith("memory") and theirs.get(what)
    ]


def ratio_lines(found: list[dict[str, object]]) -> list[str]:
    """One line for each peer and figure."""
    lines = []
    for row in found:
        goal, ratio = row["goal"], row["ratio"]
        assert isinstance(ratio, float)
        verdict = ""
        if isinstance(goal, float):
            verdict = f"  goal {goal:g}: {'met' if ratio <= goal else 'MISSED'}"
        lines.append(f"backupd / {row['peer']!s:9} {row['what']!s:18} {ratio:6.3f}{verdict}")
    return lines


def medians(taken: Mapping[str, Steps]) -> dict[str, dict[str, float]]:
    return {name: steps.middle() for name, steps in taken.items()}
