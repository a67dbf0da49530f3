"""Let a container stand still for a moment, and make sure that it goes on, whatever becomes of this process.

Three nets: the context itself; a timer, should the work inside hang; and a note on disk, written before the
pause and removed after it, from which the next start of an agent lets go what a killed one left paused.
"""

from __future__ import annotations

import contextlib
import fcntl
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
        held = note.open("w")  # locked until the end: whose agent lives is not released by another's start
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.write("backupd paused this container\n")
        held.flush()
    except BlockingIOError:
        raise CaptureFailed(
            f"another backup has {container.name} paused", hint="wait until that one is done"
        ) from None
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
    with held:
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
    """Unpause this one if a killed agent left it paused. The note stays while the engine cannot be asked."""
    note = notes / container.name
    try:
        with note.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                container.unpause()
            except ContainerError as error:
                if "not paused" not in error.message:
                    raise
            note.unlink(missing_ok=True)
    except (FileNotFoundError, BlockingIOError):  # nothing was left; or an agent is at it at this moment
        return False
    return True


def release_left(notes: Path, container: Callable[[str], Container]) -> list[str]:
    """Unpause what a killed agent left paused; their names. A container that is gone is forgotten.

    Raises ContainerError where the engine cannot be asked; what is left paused is then still known.
    """
    released = []
    for note in sorted(notes.glob("*")) if notes.is_dir() else ():
        try:
            left = container(note.name)
        except ContainerError as error:
            if "no such container" not in error.message.lower():
                raise
            note.unlink(missing_ok=True)
            continue
        if release(left, notes):
            released.append(note.name)
    return released
