"""Whose log it is: one running server's at a time.

Two copies of a server that are recorded under one name would write two histories into one log, and either's window
would end there. So a recorder says which running server it reads before it stores anything, and a small object beside
the log keeps that: the first has it.

The log is its holder's heartbeat. Even of an idle source something is stored once a minute, so nothing is put only to
stay alive; a claim whose log stood still for `SILENT` seconds, by the clock of who watches it, falls to the next one.
On the same running server an agent goes on at once, after whatever end of the one before: there the server keeps two
apart (a slot has room for one), or sends both the same (a replication stream).

It needs no conditions on writes, and so cannot keep out two copies that come in one instant, until one looks again
after `LOOK` seconds; nor a piece that was on its way when its writer was given up. Right behind a gap an idle recorder
has nothing to store, and counts as silent. Where two histories overlap, `verify` and every restore tell.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from backupd.errors import Locked, ObjectExists, ObjectMissing, StoreError
from backupd.model import LogSpan
from backupd.repository import Repository
from backupd.stores.leases import owner_name

log = logging.getLogger(__name__)

SILENT = 90.0
"""Seconds: half as much again as the longest that a recorder at work stores nothing."""
LOOK = 30.0
"""Seconds between two looks of one that stores something. One that does not, does not look."""


@dataclass(frozen=True, slots=True)
class Held:
    """What stands in the object."""

    owner: str
    """For people; unique, as two agents in one process are two. Empty: let go."""
    server: str


class Claim:
    """An agent's, of one source's log, for as long as the agent lives. Used by one thread at a time."""

    def __init__(self, source: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._source, self._now = source, now
        self._mine = Held(owner_name(), "")
        self._looked = 0.0
        self._watched: tuple[Held, list[LogSpan]] | None = None
        self._since = 0.0  # when what is watched was seen first

    def take(self, repository: Repository, server: str) -> None:
        """The log is this server's from here on. Raises Locked where it is another's that is recorded now, or may be.
        Asked again and again, it falls free once nothing comes any more."""
        self._mine = Held(self._mine.owner, "")
        held = self._read(repository)
        if held is not None and self._is_anothers(held, server) and not self._is_silent(repository, held):
            raise self._taken(held)
        mine = Held(self._mine.owner, server)
        with contextlib.suppress(ObjectExists):  # then another was quicker
            self._write(repository, mine, new=held is None)
        after = self._read(repository)
        if after is not None and self._is_anothers(after, server):
            raise self._taken(after)
        self._mine, self._looked, self._watched = mine, self._now(), None

    def check(self, repository: Repository) -> None:
        """Before something is stored. Raises Locked where another server has the log now."""
        if not self._mine.server or self._now() - self._looked < LOOK:
            return
        held = self._read(repository)
        if held is None or not held.owner or self._is_anothers(held, self._mine.server):
            self.take(repository, self._mine.server)
        self._looked = self._now()

    def release(self, repository: Repository) -> None:
        """At the end in good order: the next one need not wait. A store out of reach does not matter: then it waits."""
        server, self._mine = self._mine.server, Held(self._mine.owner, "")
        with contextlib.suppress(StoreError):
            held = self._read(repository) if server else None
            if held is not None and held.owner == self._mine.owner:
                self._write(repository, Held("", ""), new=False)

    def _is_anothers(self, held: Held, server: str) -> bool:
        return bool(held.owner) and held.owner != self._mine.owner and held.server != server

    def _is_silent(self, repository: Repository, held: Held) -> bool:
        """Whether the log has stood still for long enough while it was watched."""
        spans, _ = repository.logs(self._source)
        now = self._now()
        if self._watched != (held, spans):
            self._watched, self._since = (held, spans), now
        if now - self._since < SILENT:
            return False
        log.warning("nothing came for %g s from %s, which recorded %s: it is taken over", SILENT, held.owner,
                    self._source)  # fmt: skip
        return True

    def _taken(self, held: Held) -> Locked:
        return Locked(
            f"another server is recorded as {self._source} now, by the agent {held.owner}",
            hint=f"is this a copy? give it another name; an agent that died is given up after {SILENT:.0f} s",
        )

    def _read(self, repository: Repository) -> Held | None:
        """None where there is none; one that cannot be read is nobody's."""
        try:
            said = json.loads(repository.claim(self._source))
            return Held(str(said["owner"]), str(said["server"]))
        except ObjectMissing:
            return None
        except (ValueError, TypeError, KeyError, RecursionError):
            return Held("", "")

    def _write(self, repository: Repository, held: Held, *, new: bool) -> None:
        repository.put_claim(self._source, json.dumps(asdict(held)).encode(), new=new)
