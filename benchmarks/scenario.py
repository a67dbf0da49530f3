"""A corpus and the steps done to it: every tool does the same, in turn, and what it restores is compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.corpus import digest_tree
from benchmarks.goals import Goal
from benchmarks.measure import Taken, ToolFailed, run
from benchmarks.tools import Bench, Tool

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """A backup by every tool, after a change of the corpus."""

    name: str
    change: Callable[[int], None] | None = None
    """Told the number of the round: a seed."""
    runs: int = 1
    restore: str = ""
    """Restore what this step stored, and measure that under this name."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One corpus with its steps; the first one is the full run, after which the repository is weighed."""

    name: str
    what: str
    """The corpus in a few words."""
    tree: Path
    steps: tuple[Step, ...]
    goals: tuple[Goal, ...]
    compare: tuple[str, ...] = ("",)
    """Below the tree: what a restore must bring back to the byte."""
    end_of_round: Callable[[int], None] | None = None
    reads: bool = False
    """Tell how many bytes each tool read: whether it opened what it knew already."""
    keep: bool = False
    """Remove nothing before the end. Trees of many files must: ext4 without a journal gives no inode out again
    within a minute of its removal and looks at each such one for every new file, so that who restores after a large
    removal takes ten times as long."""

    def digests(self, root: Path) -> list[str]:
        return [digest_tree(root / below) for below in self.compare]


@dataclass(slots=True)
class Steps:
    """What one tool took, a value for each round (more where a step has several runs)."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, list[int]] = field(default_factory=dict)

    def took(self, step: str, taken: Taken) -> None:
        self.seconds.setdefault(step, []).append(taken.seconds)
        self.processor.setdefault(step, []).append(taken.processor)
        self.weighed(f"memory {step}", taken.memory)
        self.weighed(f"read {step}", taken.read)

    def weighed(self, what: str, size: int) -> None:
        self.bytes.setdefault(what, []).append(size)

    def middle(self) -> dict[str, float]:
        """Medians: seconds by step, then bytes."""
        return {
            **{f"{name}, s": median(values) for name, values in self.seconds.items()},
            **{f"{name}, processor s": median(values) for name, values in self.processor.items()},
            **{f"{name}, bytes": median(values) for name, values in self.bytes.items()},
        }


def bench(
    base: Path, scenario: Scenario, tools: Sequence[Tool], *, rounds: int, say: Say, most_runs: int = 9
) -> dict[str, Steps]:
    """Everything in `base`, which is for the caller to remove. Raises ToolFailed where a tool fails or restores
    something else than it was given."""
    taken = {tool.name: Steps() for tool in tools}
    for number in range(1, rounds + 1):
        say(f"{scenario.name}: round {number} of {rounds}")
        shift = number % len(tools)  # nobody is always the first
        order = [*tools[shift:], *tools[:shift]]
        folder = base / f"round-{number}"
        benches = {tool.name: Bench(folder / str(index), scenario.tree) for index, tool in enumerate(tools)}
        _Round(scenario, order, benches, taken, number, most_runs, say).run()
        if scenario.end_of_round:
            scenario.end_of_round(number)
        if not scenario.keep:
            shutil.rmtree(folder)
    return taken


@dataclass(slots=True)
class _Round:
    scenario: Scenario
    order: list[Tool]
    benches: dict[str, Bench]
    taken: dict[str, Steps]
    number: int
    most_runs: int
    say: Say

    def run(self) -> None:
        for tool in self.order:
            bench = self.benches[tool.name]
            bench.base.mkdir(parents=True)
            self._do(tool, tool.init(bench))
        for index, step in enumerate(self.scenario.steps):
            self._step(step, first=index == 0)

    def _step(self, step: Step, *, first: bool) -> None:
        before = {name: bench.size() for name, bench in self.benches.items()}
        if step.change:
            step.change(self.number)
        expected = self.scenario.digests(self.scenario.tree)  # warms the page cache for all of them, too
        for _ in range(min(step.runs, self.most_runs)):
            for tool in self.order:
                bench = self.benches[tool.name]
                bench.runs += 1
                self._measure(step.name, tool, tool.backup(bench, bench.runs))
        for name, bench in self.benches.items():
            what = "repository" if first else f"grown {step.name}"
            self.taken[name].weighed(what, bench.size() - (0 if first else before[name]))
        if step.restore:
            self._restore(step.restore, expected)

    def _restore(self, name: str, expected: list[str]) -> None:
        for tool in self.order:
            bench = self.benches[tool.name]
            self._measure(name, tool, tool.restore(bench))
            if self.scenario.digests(tool.found(bench)) != expected:
                raise ToolFailed(f"{tool.name} restored something else than it was given")
            if not self.scenario.keep:
                shutil.rmtree(bench.restored)

    def _measure(self, step: str, tool: Tool, argv: list[str]) -> None:
        took = self._do(tool, argv)
        self.taken[tool.name].took(step, took)
        self.say(
            f"  {step:12} {tool.name:10} {took.seconds:7.2f} s, processor {took.processor:6.2f} s, "
            f"{took.memory / 1e6:5.0f} MB"
        )

    def _do(self, tool: Tool, argv: list[str]) -> Taken:
        bench = self.benches[tool.name]
        return run(argv, cwd=bench.tree, env=tool.env(bench), log=bench.base / "log")
