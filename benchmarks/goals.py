"""What is asked of backupd's figures: at most so many times a peer's, or at most so many bytes or seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MOST_MEMORY = 100e6


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure by its name ("full, s"). Without a peer `most` is the figure itself, not a ratio."""

    what: str
    peer: str
    most: float


def usual(changes: Mapping[str, float], *, many_files: bool = False) -> Iterator[Goal]:
    """Those that hold for every corpus; `changes`: step -> the share of restic's bytes that it may grow by.

    Unchanged against tar is asked of many files: five are looked at by tar before an interpreter has started."""
    restore = "restore"
    yield Goal("full, s", "tar|zstd", 1.0)
    yield Goal("full, s", "restic", 0.27)
    yield Goal("unchanged, s", "restic", 0.1)
    if many_files:
        yield Goal("unchanged, s", "tar|zstd", 0.9)
    for step, share in changes.items():
        yield Goal(f"{step}, s", "restic", 0.2)
        yield Goal(f"grown {step}, bytes", "restic", share)
    yield Goal(f"{restore}, s", "restic", 0.4)
    yield Goal(f"{restore}, s", "tar|zstd", 0.5)
    yield Goal("repository, bytes", "restic", 0.93)
    yield from (
        Goal(f"memory {step}, bytes", "", MOST_MEMORY) for step in ("full", "unchanged", *changes, restore)
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal beside what was measured."""

    goal: Goal
    reached: float

    @property
    def met(self) -> bool:
        return self.reached <= self.goal.most

    def line(self) -> str:
        what, reached, most = self.goal.what, f"{self.reached:.3f}", f"{self.goal.most:g}"
        if not self.goal.peer and what.endswith("bytes"):
            what, reached, most = (
                what.replace(", bytes", ", MB"),
                f"{self.reached / 1e6:,.2f}",
                f"{self.goal.most / 1e6:g}",
            )
        against = f"backupd / {self.goal.peer}" if self.goal.peer else "backupd"
        return f"{against:20} {what:34} {reached:>9}  goal {most}: {'met' if self.met else 'MISSED'}"

    def row(self) -> dict[str, object]:
        goal = self.goal
        return {
            "what": goal.what,
            "peer": goal.peer,
            "reached": self.reached,
            "goal": goal.most,
            "met": self.met,
        }


def judge(
    goals: Iterator[Goal] | tuple[Goal, ...], middle: Mapping[str, Mapping[str, float]]
) -> list[Verdict]:
    """Each goal whose figures were measured; a peer that was left out is judged by nothing."""
    ours = middle.get("backupd", {})
    found = []
    for goal in goals:
        if goal.what not in ours:
            continue
        if not goal.peer:
            found.append(Verdict(goal, ours[goal.what]))
        elif middle.get(goal.peer, {}).get(goal.what):
            found.append(Verdict(goal, ours[goal.what] / middle[goal.peer][goal.what]))
    return found
