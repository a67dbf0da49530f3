"""What a service holds at one moment, in a form that two moments can be compared by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything a service holds: a digest for each thing in it."""

    summary: str
    """For people: `24,000 rows in 3 tables`."""
    things: dict[str, str]
    """Name -> digest of its whole content."""

    def differences(self, other: Picture) -> list[str]:
        """The names of what is not the same in both, sorted."""
        return sorted(
            name for name in self.things.keys() | other.things.keys()
            if self.things.get(name) != other.things.get(name)
        )  # fmt: skip


def digest(*parts: object) -> str:
    """SHA-256 over the parts, each with its length, so that ("ab", "c") is not ("a", "bc")."""
    made = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        made.update(b"%d:" % len(data))
        made.update(data)
    return made.hexdigest()
