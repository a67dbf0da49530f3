"""Medians and ratios, as a table to read and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.goals import Verdict, judge
from benchmarks.scenario import Scenario, Steps

Middle = Mapping[str, Mapping[str, float]]


def table(middle: Middle, *, reads: bool = False) -> str:
    """Tools across; down: seconds, processor seconds, then bytes in MB; bytes read only where they are asked for."""
    names = list(middle)
    figures = [what for what in middle[names[0]] if reads or not what.startswith("read ")]
    rows = [["", *names]]
    rows += [
        [what, *(f"{middle[name][what]:.2f}" for name in names)] for what in figures if what.endswith(" s")
    ]
    rows += [
        [what.replace(", bytes", ", MB"), *(f"{middle[name][what] / 1e6:,.2f}" for name in names)]
        for what in figures
        if what.endswith("bytes")
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


def ratio_table(middle: Middle) -> str:
    """backupd over each peer: a column for each, a row for each figure that both have."""
    ours = middle["backupd"]
    peers = [name for name in middle if name != "backupd"]
    rows = [["backupd /", *peers]]
    for what, value in ours.items():
        if not what.startswith(("read ", "memory ", "grown unchanged")):
            cells = [f"{value / theirs:.3f}" if (theirs := middle[peer].get(what)) else "" for peer in peers]
            rows.append([what, *cells])
    return layout(rows)


def tell(scenario: Scenario, taken: Mapping[str, Steps], *, rounds: int) -> dict[str, object]:
    """Print a scenario's figures, ratios and verdicts; the same for JSON."""
    middle = {name: steps.middle() for name, steps in taken.items()}
    verdicts = judge(scenario.goals, middle)
    print(
        f"\n{scenario.name}: {scenario.what}; medians of {rounds} rounds\n\n{table(middle, reads=scenario.reads)}\n"
    )
    if "backupd" in middle and len(middle) > 1:
        print(f"{ratio_table(middle)}\n")
    tell_verdicts(verdicts)
    return {
        "what": scenario.what,
        "medians": middle,
        "goals": [verdict.row() for verdict in verdicts],
        "all": {name: {**steps.seconds, **steps.bytes} for name, steps in taken.items()},
    }


def tell_verdicts(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        print(verdict.line())
    if verdicts:
        print(f"{sum(verdict.met for verdict in verdicts)} of {len(verdicts)} goals met\n", flush=True)
