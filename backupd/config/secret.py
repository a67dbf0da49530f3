"""A value that must not be seen."""

from __future__ import annotations

_MASK = "**********"


class Secret:
    """Holds a password. Printing it, or whatever holds it, shows a mask; a traceback with locals does too."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """The value; on its way to whom it is meant for, and nowhere else."""
        return self._value

    def __str__(self) -> str:
        return _MASK if self._value else ""

    def __repr__(self) -> str:
        return f"Secret('{self}')"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)
