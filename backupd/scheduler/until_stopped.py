"""Run until a signal says stop, and end in good order."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack

from backupd.scheduler.loop import Scheduler


def run_until_stopped(
    scheduler: Scheduler,
    *,
    grace: float = 5.0,
    abandon: float = 4.0,
    beside: Iterable[AbstractContextManager[object]] = (),
) -> int:
    """Start, and go on until SIGTERM or SIGINT; the exit code. Must be called in the main thread.

    What is at work then has `grace` seconds to finish and `abandon` more to stop (both together should be
    less than what the orchestrator grants: `docker stop` kills after 10). The code is 0 when all of it did, 1
    when something had to be cut off. A second signal ends the process at once, with 130. `beside` is entered
    before the start and left after the end: the health page.
    """
    # A handler that sets a threading.Event can find the main thread holding the event's own lock; a byte in a
    # socket cannot.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    count = 0

    def handle(_signal: int, _frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(130)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        with ExitStack() as stack:
            for manager in beside:
                stack.enter_context(manager)
            scheduler.start()
            while not count:
                reader.recv(1)  # another signal's byte wakes it, too
            clean = scheduler.stop(grace=grace, abandon=abandon)
        if not clean:
            # Threads that do not listen would keep the interpreter from ending. All that counts is on disk.
            logging.shutdown()
            os._exit(1)
        return 0
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
