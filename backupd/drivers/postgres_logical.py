"""PostgreSQL, mode dump: every database by pg_dump from an exported snapshot, and the globals.

**Instant.** In each database one REPEATABLE READ transaction takes a snapshot, exports it to pg_dump, and counts
rows in it; the server's clock is read just before. So everything acknowledged before that instant is in the
dump. Several databases have a snapshot each, taken one right after the other before the first dump begins
(of more than sixteen databases, the others' when their turn comes); the point's instant is the earliest of
them, which holds for all, and each one's own stands in `attributes["databases"]`. The globals (roles) are as
of a moment later.

**Format.** `pg_dump -Fc -Z0`: not compressed, because then an unchanged table is unchanged bytes.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from backupd.drivers.postgres_client import (
    Client,
    InContainer,
    OnThisMachine,
    ask_server,
    exhaust,
    failing_as,
    script,
    session,
)
from backupd.drivers.postgres_dump import EMPTY, GLOBALS, SUFFIX, Dump, Source
from backupd.drivers.postgres_sql import (
    DATABASE,
    LIVE,
    ROLES,
    ROWS,
    SETTINGS,
    SNAPSHOT,
    USED,
    create_database,
    database_facts,
    first_error,
    globals_for,
    hint_for,
    identifier,
    is_named_awkwardly,
    number,
    whole_facts,
)
from backupd.errors import BackupdError, CaptureFailed, CommandFailed, RestoreFailed
from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Driver,
    Facts,
    Json,
    Problem,
    RecoveryPoint,
)

if TYPE_CHECKING:
    from backupd.config.models import PostgresSource
    from backupd.sandbox.docker import Engine


def from_config(source: PostgresSource, engine: Engine) -> Driver:
    """The driver for a source of the configuration, by its mode."""
    if str(source.mode) == "pitr":
        from backupd.drivers import postgres_physical

        return postgres_physical.from_config(source, engine)
    password = source.password.get_secret_value() if source.password else None
    name, url, user = source.container, source.url, source.user

    def connect() -> Client:
        if name is not None:
            return InContainer(engine.container(name), user=user, password=password)
        return OnThisMachine(url or "", user=user, password=password)

    def image() -> str:
        return engine.container(name).image if name is not None else ""

    return PostgresLogical(Source(connect, image, databases=source.databases, facts=source.facts))


class PostgresLogical:
    """Captures and restores one PostgreSQL server by its own dump programs."""

    kind = "postgres"

    def __init__(self, source: Source) -> None:
        self._source = source

    # --- capture -------------------------------------------------------------------------------------

    def capture(self, since: RecoveryPoint | None) -> AbstractContextManager[Capture]:
        """Dump every database of its snapshot. Raises CaptureFailed with the server's reason and a hint."""
        return self._capture(since)

    @contextlib.contextmanager
    def _capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:
        with ExitStack() as held:
            with failing_as(CaptureFailed, "PostgreSQL cannot be captured"):
                work = Dump(self._source, held)
                work.begin()
            yield work.capture
            work.finish(since)

    # --- restore -------------------------------------------------------------------------------------

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """The captured container's image, else the official one; with the same bootstrap superuser."""
        of = point.attributes
        # A newer pg_dump writes what only a server of its own version is sure to read.
        major = max(number(of.get("major")), number(of.get("client_major"))) or 16
        image = str(of.get("image") or f"postgres:{major}")
        user = str(of.get("superuser") or "postgres")
        preload = str(of.get("preload") or "")
        return ContainerSpec(
            image=image,
            command=("postgres", "-c", f"shared_preload_libraries={preload}") if preload else (),
            env={
                "POSTGRES_USER": user,
                "POSTGRES_PASSWORD": secrets.token_urlsafe(24),
                "POSTGRES_DB": "postgres",
            },
            # From 18 on the image keeps its data in a directory of its version below.
            volumes=("/var/lib/postgresql" if major >= 18 else "/var/lib/postgresql/data",),
            port=5432,
            # Over TCP: the server that only sets up the directory answers on its socket alone.
            ready=("pg_isready", "--quiet", "--host=127.0.0.1", f"--username={user}"),
        )

    def load(self, archive: Archive, container: Container) -> None:
        """Roles, then each database with its owner, encoding and rights; stops at the first error.

        Raises RestoreFailed when the server already holds tables, functions or large objects of somebody, or
        with the first error and its statement.
        """
        with failing_as(RestoreFailed, f"PostgreSQL in {container.name} cannot be restored"):
            client = InContainer(container)
            live, _ = ask_server(client, LIVE)
            _refuse_if_used(client, live)
            members = [member.name for member in archive.members() if member.name.endswith((SUFFIX, ".sql"))]
            if GLOBALS in members:
                self._load_globals(client, b"".join(archive.read(GLOBALS)))
            for name in members:
                if name.endswith(SUFFIX):
                    database = unquote(name.removesuffix(SUFFIX))
                    about = _mapping(_mapping(archive.point.attributes.get("databases")).get(database))
                    self._load_database(client, live, database, about, archive.read(name))

    def _load_globals(self, client: Client, content: bytes) -> None:
        roles, _ = ask_server(client, ROLES)
        # pg_dumpall writes in the encoding of the database it connects to; UTF-8 unless somebody chose so
        text = globals_for(content.decode(errors="surrogateescape"), roles["roles"])
        with failing_as(RestoreFailed, "the roles cannot be restored"):
            script(client, "template1", text)

    def _load_database(
        self,
        client: Client,
        live: Mapping[str, Any],
        database: str,
        about: Mapping[str, Json],
        dump: Iterable[bytes],
    ) -> None:
        with failing_as(RestoreFailed, f"the database {database!r} cannot be restored"):
            if database in live["databases"]:
                # The empty one every fresh server has: looked into above. Only made anew does it get its
                # encoding, locale, owner and settings.
                script(client, "template1", f"DROP DATABASE {identifier(database)} WITH (FORCE);\n")
            args = ["--exit-on-error", "--no-tablespaces"]
            if about and is_named_awkwardly(database, str(about["encoding"])):
                script(client, "template1", create_database(database, about))
                exhaust(client.run("pg_restore", *args, database=database, stdin=dump))
            else:
                exhaust(client.run("pg_restore", "--create", *args, database="template1", stdin=dump))

    # --- facts and check -----------------------------------------------------------------------------

    def facts(self, container: Container) -> Facts:
        """The same measurement as at capture, each database in a snapshot of its own. Raises CommandFailed."""
        client = InContainer(container)
        live, through = ask_server(client, LIVE)
        wanted = self._source.databases
        names = [n for n, of in live["databases"].items() if of["connect"] and (not wanted or n in wanted)]
        with session(client, through) as opened:
            facts: dict[str, Json] = {**opened.one(ROLES)}
        measured = {}
        for name in sorted(names):
            with session(client, name) as opened:
                opened.ask(SETTINGS.format(lock_timeout=self._source.patience))
                opened.ask(SNAPSHOT)
                opened.ask(DATABASE)
                opened.ask(ROWS)
                opened.answers()
                opened.answers()
                (about,) = opened.answers()
                measured[name] = database_facts(about, opened.answers())
        return {**facts, **whole_facts(measured)}

    def check(self) -> Sequence[Problem]:
        """Reached, let in, dumped by a program that is new enough, and not empty."""
        try:
            client, live = self._source.find()
            names = self._source.chosen(live)
            tables = sum(_tables(client, name) for name in names)
        except CommandFailed as error:
            told = first_error(error.stderr) if error.stderr else error.message
            return [Problem(told, error.hint or hint_for(error.stderr))]
        except BackupdError as error:
            return [Problem(error.message, error.hint)]
        return [*self._source.shortcomings(live), *([] if tables else [EMPTY])]


# --- a fresh server -----------------------------------------------------------------------------------


def _refuse_if_used(client: Client, live: Mapping[str, Any]) -> None:
    """A restore never overwrites. Raises RestoreFailed for a server that is not fresh."""
    for name, of in sorted(live["databases"].items()):
        if not of["connect"]:
            continue
        with session(client, name) as opened:
            facts = database_facts(opened.one(DATABASE), None)
        held = [f"{facts[key]} {key.replace('_', ' ')}" for key in USED if facts[key]]
        if held:
            raise RestoreFailed(
                f"the server already holds data: {', '.join(held)} in the database {name}",
                hint="restore into a fresh container: --to sandbox",
            )


def _tables(client: Client, database: str) -> int:
    with session(client, database) as opened:
        kinds = opened.one(DATABASE)["kinds"]
    return int(kinds.get("r", 0)) + int(kinds.get("p", 0))


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, dict) else {}
