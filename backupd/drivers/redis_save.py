"""The server's own save (BGSAVE), awaited and not believed: its status and its count are compared."""

from __future__ import annotations

import re
import time
from datetime import datetime

from backupd.drivers.redis_wire import Connection, RedisError
from backupd.errors import CaptureFailed


def save(server: Connection, *, pause: float = 0.05) -> datetime:
    """Have the server save, and wait for it. An instant that the saved state is not older than.

    A save that is under way may have forked before we came: it is awaited, and another one taken.
    """
    while True:
        state = _settled(server, pause)
        last = server.call("LASTSAVE")
        before = server.time()
        if "rdb_saves" not in state and isinstance(last, int) and int(before.timestamp()) <= last:
            time.sleep(
                0.2
            )  # before 7.0 only LASTSAVE tells, in whole seconds: ours must fall into a later one
            continue
        try:
            server.call("BGSAVE")
            break
        except RedisError as error:
            if not re.search("already in progress|child process", error.message):
                raise CaptureFailed(
                    error.message, hint=error.hint or "its log says why: is there memory for a fork?"
                ) from error
            time.sleep(pause)
    after = _settled(server, pause)
    if after.get("rdb_last_bgsave_status") != "ok":
        raise CaptureFailed(
            f"BGSAVE failed on the Redis server at {server.address}",
            hint="its log says why: is its data directory writable, its disk full? source_of_rdb = 'wire' "
            "needs no disk",
        )
    saved = int(after.get("rdb_saves", "0")) > int(state.get("rdb_saves", "0"))
    now_last = server.call("LASTSAVE")
    if not saved and not (isinstance(last, int) and isinstance(now_last, int) and now_last > last):
        raise CaptureFailed("the server says that it saved, and has not", hint="its log says why")
    return before


def _settled(server: Connection, pause: float) -> dict[str, str]:
    """INFO persistence, once no save is under way; no time limit, for the server keeps answering."""
    while True:
        state = server.info("persistence")
        if state.get("loading") == "1":
            raise RedisError("the Redis server is still loading its data", hint="try again later")
        if state.get("rdb_bgsave_in_progress") == "0":
            return state
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
