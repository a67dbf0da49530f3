"""Everything that is raised on purpose.

An error says what happened (`message`), and what to do next (`hint`). The exit code belongs to the class:
it is documented, and a code that was once given away is never given another meaning. Only `cli` exits.
"""

from __future__ import annotations


class BackupdError(Exception):
    """Something failed."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(BackupdError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class RepositoryMissing(BackupdError):
    """There is no repository at the location."""

    exit_code = 10


class Locked(BackupdError):
    """Another agent holds the lease."""

    exit_code = 11


class WrongKey(BackupdError):
    """The repository cannot be opened with this key."""

    exit_code = 12


class CaptureFailed(BackupdError):
    """A source could not be captured; no recovery point was made."""

    exit_code = 20


class NoRecoveryPoint(BackupdError):
    """No recovery point reaches the instant that was asked for."""

    exit_code = 21


class Damaged(BackupdError):
    """What is stored is not what was written."""

    exit_code = 22


class DrillFailed(BackupdError):
    """A drill restored something other than what was captured."""

    exit_code = 23


class RestoreFailed(BackupdError):
    """A restore did not end well; what it made so far must not be used."""

    exit_code = 1


class Interrupted(BackupdError):
    """The run was told to stop."""

    exit_code = 130


class StoreError(BackupdError):
    """The store refused, or could not be reached."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", transient: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.transient = transient  # trying again may help


class ObjectMissing(StoreError):
    """There is no object under this key."""


class ObjectExists(StoreError):
    """The store already holds an object under this key and `put` never replaces in silence."""


class CommandFailed(BackupdError):
    """A program ended badly."""

    def __init__(self, message: str, *, hint: str = "", returncode: int = 1, stderr: str = "") -> None:
        super().__init__(message, hint=hint)
        self.returncode = returncode
        self.stderr = stderr


class ContainerError(BackupdError):
    """The container engine refused, or a container is not what it must be."""
