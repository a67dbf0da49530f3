"""One capture of a PostgreSQL server: its snapshots, its programs, what they gave."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from backupd.drivers.postgres_client import (
    Client,
    OnThisMachine,
    Session,
    ask_server,
    choose_client,
    failing_as,
    installed_clients,
    session,
)
from backupd.drivers.postgres_sql import (
    CLOCK,
    DATABASE,
    LIVE,
    ROLES,
    ROWS,
    SETTINGS,
    SNAPSHOT,
    database_facts,
    instant,
    is_named_awkwardly,
    whole_facts,
)
from backupd.errors import CaptureFailed, CommandFailed
from backupd.model import Capture, Json, Problem, RecoveryPoint, Stream, Streams

GLOBALS = "globals.sql"
SUFFIX = ".dump"
AT_ONCE = 16
"""Snapshots held from the start. Each is a connection, and a server has a hundred."""
OLDEST = 13
"""Major version: what the server is asked, and DROP DATABASE .. WITH (FORCE), need it."""
CLOCK_SKEW = 5.0
EMPTY = Problem(
    "the server holds no table at all",
    hint="is it the right one, and is its data directory mounted where its image keeps it?",
    fatal=False,
)


@dataclass(frozen=True, slots=True)
class Source:
    """What is captured, and how to get there."""

    connect: Callable[[], Client]
    """May raise ContainerError or UsageError."""
    image: Callable[[], str] = str
    """The image of the server's container; empty where it is reached by URL."""
    databases: Sequence[str] | None = None
    facts: bool = True
    lock_timeout: float = 60.0
    """Seconds that a dump waits for a table somebody has locked."""

    @property
    def patience(self) -> str:
        """`lock_timeout` as PostgreSQL reads it."""
        return f"{round(self.lock_timeout * 1000)}ms"

    def find(self) -> tuple[Client, dict[str, Any]]:
        """A client that fits the server, and what the server says of itself. Raises CommandFailed."""
        client = self.connect()
        if not isinstance(client, OnThisMachine):
            live, through = ask_server(client, LIVE)
            return client, {**live, "through": through, "client": live["version"] // 10000}
        installed = installed_clients()
        if not installed:
            raise CommandFailed(
                "PostgreSQL's client programs are not installed here",
                hint="install them, or name the server's container instead of its url",
            )
        live, through = ask_server(client.using(installed[max(installed)]), LIVE)
        major = live["version"] // 10000
        chosen = choose_client(installed, major)
        if chosen is None:
            raise CommandFailed(
                f"the newest pg_dump here is {max(installed)}, the server is {major}: too old to dump it",
                hint=f"install postgresql-client-{major}, or name the server's container instead of its url",
            )
        return client.using(installed[chosen]), {**live, "through": through, "client": chosen}

    def chosen(self, live: Mapping[str, Any]) -> list[str]:
        """The databases to dump, sorted. Raises CommandFailed for one that is not there."""
        there: Mapping[str, Any] = live["databases"]
        if self.databases is None:
            return sorted(name for name, of in there.items() if of["connect"])
        missing = [name for name in self.databases if name not in there]
        if missing:
            raise CommandFailed(
                f"there is no database {', '.join(missing)} on this server",
                hint=f"there are {', '.join(sorted(there))}",
            )
        return sorted(set(self.databases))

    def shortcomings(self, live: Mapping[str, Any]) -> list[Problem]:
        """What a backup of this server will lack, or may."""
        found = []
        if live["version"] < OLDEST * 10000:
            found.append(
                Problem(
                    f"PostgreSQL {live['server_version']} is too old", f"{OLDEST} and later are supported"
                )
            )
        if not live["reads_passwords"]:
            found.append(
                Problem(
                    f"the role {live['user']} may not read passwords: roles will be restored without them",
                    "back up as a superuser to have them",
                    fatal=False,
                )
            )
        if live["client"] > live["version"] // 10000:
            found.append(
                Problem(
                    f"pg_dump {live['client']} is newer than the server: restored into PostgreSQL {live['client']}",
                    f"install postgresql-client-{live['version'] // 10000} on this machine",
                    fatal=False,
                )
            )
        for name, of in sorted(live["databases"].items()):
            if self.databases is None and not of["connect"]:
                why = (
                    "this role may not connect to it" if of["valid"] else "its DROP DATABASE was interrupted"
                )
                found.append(
                    Problem(
                        f"the database {name} is left out: {why}", "GRANT CONNECT, or drop it", fatal=False
                    )
                )
        return found


# --- one capture -----------------------------------------------------------------------------------------


class Dump:
    """One capture at work: its sessions, its programs, what they gave."""

    def __init__(self, source: Source, held: ExitStack) -> None:
        self._source = source
        self._held = held
        self._sessions: dict[str, Session] = {}
        self._snapshots: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, dict[str, Json]] = {}
        self._left: list[str] = []
        self._details: dict[str, Json] = {}

    def begin(self) -> None:
        """Connect, take the snapshots, and say what will come."""
        self._client, self._live = self._source.find()
        names = self._source.chosen(self._live)
        self._left = [GLOBALS, *names]
        for name in names[:AT_ONCE]:
            self._open(name)
        live = self._live
        attributes: dict[str, Json] = {
            "server_version": live["server_version"],
            "major": live["version"] // 10000,
            "client_major": live["client"],
            "image": self._source.image(),
            "superuser": live["bootstrap"],
            "preload": live["preload"] or "",
            "system_identifier": live["system_identifier"],
            "standby": live["recovery"],
            "tablespaces": live["tablespaces"],
            "passwords": live["reads_passwords"],
            "databases": self._details,
        }
        instants = [instant(of["instant"]) for of in self._snapshots.values()]
        self.capture = Capture(
            content=Streams(self._streams(names)),
            instant=min(instants, default=instant(live["clock"])),
            attributes=attributes,
            warnings=[problem.message for problem in self._source.shortcomings(live)],
        )
        skew = (instant(live["clock"]) - datetime.now(UTC)).total_seconds()
        if abs(skew) > CLOCK_SKEW:
            self.capture.warnings.append(f"the server's clock is {skew:+.0f} s off this machine's")

    def _open(self, name: str) -> Session:
        """A session that holds a snapshot of this database, until it is closed."""
        opened = Session(self._client, name)
        self._held.callback(opened.close, well=False)
        opened.ask(SETTINGS.format(lock_timeout=self._source.patience))
        opened.ask(CLOCK)
        opened.ask(SNAPSHOT)
        opened.answers()
        (clock,) = opened.answers()
        (snapshot,) = opened.answers()
        self._sessions[name] = opened
        self._snapshots[name] = {**clock, **snapshot}
        return opened

    def _streams(self, names: Sequence[str]) -> Iterator[Stream]:
        yield Stream(GLOBALS, self._reading(GLOBALS, self._globals()))
        for name in names:
            yield Stream(quote(name, safe="") + SUFFIX, self._reading(name, self._database(name)))

    def _reading(self, what: str, chunks: Generator[bytes, None, None]) -> Iterator[bytes]:
        """`chunks`, ended with the capture, failing as a capture does."""
        with failing_as(CaptureFailed, f"the dump of {what} failed"):
            self._held.callback(chunks.close)
            yield from chunks
            self._left.remove(what)

    def _globals(self) -> Generator[bytes, None, None]:
        """pg_dumpall cannot be given a snapshot: it is run again until nobody changed a role meanwhile."""
        args = [
            "--globals-only",
            f"--lock-wait-timeout={self._source.patience}",
            f"--database={self._live['through']}",  # it looks for none in --dbname
        ]
        if not self._live["reads_passwords"]:
            args.append("--no-role-passwords")
        through = self._live["through"]
        with session(self._client, through) as opened:
            for _ in range(5):
                before = opened.one(ROLES)
                script = b"".join(self._client.run("pg_dumpall", *args, database=through))
                if opened.one(ROLES) == before:
                    break
        self.capture.facts.update(before)
        yield script

    def _database(self, name: str) -> Generator[bytes, None, None]:
        opened = self._sessions.pop(name, None) or self._open(name)
        about = opened.one(DATABASE)
        if self._source.facts:
            opened.ask(ROWS)  # the server counts while it dumps; both read the same pages
        args = [
            "--format=custom",
            "--compress=0",
            f"--snapshot={self._snapshots[name]['snapshot']}",
            f"--lock-wait-timeout={self._source.patience}",
        ]
        if self._live["recovery"]:
            args.append("--no-unlogged-table-data")  # a standby has none
        if is_named_awkwardly(name, about["encoding"]):
            self.capture.warnings.append(
                f"rights, comment and settings of the database {name} itself are not kept: its name is not "
                f"ASCII and its encoding is {about['encoding']}"
            )
        yield from self._client.run("pg_dump", *args, database=name)
        rows = opened.answers() if self._source.facts else None
        opened.close()
        of = self._snapshots[name]
        self._details[name] = {
            "instant": instant(of["instant"]).isoformat(),
            "lsn": of["lsn"],
            **{key: about[key] for key in ("owner", "encoding", "collate", "ctype")},
            "extensions": about["extensions"],
        }
        self._measured[name] = database_facts(about, rows)

    def finish(self, since: RecoveryPoint | None) -> None:
        """The facts, once every stream was read to its end. Raises CaptureFailed where one was not, or where a
        server that held tables holds none."""
        if self._left:
            raise CaptureFailed(f"not everything was dumped: {', '.join(self._left)} is missing")
        whole = whole_facts(self._measured)
        if not whole["tables"]:
            self.capture.warnings.append(EMPTY.message)
            if since is not None and since.facts.get("tables"):
                raise CaptureFailed(
                    "the server holds no table at all; it held "
                    f"{since.facts['tables']} on {since.instant:%Y-%m-%d %H:%M} UTC",
                    hint=f"{EMPTY.hint} If it is meant to be empty, run `backupd backup --allow-shrink` once",
                )
        self.capture.facts.update(whole)
        if not self._source.facts:
            self.capture.facts.clear()
