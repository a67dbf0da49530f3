"""The tree benchmark: every tool does the same steps, in turn, and what it restores is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.corpus import Corpus, change_tree, digest_tree, make_tree
from benchmarks.measure import Taken, ToolFailed, run
from benchmarks.tools import Bench, Tool

SHARE = 0.01
_UNCHANGED_RUNS = 3  # short: three looks a round

Say = Callable[[str], None]


@dataclass(slots=True)
class Steps:
    """What one tool took, a value for each round (a few for `unchanged`)."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, list[int]] = field(default_factory=dict)

    def took(self, step: str, taken: Taken) -> None:
        self.seconds.setdefault(step, []).append(taken.seconds)
        self.processor.setdefault(step, []).append(taken.processor)
        self.bytes.setdefault(f"memory {step}", []).append(taken.memory)

    def middle(self) -> dict[str, float]:
        """Medians: seconds by step, then bytes."""
        return {
            **{f"{name}, s": median(values) for name, values in self.seconds.items()},
            **{f"{name}, processor s": median(values) for name, values in self.processor.items()},
            **{f"{name}, bytes": median(values) for name, values in self.bytes.items()},
        }


def bench_trees(
    work: Path, tools: Sequence[Tool], *, files: int, rounds: int, say: Say
) -> tuple[Corpus, dict[str, Steps]]:
    """Everything in `work`, which is for the caller to remove. Nothing is removed before: ext4 without a journal
    makes no inode again within a minute and looks at each such one for every new file, so that who restores after
    a large removal takes ten times as long. Raises ToolFailed where a tool fails or restores wrongly."""
    say(f"making a tree of {files:,} files")
    tree = work / "tree"
    corpus = make_tree(tree, files=files)
    say(f"  {corpus.bytes / 1e6:,.0f} MB")
    taken = {tool.name: Steps() for tool in tools}
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        _round(work / f"round-{number}", tree, tools, taken, number, say)
    return corpus, taken


def _round(
    base: Path, tree: Path, tools: Sequence[Tool], taken: dict[str, Steps], number: int, say: Say
) -> None:
    benches = {tool.name: Bench(base / str(index), tree) for index, tool in enumerate(tools)}
    shift = number % len(tools)  # nobody is always the first
    order = [*tools[shift:], *tools[:shift]]
    for tool in order:
        bench = benches[tool.name]
        bench.base.mkdir(parents=True)
        _do(tool, bench, tool.init(bench))
    digest_tree(tree)  # warms the page cache for all of them

    def each(step: str, runs: int = 0) -> None:
        for tool in order:
            bench = benches[tool.name]
            step_taken = _do(tool, bench, tool.backup(bench, len(taken[tool.name].seconds) + runs))
            taken[tool.name].took(step, step_taken)
            say(f"  {step:10} {tool.name:9} {step_taken.seconds:7.2f} s {step_taken.memory / 1e6:6.0f} MB")

    each("full")
    before = {}
    for tool in tools:
        before[tool.name] = benches[tool.name].size()
        taken[tool.name].bytes.setdefault("repository", []).append(before[tool.name])
    for again in range(_UNCHANGED_RUNS):
        each("unchanged", 100 + again)
    before = {tool.name: benches[tool.name].size() for tool in tools}
    change_tree(tree, share=SHARE, seed=number)
    expected = digest_tree(tree)
    each("1% changed", 200)
    for tool in tools:
        grown = benches[tool.name].size() - before[tool.name]
        taken[tool.name].bytes.setdefault("grown", []).append(grown)
    for tool in order:
        bench = benches[tool.name]
        step_taken = _do(tool, bench, tool.restore(bench))
        taken[tool.name].took("restore", step_taken)
        say(f"  restore    {tool.name:9} {step_taken.seconds:7.2f} s {step_taken.memory / 1e6:6.0f} MB")
        if digest_tree(tool.found(bench)) != expected:
            raise ToolFailed(f"{tool.name} restored something else than it was given")


def _do(tool: Tool, bench: Bench, argv: list[str]) -> Taken:
    return run(argv, cwd=bench.tree, env=tool.env(bench), log=bench.base / "log")


def _line(step: str, tool: Tool, taken: Taken) -> str:
    return (
        f"  {step:10} {tool.name:9} {taken.seconds:7.2f} s, processor {taken.processor:6.2f} s, "
        f"{taken.memory / 1e6:5.0f} MB"
    )
