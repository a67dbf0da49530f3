"""What `check` finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from backupd.errors import BackupdError
from backupd.model import Problem


class Finding(NamedTuple):
    """What `check` found at one place."""

    where: str
    problems: tuple[Problem, ...] = ()
    detail: str = ""

    @property
    def fatal(self) -> bool:
        return any(p.fatal for p in self.problems)


def found_at(where: str, probe: Callable[[], Sequence[Problem]]) -> Finding:
    """What `probe` found, or failed by."""
    try:
        return Finding(where, tuple(probe()))
    except BackupdError as error:
        return Finding(where, (Problem(error.message, error.hint),))
