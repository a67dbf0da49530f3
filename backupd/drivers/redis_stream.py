"""What a Redis server sends its replicas: commands, one after the other, byte for byte. Pure.

Positions are replication offsets: bytes since the server's history began. Everything that is sent counts, also PING and
`REPLCONF GETACK`. A command that makes several writes (a transaction, a script) is sent between MULTI and EXEC, and is
no state of the server before its EXEC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from backupd.errors import Damaged

_ANSWER = re.compile(r"\+(FULLRESYNC|CONTINUE)(?: ([0-9a-f]{40}))?(?: (\d+))?")


@dataclass(frozen=True, slots=True)
class Moment:
    """A server's clock and its position, read in one transaction: everything executed before `at`, and nothing else,
    lies before `position`."""

    at: datetime
    epoch: str
    """The replication id."""
    position: int
    current: bool = True
    """False of a replica that has lost its master: what it holds is older than its clock says."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says to PSYNC."""

    continues: bool
    """What follows is the stream from where it was asked for; else a dump comes first."""
    epoch: str = ""
    """Empty: the one that was asked for."""
    position: int = 0
    """Of the dump."""

    @classmethod
    def of_line(cls, line: str) -> Answer | None:
        """`+CONTINUE`, `+CONTINUE <id>` after a failover, `+FULLRESYNC <id> <offset>`; None for anything else."""
        found = _ANSWER.fullmatch(line.strip())
        if found is None:
            return None
        return cls(found[1] == "CONTINUE", found[2] or "", int(found[3] or 0))


def complete(log: bytes | bytearray, start: int = 0) -> int:
    """The end of the last whole command outside a transaction, reading from `start`, where a command begins.

    Raises Damaged where there is none.
    """
    find, length = log.find, len(log)
    good = at = start
    inside = False
    try:
        while (end := find(b"\r\n", at)) >= 0:
            if log[at] != 0x2A:  # *
                raise ValueError
            count, at = int(log[at + 1 : end]), end + 2
            name = at
            for _ in range(count):
                end = find(b"\r\n", at)
                if end < 0:
                    return good
                if log[at] != 0x24:  # $
                    raise ValueError
                at = end + 4 + int(log[at + 1 : end])
            if at > length:
                return good
            if log[at - 2 : at] != b"\r\n":
                raise ValueError
            inside = _inside(bytes(log[name : name + 16]), inside)
            if not inside:
                good = at
    except ValueError:
        raise Damaged(f"the replication stream has no command at byte {at}") from None
    return good


def _inside(head: bytes, before: bool) -> bool:
    """Whether a transaction is open behind a command, by its first bytes."""
    if head.startswith(b"$5\r\n"):
        return before or head[4:11].upper() == b"MULTI\r\n"
    if head.startswith(b"$4\r\n"):
        return before and head[4:10].upper() != b"EXEC\r\n"
    return before


def select(database: int) -> bytes:
    """The command that says which database the commands that follow mean."""
    number = str(database).encode()
    return b"*2\r\n$6\r\nSELECT\r\n$%d\r\n%s\r\n" % (len(number), number)
