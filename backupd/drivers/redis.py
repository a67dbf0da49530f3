"""Redis and Valkey: the dump (RDB) that the server itself makes, checked as it passes.

Three ways to get it, `auto` takes the first that is there:
  file        BGSAVE, then the file in the data directory that this process can read
  container   BGSAVE, then the same file through the container engine
  wire        as a replica receives it: no file access, nothing is written to the server's disk
A dump holds everything that the server acknowledged before the recovery point's instant.

The smallest sets of rights (an ACL user sees all data by them, whatever its key patterns):
  wire              ACL SETUSER backupd on >PASSWORD -@all +ping +time +info +config|get +psync +replconf
  file, container   ACL SETUSER backupd on >PASSWORD -@all +ping +time +info +config|get +bgsave +lastsave

Facts: keys without a time to live, per database, as they were at the instant of the fork; and function
libraries. Keys that expire are not compared: they may rightly be gone by the time of a restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from backupd.drivers._tarstream import first_file
from backupd.drivers.rdb import RdbCheck, RdbSummary, checked
from backupd.drivers.redis_aof import Replay, bring_back_log
from backupd.drivers.redis_fit import format_of, modules
from backupd.drivers.redis_home import DATA, bring_back, loading, reach
from backupd.drivers.redis_save import save
from backupd.drivers.redis_wire import Connection, RedisAddress, RedisError
from backupd.errors import BackupdError, CaptureFailed, ContainerError, RestoreFailed
from backupd.model import (
    Archive,
    Capture,
    Clock,
    Container,
    ContainerSpec,
    Driver,
    Facts,
    Json,
    Problem,
    RecoveryPoint,
    Stream,
    Streams,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from backupd.config.models import RedisSource
    from backupd.drivers.redis_live import RedisStanding
    from backupd.sandbox.docker import Engine

MEMBER = "dump.rdb"
_CHUNK = 1 << 20
_OLDEST = 4
_CLOCKS_APART = timedelta(seconds=2)
_TICK = timedelta(milliseconds=100)
"""A dump dates itself, in whole seconds, by the kernel's coarse clock, which lags by up to a tick (1 to 10 ms): one
made at 40.003 may say 39."""


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where a server is and how its dump is read. `address` may be None where there is a container."""

    address: RedisAddress | None = None
    way: str = "auto"
    path: Path | None = None
    username: str = ""
    password: str = field(default="", repr=False)
    facts: bool = True


def from_config(source: RedisSource, engine: Engine) -> Driver:
    """The driver for a source of the configuration, by its mode."""
    made = _dumps(source, engine)
    if str(source.mode) == "pitr":
        from backupd.drivers.redis_pitr import RedisPitr

        return RedisPitr(made)
    return made


