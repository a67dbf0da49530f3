"""What a Redis server keeps of its history because it is not stored yet, and until when. Pure.

Two stores of its memory hold it. The backlog (`repl-backlog-size`) is there anyway and holds the last of what was
written, for whoever comes back. The output buffer holds what a replica that is connected has not taken yet; since
Redis 7 the two share their bytes. A replica whose buffer grows beyond `client-output-buffer-limit replica` is cut off,
and has what the backlog has; one that is behind by more than the backlog has lost what lies between.
Sources: redis.conf, and `checkClientOutputBufferLimits`, `masterTryPartialResynchronization` of Redis 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupd.model import LogSpan
from backupd.retained import Retained

SETTING = "client-output-buffer-limit"


@dataclass(frozen=True, slots=True)
class Held:
    """What a recorder of this process has of a server's history, stored or not."""

    epoch: str
    received: int
    """Position."""
    linked: bool
    """The server still sends to it."""
    unsent: int
    """Bytes that the server was ahead of what came, at most, lately."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far behind a replica may be before the server cuts it off, in bytes; 0 is no limit."""

    hard: int
    soft: int
    """For some seconds (`client-output-buffer-limit replica <hard> <soft> <seconds>`)."""

    @classmethod
    def of_setting(cls, words: str) -> Limits | None:
        """`normal 0 0 0 slave 268435456 67108864 60 pubsub ...`; None where it cannot be read."""
        found = words.split()
        at = next((n for n, word in enumerate(found) if word in ("replica", "slave")), len(found))
        numbers = found[at + 1 : at + 3]
        if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
            return None
        return cls(int(numbers[0]), int(numbers[1]))

    @property
    def least(self) -> int:
        """0: there is none."""
        return min(filter(None, (self.hard, self.soft)), default=0)


def retained_by(
    link: Mapping[str, str], limits: Limits | None, since: LogSpan | None, held: Held | None
) -> Retained | None:
    """`link`: INFO replication. `limits`: None where they are not known. `since`: up to where the log is stored;
    None of a stranger, who takes what a replica says that is as we are. `held`: None where no recorder is at work
    here; one elsewhere may have more than is stored, and then this says less room than there is."""
    position = int(link.get("master_repl_offset", "0"))
    stored = _stored(link, since)
    if stored is None:
        return None
    if stored < 0:
        return Retained(0, 0, lost=True, setting=SETTING)
    has, unsent = stored, None
    linked = bool(_like_us(link))
    if held is not None:
        linked, unsent = held.linked, held.unsent if held.linked else 0
        if _continues(link, held.epoch, held.received):
            has = max(stored, held.received)
    size, behind = max(0, position - stored), max(0, position - has)
    first = int(link.get("repl_backlog_first_byte_offset", "0"))
    if not linked and has + 1 < first:
        return Retained(size, 0, lost=True, setting=SETTING)
    room = int(link.get("repl_backlog_size", "0"))
    if linked and limits is not None:
        if not limits.least:
            return Retained(size, None, setting=SETTING, unsent=unsent)
        room = max(room, limits.least)
    return Retained(size, max(0, room - behind), setting=SETTING, unsent=unsent)


def _stored(link: Mapping[str, str], since: LogSpan | None) -> int | None:
    """As a position of the server's present history; negative where it is none, None where it is not known."""
    if since is not None:
        return since.end if _continues(link, since.epoch, since.end) else -1
    return min(_like_us(link), default=None)


def _continues(link: Mapping[str, str], epoch: str, position: int) -> bool:
    """Whether the server's history goes on from there: its own, or that of a master before it."""
    if epoch == link.get("master_replid"):
        return True
    # second_repl_offset is the first that the other history does not have
    return epoch == link.get("master_replid2") and position < int(link.get("second_repl_offset", "-1"))


def _like_us(link: Mapping[str, str]) -> list[int]:
    """What replicas have acknowledged that receive the stream and gave no port, as a recorder does and no server:
    `slave0:ip=10.0.0.7,port=0,state=online,offset=123,lag=1`."""
    found = []
    for name, value in link.items():
        if name.startswith("slave") and name[5:].isdigit():
            about = dict(part.split("=", 1) for part in value.split(",") if "=" in part)
            acknowledged = about.get("offset", "")
            if about.get("port") == "0" and about.get("state") == "online" and acknowledged.isdigit():
                found.append(int(acknowledged))
    return [acknowledged for acknowledged in found if acknowledged]
