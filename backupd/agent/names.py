"""Names on a command line."""

from __future__ import annotations

from collections.abc import Iterable

from backupd.config import Config, closest
from backupd.errors import UsageError


def expand(names: Iterable[str], config: Config, known: Iterable[str]) -> list[str]:
    """Stacks as their sources; each name once, in order. Raises UsageError for what is neither, with the
    nearest name that is."""
    known = list(known)
    found: list[str] = []
    unknown: list[str] = []
    for name in names:
        if name in config.stacks:
            found += config.stacks[name].sources
        elif name in known:
            found.append(name)
        else:
            unknown.append(name)
    if unknown:
        there = [*known, *config.stacks]
        hints = dict.fromkeys(closest(name, there) for name in unknown)
        raise UsageError(
            f"there is no source or stack {', '.join(map(repr, unknown))}",
            hint=" ".join(filter(None, hints)) or f"there are {', '.join(there)}",
        )
    return list(dict.fromkeys(found))