def _dumps(source: RedisSource, engine: Engine) -> RedisDriver:
    password = source.password.get_secret_value() if source.password else ""
    username = source.username or ""
    address = RedisAddress.of_url(source.url, username=username, password=password) if source.url else None
    settings = RedisSettings(
        address,
        source.source_of_rdb,
        source.path,
        username or (address.username if address else ""),
        password or (address.password if address else ""),
        source.facts,
    )
    name = source.container
    return RedisDriver(settings, container=(lambda: engine.container(name)) if name else None)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class RedisDriver:
    """Captures and restores one Redis server."""

    kind = "redis"

    def __init__(
        self,
        settings: RedisSettings,
        *,
        container: Callable[[], Container] | None = None,
        clock: Clock = _utc_now,
        keeps: bool = False,
    ) -> None:
        self._settings = settings
        self._container = container
        self._clock = clock
        self.keeps = keeps
        """Whether a restore keeps what has expired since its instant."""

    # --- capture

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:  # noqa: ARG002  a dump stands alone
        """Have the server make a dump, and hand it out while it is checked. Raises CaptureFailed."""
        with failing_as(CaptureFailed), self.connect() as server:
            container = self.container()
            expected = _databases(server)
            check = RdbCheck(count=self._settings.facts, expected=expected)
            before, chunks = self._dump(server, container)
            capture = Capture(content=Streams(()), instant=before)
            capture.attributes.update(describe(server, container))
            capture.warnings += self.clock_warnings(server)
            whole: list[RdbSummary] = []

            def done(summary: RdbSummary) -> None:
                _note(capture, summary, before, expected if self._settings.facts else None)
                whole.append(summary)

            with closing(reading_dump(chunks)) as reading, closing(checked(reading, check, done)) as passing:
                capture.content = Streams([Stream(MEMBER, passing)])
                yield capture
            if not whole:
                raise CaptureFailed("the dump was not read to its end", hint="back up again")

    def _over_wire(self, container: Container | None) -> bool:
        way = self._settings.way
        return way == "wire" or (way == "auto" and self._settings.path is None and container is None)

    def _dump(self, server: Connection, container: Container | None) -> tuple[datetime, Iterator[bytes]]:
        """An instant that the dump is not older than, and its bytes."""
        if self._over_wire(container):
            return server.time(), _wired(server)
        found = server.config("dir", "dbfilename")
        name = found.get("dbfilename", MEMBER)
        before = save(server)
        if self._settings.way != "container" and self._settings.path is not None:
            return before, _contents(_open(self._settings.path / name))
        if container is None:
            raise CaptureFailed(
                f"the dump cannot be read by way of {self._settings.way!r}: "
                f"no {'path' if self._settings.way == 'file' else 'container'} is given",
                hint="give it, or take source_of_rdb = 'wire'",
            )
        directory = found.get("dir", DATA)
        mounted = container.mount(directory)
        if mounted is not None and _readable(mounted / name):
            return before, _contents(_open(mounted / name))
        return before, _from_container(container, f"{directory.rstrip('/')}/{name}")

    def clock_warnings(self, server: Connection) -> list[str]:
        """Where the server's clock is not this one's."""
        apart = abs(self._clock() - server.time())
        if apart <= _CLOCKS_APART:
            return []
        return [f"the server's clock and this one are {apart.total_seconds():.0f} s apart"]

    def container(self) -> Container | None:
        """The one the server runs in, where that is known."""
        return self._container() if self._container else None

    def connect(self) -> Connection:
        """To the source. Raises RedisError, ContainerError."""
        settings = self._settings
        if settings.address is not None:
            return Connection(settings.address)
        if self._container is None:
            raise RedisError("a Redis source needs an address", hint="give url or container")
        container = self._container()
        if not container.running:
            raise RedisError(f"container {container.name} is not running", hint="start it")
        host, port = container.address(6379)
        return Connection(RedisAddress(host, port, username=settings.username, password=settings.password))

    # --- restore

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        """The source's own image where it is known, else the newest of its major version."""
        about = point.attributes
        image = str(about.get("image") or "") or _image(about)
        directory = str(about.get("dir") or DATA) if about.get("image") else DATA
        server = "valkey-server" if about.get("server") == "valkey" else "redis-server"
        command = [server]
        if directory != DATA:
            command += ["--dir", directory]
        if about.get("appendonly"):
            command += ["--appendonly", "yes"]
        databases = about.get("databases")
        if isinstance(databases, int) and databases > 16:
            command += ["--databases", str(databases)]  # else it refuses a dump with a higher one
        cli = server.replace("server", "cli")
        return ContainerSpec(
            image=image,
            command=tuple(command),
            volumes=(directory,),
            port=6379,
            # while it loads, the client ends with 0 and prints LOADING
            ready=("sh", "-c", f"{cli} ping | grep -qE 'PONG|NOAUTH'"),
            load_while="stopped",
        )

    def load(self, archive: Archive, container: Container) -> None:
        """Lay the dump where the server looks for it, with the append-only file on or off.

        Raises RestoreFailed where the container holds data already, or what has expired cannot be kept; then nothing
        was changed.
        """
        size = next((m.size for m in archive.members() if m.name == MEMBER), None)
        if size is None:
            raise RestoreFailed(
                "this recovery point holds no dump.rdb", hint="is it one of a redis source? see backupd list"
            )
        base = size, archive.read(MEMBER)
        with failing_as(RestoreFailed):
            if self.keeps:
                alone = Replay(archive.point, None, alone=True)
                bring_back_log(container, self.credentials(), base, alone, (), keep=True)
            else:
                bring_back(container, self.credentials(), archive.point.attributes, *base)

    def keeping(self) -> RedisDriver:
        """Implements `live.ExpiringDriver`."""
        return RedisDriver(self._settings, container=self._container, clock=self._clock, keeps=True)

    def starting(self, container: Container) -> str:
        """Implements `waiting.StartingDriver`: a large dump takes minutes to load."""
        return loading(container, self.credentials())

    def facts(self, container: Container) -> Facts:
        """What the server in a restored container holds, once it has loaded. Raises RestoreFailed."""
        if not self._settings.facts:
            return {}
        with failing_as(RestoreFailed), reach(container, self.credentials(), timeout=3600) as server:
            return _measured(server)

    @property
    def alone(self) -> RedisDriver:
        """Itself: a dump stands alone."""
        return self

    def standing(self) -> AbstractContextManager[RedisStanding]:
        """The configured server, its clients' writes held. Raises RestoreFailed."""
        from backupd.drivers.redis_live import standing

        measure = _measured if self._settings.facts else lambda _server: {}
        return standing(self.connect, measure, keep=self.keeps)

    def credentials(self) -> RedisAddress:
        """User and password alone: they hold for a restored server too."""
        return RedisAddress(username=self._settings.username, password=self._settings.password)

    # --- check

    def check(self) -> Sequence[Problem]:
        """Reachable, of a supported version, its file readable? Touches nothing."""
        try:
            with self.connect() as server:
                return [*self.whole_problems(server), *self._file_problems(server)]
        except BackupdError as error:
            return [Problem(error.message, error.hint)]

    def whole_problems(self, server: Connection) -> Iterator[Problem]:
        """Of the server, however its dump is read."""
        about = server.info("server")
        version = about.get("redis_version", "")
        if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < _OLDEST:
            yield Problem(
                f"Redis {version or 'of unknown version'} is too old", f"{_OLDEST}.0 or newer is needed"
            )
        if server.info("cluster").get("cluster_enabled") == "1":
            yield Problem(
                "this server is one node of a cluster", "make each master a source of its own", fatal=False
            )
        link = server.info("replication")
        if link.get("role") == "slave" and link.get("master_link_status") != "up":
            yield Problem("this replica has lost its master", "what it holds may be old", fatal=False)

    def _file_problems(self, server: Connection) -> Iterator[Problem]:
        if self._over_wire(self.container()):
            return
        if server.info("persistence").get("rdb_last_bgsave_status") == "err":
            yield Problem("the server's last BGSAVE failed", "its log says why: disk full, or not writable?")
        path = self._settings.path
        if path is None:
            return
        name = server.config("dbfilename").get("dbfilename", MEMBER)
        if not path.is_dir():
            yield Problem(f"{path} is no directory", "path is the server's data directory, as seen from here")
        elif (path / name).exists() and not _readable(path / name):
            yield Problem(
                f"{path / name} may not be read",
                "run the agent with the server's group, or take source_of_rdb = 'wire'",
            )


