"""Let a container stand still for a moment, and make sure that it goes on, whatever becomes of this process.

Three nets: the context itself; a timer, should the work inside hang; and a note on disk, written before the
pause and removed after it, from which the next start of an agent lets go what a killed one left paused.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from backupd.errors import BackupdError, CaptureFailed, ContainerError
from backupd.model import Container

LIMIT = 60.0
"""Seconds after which a pause ends by itself, and what was copied during it is worth nothing."""
_TRIES = 5


def default_notes() -> Path:
    """Where notes of pauses are kept: beside the agent's other state."""
    from platformdirs import user_state_path

    return user_state_path("backupd") / "paused"


@contextlib.contextmanager
def paused(container: Container, notes: Path, *, limit: float = LIMIT) -> Iterator[None]:
    """Pause; unpause at the end, always. Raises CaptureFailed where the pause had to be ended early, or where no
    note can be written: then nothing was paused."""
    note = notes / container.name
    try:
        notes.mkdir(parents=True, exist_ok=True)
        note.write_text("backupd paused this container\n")
    except OSError as error:
        raise CaptureFailed(
            f"cannot note in {notes} that {container.name} is paused: {error.strerror}",
            hint="without a note a killed agent could leave it paused: make the directory writable",
        ) from error
    expired = threading.Event()

    def end_early() -> None:
        expired.set()
        with contextlib.suppress(BackupdError):
            container.unpause()

    timer = threading.Timer(limit, end_early)
    timer.daemon = True
    try:
        _pause(container)
    except BaseException:
        note.unlink(missing_ok=True)  # somebody else's pause is not ours to end
        raise
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        if not expired.is_set():
            container.unpause()
        note.unlink(missing_ok=True)
    if expired.is_set():
        raise CaptureFailed(
            f"{container.name} was paused for {limit:.0f} s and the copy was not done",
            hint="put staging on a faster disk, or take quiesce = 'lock'",
        )


def _pause(container: Container) -> None:
    """A busy kernel sometimes does not freeze every process in time; then the engine has let all of them go."""
    for left in reversed(range(_TRIES)):
        try:
            container.pause()
            return
        except ContainerError as error:
            if not left or "already paused" in error.message:
                raise
        time.sleep(0.2)


def release(container: Container, notes: Path) -> bool:
    """Unpause this one if a killed agent left it paused."""
    note = notes / container.name
    if not note.exists():
        return False
    with contextlib.suppress(ContainerError):  # not paused any more
        container.unpause()
    note.unlink(missing_ok=True)
    return True


def release_left(notes: Path, container: Callable[[str], Container]) -> list[str]:
    """Unpause what a killed agent left paused; their names. A container that is gone is forgotten."""
    released = []
    for note in sorted(notes.glob("*")) if notes.is_dir() else ():
        try:
            left = container(note.name)
        except ContainerError:  # it is gone
            note.unlink(missing_ok=True)
            continue
        if release(left, notes):
            released.append(note.name)
    return released
