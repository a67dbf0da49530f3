"""The slot that keeps a server's log until it is stored, and who may record through it."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from backupd.drivers.postgres_replication import Server, ServerRefused, position_of, talking
from backupd.retained import Retained

if TYPE_CHECKING:
    from psycopg import Connection

SLOT = """
SELECT restart_lsn::text, active, wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = %s
"""
RETAINED = """
SELECT coalesce(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
         - restart_lsn, 0)::bigint, safe_wal_size, wal_status = 'lost'
FROM pg_replication_slots WHERE slot_name = %s
"""
HOLD = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
HOLDER = """
SELECT a.pid, a.usename = current_user AND a.state_change < clock_timestamp()
    - CASE current_setting('wal_sender_timeout') WHEN '0' THEN interval '1 minute'
      ELSE current_setting('wal_sender_timeout')::interval END
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended(%s, 0)
"""


def slot_name(source: str) -> str:
    """A name the server takes: [a-z0-9_], at most 63. A source whose own name is none gets a digest behind it."""
    plain = re.sub(r"[^a-z0-9_]", "_", source.lower())
    if plain != source or len(plain) > 40:
        plain = f"{plain[:40]}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return f"backupd_{plain}"


def ensure_slot(server: Server, name: str) -> int:
    """The position that the slot holds; made where it is missing, made anew where its WAL was given up."""
    with talking(), contextlib.closing(server.connect()) as sql, server.replicate() as wire:
        found = sql.execute(SLOT, [name]).fetchone()
        if found is not None and found[2] and not found[1]:
            wire.drop_slot(name)
            found = None
        if found is None:
            wire.create_slot(name)
            found = sql.execute(SLOT, [name]).fetchone()
    if found is None or found[0] is None:
        raise ServerRefused(
            f"the replication slot {name} holds no WAL", hint="is it of another kind? drop it"
        )
    return position_of(str(found[0]))


@contextlib.contextmanager
def holding(sql: Connection[tuple[Any, ...]], slot: str) -> Iterator[None]:
    """Be the one recorder of the slot. Raises ServerRefused where another is.

    The slot itself excludes others only while its log is streamed, and a busy server is left now and then. Who fell
    silent is put out after the time in which the server ends a stream that nobody reads.
    """
    row = sql.execute(HOLD, [slot]).fetchone()
    if row is None or not row[0]:
        raise _is_held(sql, slot)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # a connection that is gone holds nothing
            sql.execute("SELECT pg_advisory_unlock_all()")


def _is_held(sql: Connection[tuple[Any, ...]], slot: str) -> ServerRefused:
    holder = sql.execute(HOLDER, [slot]).fetchone()
    if holder is None:
        return ServerRefused(
            f"replication slot {slot} was in use just now", hint="it is tried again by itself"
        )
    pid, silent = holder
    if silent:
        sql.execute("SELECT pg_terminate_backend(%s)", [pid])
    return ServerRefused(f"replication slot {slot} is active for PID {pid}")


def is_recorded(sql: Connection[tuple[Any, ...]], slot: str) -> bool:
    """Whether somebody records through the slot now, from wherever."""
    return sql.execute(HOLDER, [slot]).fetchone() is not None


def ask_to_store(sql: Connection[tuple[Any, ...]], slot: str, position: int) -> None:
    """Tell the slot's recorder, whatever process it is in, that somebody waits for the log up to here: it does not
    let its interval pass. A standby passes nothing on; then it does."""
    with contextlib.suppress(ServerRefused), talking():
        sql.execute("SET synchronous_commit TO local")  # a word to ourselves waits for no standby
        sql.execute("SELECT pg_notify(%s, %s)", [slot, str(position)])


def retained_by(server: Server, name: str) -> Retained | None:
    """What the slot holds back; None where there is none. Raises ServerRefused."""
    with talking(), contextlib.closing(server.connect()) as sql:
        row = sql.execute(RETAINED, [name]).fetchone()
    if row is None:
        return None
    size, room, lost = row
    return Retained(max(0, int(size)), None if room is None else max(0, int(room)), bool(lost))