# --- the dump's bytes -----------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    """Opened at once: the next save renames another file over this one, and leaves this one whole."""
    try:
        return path.open("rb")
    except OSError as error:
        raise CaptureFailed(
            f"cannot read {path}: {error.strerror}",
            hint="path is the server's data directory, readable from here; source_of_rdb = 'wire' needs none",
        ) from error


def _contents(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _from_container(container: Container, path: str) -> Iterator[bytes]:
    try:
        yield from first_file(container.read(path))
    except (ContainerError, FileNotFoundError) as error:
        raise CaptureFailed(
            f"cannot read {path} in {container.name}: {error}", hint="take source_of_rdb = 'wire'"
        ) from error


def reading_dump(chunks: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Errors of the server, of a file and of the engine in the middle of a dump end the capture."""
    try:
        yield from chunks
    except OSError as error:
        raise CaptureFailed(f"the dump could not be read: {error}", hint="back up again") from error
    except RedisError as error:
        raise CaptureFailed(error.message, hint=error.hint) from error


def _wired(server: Connection) -> Iterator[bytes]:
    """Asked for with the first chunk: until then the connection takes other commands."""
    yield from server.dump()[1]


def _readable(path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


# --- what was captured ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """One line of INFO keyspace."""

    keys: int
    expiring: int

    @classmethod
    def of_info(cls, line: str) -> Counts:
        """`keys=4,expires=1,avg_ttl=0`."""
        pairs = dict(pair.split("=", 1) for pair in line.split(",") if "=" in pair)
        return cls(int(pairs.get("keys", 0)), int(pairs.get("expires", 0)))


def _databases(server: Connection) -> list[int]:
    names = server.info("keyspace")
    return [int(name[2:]) for name in names if name.startswith("db") and name[2:].isdigit()]


def _facts(lasting: Mapping[str, int], functions: int) -> dict[str, Json]:
    counted: dict[str, Json] = {name: n for name, n in sorted(lasting.items()) if n}
    return {"persistent_keys": counted, "functions": functions}


def _measured(server: Connection) -> Facts:
    counts = {name.removeprefix("db"): Counts.of_info(line) for name, line in server.info("keyspace").items()}
    return _facts({name: c.keys - c.expiring for name, c in counts.items()}, _functions(server))


def _functions(server: Connection) -> int:
    try:
        libraries = server.call("FUNCTION", "LIST")
    except RedisError:  # before 7.0 there are none
        return 0
    return len(libraries) if isinstance(libraries, list) else 0


def _note(capture: Capture, summary: RdbSummary, before: datetime, expected: Sequence[int] | None) -> None:
    """What the dump says of itself. Raises CaptureFailed where it is not the one that was made."""
    created = summary.created
    if created is not None and created.timestamp() < math.floor((before - _TICK).timestamp()):
        raise CaptureFailed(
            f"the dump that was read is of {created:%Y-%m-%dT%H:%M:%SZ}, older than the save just made",
            hint="path must be the data directory of this very server",
        )
    if created is not None:
        capture.instant = max(before, created)
    if not summary.checksum:
        capture.warnings.append("the dump has no checksum (rdbchecksum no): damage in it would go unseen")
    capture.attributes |= format_of(summary)
    if expected is not None and (summary.complete or summary.databases.keys() >= set(expected)):
        lasting = {str(n): d.keys - d.expiring for n, d in summary.databases.items()}
        capture.facts.update(_facts(lasting, summary.functions))
        capture.attributes["expiring_keys"] = {
            str(n): d.expiring for n, d in sorted(summary.databases.items()) if d.expiring
        }


def describe(server: Connection, container: Container | None) -> dict[str, Json]:
    """What a restore must know of a server."""
    about = server.info("server")
    settings = server.config("dir", "dbfilename", "databases")
    memory = server.info("memory")
    databases = settings.get("databases", "")
    loaded: list[Json] = [*modules(server.text("INFO", "modules"))]
    return {
        "server": about.get("server_name", "redis"),
        "version": about.get("valkey_version") or about.get("redis_version", ""),
        "image": container.image if container else "",
        "dir": settings.get("dir", "") if container else "",
        "dbfilename": settings.get("dbfilename", MEMBER),
        "databases": int(databases) if databases.isdigit() else 0,
        "appendonly": server.info("persistence").get("aof_enabled") == "1",
        "maxmemory": int(memory.get("maxmemory", "0")),
        **({"modules": loaded} if loaded else {}),
    }


def _image(about: Mapping[str, Json]) -> str:
    major = str(about.get("version") or "7").partition(".")[0]
    return f"valkey/valkey:{major}" if about.get("server") == "valkey" else f"redis:{major}"


@contextmanager
def failing_as(kind: type[BackupdError]) -> Iterator[None]:
    """A server's refusal becomes the failure of what was being done."""
    try:
        yield
    except (RedisError, ContainerError) as error:
        raise kind(error.message, hint=error.hint) from error
