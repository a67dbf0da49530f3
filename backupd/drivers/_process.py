"""Run a program of this machine and stream it: no shell, no secret in argv, no bad end taken for a good one.

A stream that stops early looks like one that is complete. So the exit status is awaited after the last byte,
and raised there: whoever reads to the end knows that the program ended well.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from backupd.errors import CommandFailed
from backupd.sandbox.said import Said, ended_badly

READ = 1 << 20
GRACE = 2.0  # seconds between asking a program to end and making it


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: Iterable[bytes] | None = None,
    hint: str = "",
) -> Iterator[bytes]:
    """Start `argv` and yield its stdout. Nothing is started before the first chunk is asked for.

    `env` is added to this process's environment: that is where secrets go. `stdin` is read by another
    thread; when it raises, the program is ended and the same exception is raised here. Closing the iterator
    early ends the program and everything it started.

    Raises CommandFailed at the end when the program ended badly, or at once (with `hint`) when there is none.
    """
    process = _start(argv, env, feed=stdin is not None, hint=hint)
    output = cast("io.FileIO", process.stdout)  # bufsize=0
    said = _Listener(cast("io.FileIO", process.stderr))
    feeder = _Feeder(process, stdin) if stdin is not None else None
    ended = False
    try:
        buffer = bytearray(READ)
        view = memoryview(buffer)
        while size := output.readinto(buffer):
            yield bytes(view[:size])
        status = process.wait()
        ended = True
    finally:
        if not ended:
            _end(process)
        output.close()
        if feeder is not None:
            feeder.finish()
        said.finish()
    if feeder is not None and feeder.error is not None:
        raise feeder.error
    if status != 0:
        raise ended_badly(Path(argv[0]).name, status, said.text)


def _start(
    argv: Sequence[str], env: Mapping[str, str] | None, *, feed: bool, hint: str
) -> subprocess.Popen[bytes]:
    try:
        process = subprocess.Popen(
            list(argv),
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a group of its own, so that all of it can be ended
        )
    except FileNotFoundError:
        raise CommandFailed(
            f"there is no program {argv[0]}", hint=hint or "install it, or put it on PATH", returncode=127
        ) from None
    except OSError as error:
        raise CommandFailed(
            f"{argv[0]} cannot be started: {error.strerror}", hint=hint, returncode=126
        ) from None
    with contextlib.suppress(OSError, AttributeError):  # 64 KiB by default: 16 times as many switches
        fcntl.fcntl(cast("io.FileIO", process.stdout).fileno(), fcntl.F_SETPIPE_SZ, READ)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and all it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind
        return


class _Listener:
    """Drains stderr, so that the program never waits for a reader."""

    def __init__(self, pipe: io.FileIO) -> None:
        self._pipe = pipe
        self._said = Said()
        self._thread = threading.Thread(target=self._drain, name="stderr", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk := self._pipe.read(8192):
                self._said.add(chunk)

    @property
    def text(self) -> str:
        return self._said.text

    def finish(self) -> None:
        self._thread.join(timeout=GRACE)  # a grandchild may hold the pipe open
        if not self._thread.is_alive():
            self._pipe.close()


class _Feeder:
    """Writes an iterable to the program's stdin, then closes it."""

    def __init__(self, process: subprocess.Popen[bytes], chunks: Iterable[bytes]) -> None:
        self._process = process
        self._chunks = chunks
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._feed, name="stdin", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        pipe = cast("io.FileIO", self._process.stdin)
        try:
            for chunk in self._chunks:
                if not _write(pipe, chunk):
                    break  # the program stopped reading: its exit status says whether that is right
        except BaseException as error:  # noqa: BLE001  handed to the thread that reads
            self.error = error
            # Before stdin is closed: the program must not take half of its input for the whole.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        finally:
            with contextlib.suppress(OSError):
                pipe.close()
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()

    def finish(self) -> None:
        self._thread.join(timeout=0.5)  # it may be waiting for its own source; it is a daemon


def _write(pipe: io.FileIO, chunk: bytes) -> bool:
    """True when all of it was taken; a raw pipe may take less at a time."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[pipe.write(view) :]
    except OSError:
        return False
    return True
