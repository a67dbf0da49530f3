"""Many small files: changed, moved, copied."""

from __future__ import annotations

from pathlib import Path

from benchmarks.corpus import change_tree, make_tree
from benchmarks.goals import MOST_MEMORY, Goal, usual
from benchmarks.scenario import Say, Scenario, Step
from benchmarks.states import keep, put_back

SHARE = 0.01
MOVED = 0.03
"""A directory that was renamed, a tree that was copied: this much of its size may be stored again; and read again,
of the renamed one."""
_MODULES = 10e6
"""What the interpreter reads at its start."""


def trees(work: Path, *, files: int, say: Say) -> Scenario:
    """1 % of the files change, and change back."""
    say(f"making a tree of {files:,} files")
    tree, earlier = work / "tree", work / "earlier"
    corpus = make_tree(tree, files=files)

    def change(number: int) -> None:
        keep(tree, earlier / str(number))
        change_tree(tree, share=SHARE, seed=number)

    return Scenario(
        "trees",
        f"{corpus.files:,} files, {corpus.bytes / 1e6:,.0f} MB",
        tree,
        (
            Step("full"),
            Step("unchanged", runs=3),  # short: three looks a round
            Step("1% changed", change, restore="restore"),
            Step("went back", lambda number: put_back(earlier / str(number), tree)),
        ),
        (*usual({"1% changed": 0.7}, many_files=True), Goal("grown went back, bytes", "restic", 1.0)),
        keep=True,
    )


def moves(work: Path, *, files: int, say: Say) -> Scenario:
    """A large directory gets another name; a smaller one beside it is copied to a second place."""
    say(f"making a tree of {files:,} files to be moved, a quarter more to be copied")
    tree, aside = work / "tree", work / "aside"
    large = make_tree(tree / "moved-1", files=files)
    small = make_tree(tree / "original", files=max(1, files // 4), seed=2)
    aside.mkdir()

    def rename(number: int) -> None:
        (tree / f"moved-{number}").rename(tree / f"moved-{number + 1}")

    def copy(number: int) -> None:
        keep(tree / "original", tree / f"copy-{number}")

    def away(number: int) -> None:
        """Renamed out of the tree, not removed: see Scenario.keep."""
        (tree / f"copy-{number}").rename(aside / f"copy-{number}")

    return Scenario(
        "moves",
        f"a directory of {large.files:,} files, {large.bytes / 1e6:,.0f} MB, renamed; "
        f"one of {small.files:,} files, {small.bytes / 1e6:,.0f} MB, copied",
        tree,
        (
            Step("full"),
            Step("unchanged", runs=3),
            Step("renamed", rename),
            Step("copied", copy, restore="restore"),
        ),
        (
            *usual({}, many_files=True),
            *(Goal(f"memory {step}, bytes", "", MOST_MEMORY) for step in ("renamed", "copied")),
            Goal("read renamed, bytes", "", MOVED * large.bytes + _MODULES),
            Goal("grown renamed, bytes", "", MOVED * large.bytes),
            Goal("grown copied, bytes", "", MOVED * small.bytes),
        ),
        end_of_round=away,
        reads=True,
        keep=True,
    )
