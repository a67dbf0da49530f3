"""PostgreSQL's own programs, where they can be run: in a server's container, or on this machine.

Secrets and where to connect go through the environment; argv holds names only.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from backupd.drivers import _process
from backupd.drivers.postgres_sql import conninfo, first_error, hint_for
from backupd.errors import BackupdError, CommandFailed, ContainerError, UsageError
from backupd.model import Container

Answers: TypeAlias = list[Any]

QUIET = {"PGCONNECT_TIMEOUT": "10", "PGAPPNAME": "backupd", "LC_MESSAGES": "C", "LANGUAGE": "C"}
"""Connect within 10 s or fail; say so in English, so that hints can be given."""
PSQL = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1")


BUFFERED = 'command -v stdbuf >/dev/null && exec stdbuf -o1M "$@"; exec "$@"'
"""pg_dump writes pieces of 4 KiB, and each passes three processes of the engine: larger ones come 1.3 to 1.7
times as fast. An image without stdbuf (Alpine) does without."""


class Client(Protocol):
    """Somewhere PostgreSQL's programs can be run against one server."""

    @property
    def where(self) -> str:
        """The server, for people. Never holds a secret."""

    @property
    def databases(self) -> Sequence[str]:
        """Databases to try for questions about the whole server, in this order."""

    def run(
        self,
        program: str,
        *args: str,
        database: str,
        stdin: Iterable[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[bytes]:
        """Run `program --dbname=<database> ...`; stdout in chunks. Raises CommandFailed at the end."""


class InContainer:
    """The programs of the server's own image, over its own socket: of the right version by nature."""

    def __init__(self, container: Container, *, user: str | None = None, password: str | None = None) -> None:
        self._container = container
        self._user = user
        self._password = password
        self._env: dict[str, str] | None = None

    @property
    def where(self) -> str:
        return f"container {self._container.name}"

    @property
    def databases(self) -> Sequence[str]:
        return "postgres", "template1"

    def run(
        self,
        program: str,
        *args: str,
        database: str,
        stdin: Iterable[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[bytes]:
        argv = [program, f"--dbname={conninfo({'dbname': database})}", *args]
        if program == "pg_dump":
            argv = ["sh", "-c", BUFFERED, "sh", *argv]
        try:
            yield from self._container.exec(argv, stdin=stdin, env={**self._environment(), **(env or {})})
        except CommandFailed as error:
            if argv[0] != program:
                error.message = error.message.replace(argv[0], program, 1)
            raise

    def credentials(self) -> dict[str, str]:
        """Who we are, in libpq's words: as configured, else as the image was told when it made the server."""
        user = self._user or self._told("POSTGRES_USER") or "postgres"
        password = self._password or self._told("POSTGRES_PASSWORD")
        return {"user": user, **({"password": password} if password else {})}

    def _environment(self) -> dict[str, str]:
        if self._env is None:
            self._env = {**QUIET, **{f"PG{key.upper()}": value for key, value in self.credentials().items()}}
        return self._env

    def _told(self, name: str) -> str:
        given = self._container.env
        if given.get(name):
            return given[name]
        if given.get(f"{name}_FILE"):
            with contextlib.suppress(CommandFailed):  # a secret that was taken away since
                content = b"".join(self._container.exec(["cat", given[f"{name}_FILE"]]))
                return content.decode(errors="replace").strip()
        return ""


class OnThisMachine:
    """Programs installed here, against a server reached by URL."""

    def __init__(
        self, url: str, *, user: str | None = None, password: str | None = None, folder: Path | None = None
    ) -> None:
        self._env, self._more, self._database = _from_url(url, user, password)
        self._folder = folder
        host = self._env.get("PGHOST", "localhost")
        port = self._env.get("PGPORT")
        self.where = f"{host}:{port}" if port else host

    @property
    def databases(self) -> Sequence[str]:
        """The one in the URL first: a role may be let in there only."""
        return tuple(dict.fromkeys((*([self._database] if self._database else []), "postgres", "template1")))

    def using(self, folder: Path) -> OnThisMachine:
        """The same server, with the programs of `folder`."""
        other = object.__new__(OnThisMachine)
        other.__dict__ = {**self.__dict__, "_folder": folder}
        return other

    def run(
        self,
        program: str,
        *args: str,
        database: str,
        stdin: Iterable[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[bytes]:
        path = str(self._folder / program) if self._folder else program
        target = f"--dbname={conninfo({'dbname': database, **self._more})}"
        yield from _process.run(
            [path, target, *args],
            stdin=stdin,
            env={**QUIET, **self._env, **(env or {})},
            hint="install PostgreSQL's client programs, or name the server's container instead of its url",
        )


def _from_url(url: str, user: str | None, password: str | None) -> tuple[dict[str, str], dict[str, str], str]:
    """Environment, further parameters, database. libpq reads the URL itself, and names the variables."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        given = {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}
    except psycopg.Error as error:
        raise UsageError(
            "the url of a PostgreSQL source cannot be read", hint="postgresql://user@host:port/database"
        ) from error
    if user:
        given["user"] = user
    if password:
        given["password"] = password
    variables = {
        option.keyword.decode(): option.envvar.decode()
        for option in psycopg.pq.Conninfo.get_defaults()
        if option.envvar
    }
    database = given.pop("dbname", "")
    env = {variables[key]: value for key, value in given.items() if key in variables}
    more = {key: value for key, value in given.items() if key not in variables}
    if "sslpassword" in more:
        raise UsageError("sslpassword would be seen in the list of processes", hint="use a key without one")
    # A server that vanished without a word: libpq would wait two hours for it.
    keepalives = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3"}
    return env, {**keepalives, **more}, database


# --- versions --------------------------------------------------------------------------------------------

FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
_VERSION = re.compile(r"(\d+)(?:\.|devel|beta|rc|\b)")


def installed_clients() -> dict[int, Path]:
    """Major version -> folder of a pg_dump of it. Versioned folders go before PATH, where a wrapper may stand."""
    folders = [path for pattern in FOLDERS for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    on_path = [Path(part) for part in os.get_exec_path() if (Path(part) / "pg_dump").exists()]
    found: dict[int, Path] = {}
    for folder in [*folders, *on_path]:
        program = shutil.which("pg_dump", path=str(folder))
        if program is None:
            continue
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        number = _VERSION.search(said)
        if number:
            found.setdefault(int(number.group(1)), folder)
    return found


def choose_client(installed: Mapping[int, Path], server: int) -> int | None:
    """The server's own major version, else the next newer; an older pg_dump refuses."""
    return min((major for major in installed if major >= server), default=None)


# --- questions -------------------------------------------------------------------------------------------


class Session:
    """A psql kept open: one connection for several questions, and for the transaction that holds a snapshot."""

    def __init__(self, client: Client, database: str) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._output = client.run(
            "psql",
            *PSQL,
            database=database,
            stdin=iter(self._lines.get, None),
            env={"PGCLIENTENCODING": "UTF8"},
        )
        self._rest = b""
        self._marks: list[bytes] = []

    def ask(self, sql: str) -> None:
        """Send a question; the server works on it while others are busy elsewhere."""
        mark = f"backupd-{secrets.token_hex(8)}"
        self._marks.append(mark.encode())
        self._lines.put(f"{sql.strip()}\n\\echo {mark}\n".encode())

    def answers(self) -> Answers:
        """The JSON values that answer the oldest open question. Raises CommandFailed."""
        mark = self._marks.pop(0)
        found: list[bytes] = []
        while True:
            *lines, self._rest = self._rest.split(b"\n")
            for number, line in enumerate(lines):
                if line == mark:
                    self._rest = b"\n".join([*lines[number + 1 :], self._rest])
                    return [json.loads(text.decode(errors="replace")) for text in found]
                if line:
                    found.append(line)
            chunk = next(self._output, None)
            if chunk is None:
                raise CommandFailed("psql ended before it had answered")
            self._rest += chunk

    def one(self, sql: str) -> Any:
        """The single answer to one question."""
        self.ask(sql)
        (answer,) = self.answers()
        return answer

    def close(self, *, well: bool = True) -> None:
        """End it; the transaction is rolled back. Not `well`: at once, whatever it is doing."""
        self._lines.put(None)
        if well:
            with contextlib.suppress(CommandFailed):
                for _ in self._output:
                    pass
        close = getattr(self._output, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def session(client: Client, database: str) -> Iterator[Session]:
    """A session that ends with the block."""
    opened = Session(client, database)
    try:
        yield opened
    except BaseException:
        opened.close(well=False)
        raise
    opened.close()


def ask_server(client: Client, sql: str) -> tuple[Any, str]:
    """Ask about the whole server, through the first database that lets us in: the answer, and which it was."""
    failure: CommandFailed | None = None
    for database in client.databases:
        try:
            with session(client, database) as opened:
                return opened.one(sql), database
        except CommandFailed as error:
            failure = failure or error
            if f'database "{database}" does not exist' not in error.stderr:
                raise
    raise failure or CommandFailed("no database to connect to")


def script(client: Client, database: str, sql: str) -> None:
    """Run statements up to the first that fails. Raises CommandFailed with that statement in its stderr."""
    lines = [sql.encode(errors="surrogateescape")]
    exhaust(client.run("psql", *PSQL, "--echo-errors", database=database, stdin=lines))


def exhaust(chunks: Iterable[bytes]) -> None:
    """Wait for the end of a program whose output does not matter."""
    for _ in chunks:
        pass


@contextlib.contextmanager
def failing_as(kind: type[BackupdError], what: str) -> Iterator[None]:
    """A program that ended badly, or a container that is not there, fails as `kind` with the first error."""
    try:
        yield
    except CommandFailed as error:
        told = first_error(error.stderr) if error.stderr else error.message
        raise kind(f"{what}: {told}", hint=error.hint or hint_for(error.stderr)) from error
    except ContainerError as error:
        raise kind(f"{what}: {error.message}", hint=error.hint) from error
