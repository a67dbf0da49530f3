"""What a configuration may say. `read` knows what the types of keys mean; `load` applies the defaults and makes
paths absolute."""

# Without postponed annotations: the types are read at run time, and need not be looked up again then.

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from backupd.config.secret import Secret
from backupd.config.table import REQUIRED, Table, key
from backupd.config.values import Mistaken
from backupd.retention import Policy

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

ENVIRONMENT = "the environment"
"""The origin of a configuration without a file."""

Schedule: TypeAlias = Annotated[str, "schedule"]
Zone: TypeAlias = Annotated[str, "zone"]


class RepositoryConfig(Table):
    """Where recovery points are kept: a directory, or `s3://bucket/prefix` with its options."""

    location: str = key("./backups", "A directory, or s3://bucket/prefix.")
    endpoint_url: str | None = key(None, "The S3 server, where it is not AWS.")
    region: str | None = None
    access_key_id: str | None = key(None, "Else boto3's own chain: environment, role, profile.")
    secret_access_key: Secret | None = None
    path_style: bool | None = key(None, "bucket in the path, not in the host name.")
    ca_bundle: Path | None = key(None, "Certificates to trust for the endpoint.")
    request_checksum: Literal["when_supported", "when_required"] | None = key(
        None, "when_required for servers that refuse newer checksums."
    )

    def check(self) -> None:
        scheme, separator, rest = self.location.partition("://")
        if not self.location.strip():
            raise Mistaken("location is empty", 'write a directory or "s3://bucket/prefix"')
        if separator and scheme not in {"s3", "file"}:
            raise Mistaken(f"{scheme}:// is no store", 'write a directory or "s3://bucket/prefix"')
        if scheme == "s3" and "@" in rest.partition("/")[0]:
            raise Mistaken("location holds credentials", "use access_key_id and secret_access_key_file")
        if scheme == "s3" and not rest.partition("/")[0]:
            raise Mistaken("location names no bucket", 'write "s3://bucket/prefix"')
        if bool(self.access_key_id) != bool(self.secret_access_key):
            absent = "secret_access_key" if self.access_key_id else "access_key_id"
            raise Mistaken(f"{absent} is missing", "an access key and its secret go together")

    @property
    def is_s3(self) -> bool:
        return self.location.startswith("s3://")


class DefaultsConfig(Table):
    """What a source uses where it says nothing itself."""

    schedule: Schedule = "never"
    timezone: Zone = "UTC"
    retention: Policy = Policy()


class SourceConfig(Table):
    """What every kind of source has. From `load`, `schedule` is None where nothing is scheduled, and
    `timezone` and `retention` are set."""

    name: str = ""
    """Its key in `[sources.<name>]`."""
    schedule: Schedule | None = key(None, "When to back up; else defaults.schedule.")
    timezone: Zone | None = key(None, "Of the schedule; else defaults.timezone.")
    retention: Policy | None = key(None, "Else defaults.retention.")
    facts: bool = key(True, "Measure the source, so that a restore can be compared with it.")

    @property
    def recorded_every(self) -> timedelta | None:
        """How often its log is stored; None: it has none, or none is kept."""
        return None


def _split_password(table: dict[str, Any]) -> dict[str, Any]:
    """A password inside a url becomes the secret it is, so that the url can be shown."""
    if not isinstance(table.get("url"), str):
        return table
    try:
        url = urlsplit(table["url"])
        inside = url.password
    except ValueError:
        raise Mistaken("url cannot be read", "write scheme://user@host:port/name") from None
    if inside is None:
        return table
    if table.get("password"):
        raise Mistaken("the password is given twice, in url and in password", "take it out of url")
    bare = url._replace(netloc=(url.username or "") + "@" + url.netloc.rpartition("@")[2])
    return {**table, "url": urlunsplit(bare).replace("//@", "//"), "password": unquote(inside)}


def _one_of(source: SourceConfig, *names: str) -> None:
    given = [n for n in names if getattr(source, n) is not None]
    if not given:
        raise Mistaken(f"one of {' or '.join(names)} is needed", "it says where the source is")
    if len(given) > 1:
        raise Mistaken(f"{' and '.join(given)} exclude each other", f"keep one of {' or '.join(names)}")


def _scheme(url: str | None, *schemes: str) -> None:
    if url is not None and urlsplit(url).scheme not in schemes:
        raise Mistaken(
            f"url does not begin with {schemes[0]}://", f"write {schemes[0]}://user@host:port/name"
        )


_LOG_INTERVAL = "With pitr: how often the log is stored; else 1s on a directory, 10s on S3."


def _check_log_interval(mode: str, interval: timedelta | None) -> None:
    if interval is None:
        return
    if mode != "pitr":
        raise Mistaken('log_interval needs mode = "pitr"', "a dump has no log")
    if interval < timedelta(milliseconds=100):
        raise Mistaken("log_interval is too short", "100ms at least")


class PostgresSource(SourceConfig):
    """A PostgreSQL server."""

    driver: Literal["postgres"] = "postgres"
    url: str | None = key(None, "postgresql://user@host:port/database")
    container: str | None = key(None, "The server's container; its own client makes the dump.")
    user: str | None = None
    password: Secret | None = None
    databases: tuple[str, ...] | None = key(None, "Else every database of the server.")
    mode: Literal["dump", "pitr"] = key(
        "dump",
        "dump: pg_dump of each database, and the globals; pitr: base backups and every change between them.",
    )
    log_interval: timedelta | None = key(None, _LOG_INTERVAL)

    @property
    def recorded_every(self) -> timedelta | None:
        return self.log_interval or timedelta(seconds=1) if self.mode == "pitr" else None

    @classmethod
    def prepare(cls, table: dict[str, Any]) -> dict[str, Any]:
        return _split_password(table)

    def check(self) -> None:
        _one_of(self, "url", "container")
        _scheme(self.url, "postgresql", "postgres")
        if self.databases is not None and not self.databases:
            raise Mistaken("databases is empty", "name at least one, or leave it out for all of them")
        if self.mode == "pitr" and self.databases is not None:
            raise Mistaken('databases and mode = "pitr" exclude each other', "pitr takes the whole server")
        _check_log_interval(self.mode, self.log_interval)


class RedisSource(SourceConfig):
    """A Redis or Valkey server."""

    driver: Literal["redis"] = "redis"
    url: str | None = key(None, "redis://host:port/0, rediss:// for TLS, unix://path")
    container: str | None = None
    username: str | None = key(None, "An ACL user.")
    password: Secret | None = None
    path: Path | None = key(None, "The server's data directory, as this process sees it.")
    source_of_rdb: Literal["auto", "file", "container", "wire"] = key(
        "auto", "Where the RDB is read from after BGSAVE; wire: as a replica does."
    )
    mode: Literal["dump", "pitr"] = key(
        "dump", "dump: the RDB that the server makes; pitr: an RDB over the wire, and every write between."
    )
    log_interval: timedelta | None = key(None, _LOG_INTERVAL)

    @property
    def recorded_every(self) -> timedelta | None:
        return self.log_interval or timedelta(seconds=1) if self.mode == "pitr" else None

    @classmethod
    def prepare(cls, table: dict[str, Any]) -> dict[str, Any]:
        return _split_password(table)

    def check(self) -> None:
        _one_of(self, "url", "container")
        _scheme(self.url, "redis", "rediss", "unix")
        if self.source_of_rdb == "file" and self.path is None:
            raise Mistaken('source_of_rdb = "file" needs path', "path is the server's data directory")
        if self.source_of_rdb == "container" and self.container is None:
            raise Mistaken('source_of_rdb = "container" needs container', "name the server's container")
        if self.mode == "pitr" and self.source_of_rdb not in ("auto", "wire"):
            raise Mistaken(
                f'source_of_rdb = "{self.source_of_rdb}" and mode = "pitr" exclude each other',
                "pitr takes it over the wire",
            )
        _check_log_interval(self.mode, self.log_interval)


class ChromaSource(SourceConfig):
    """The persistent directory of a ChromaDB server."""

    driver: Literal["chroma"] = "chroma"
    path: Path | None = key(None, "The persistent directory.")
    container: str | None = None
    url: str | None = key(None, "http://host:8000, to count and compare what it holds.")
    quiesce: Literal["lock", "pause"] = key(
        "lock", "lock: SQLite's write lock; pause: the container stands still meanwhile."
    )
    staging: Path | None = key(None, "Where the copy is made; else a temporary directory.")

    def check(self) -> None:
        if self.path is None and self.container is None:
            raise Mistaken("one of path or container is needed", "it says where the source is")
        _scheme(self.url, "http", "https")
        if self.quiesce == "pause" and self.container is None:
            raise Mistaken('quiesce = "pause" needs container', "name the container to pause")


class VolumeSource(SourceConfig):
    """A directory, or a named Docker volume."""

    driver: Literal["volume"] = "volume"
    path: Path | None = key(None, "A directory this process can read.")
    volume: str | None = key(None, "The name of a Docker volume.")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = key((), "Patterns such as *.tmp, cache/, **/node_modules.")
    read_through: Literal["auto", "path", "helper"] = key(
        "auto", "helper: a container that mounts the volume, read-only."
    )
    helper_image: str | None = key(None, "The helper's image.")

    def check(self) -> None:
        _one_of(self, "path", "volume")
        if self.read_through == "helper" and self.volume is None:
            raise Mistaken('read_through = "helper" needs volume', "name the Docker volume")


Source: TypeAlias = PostgresSource | RedisSource | ChromaSource | VolumeSource
SOURCES: dict[str, type[SourceConfig]] = {
    "postgres": PostgresSource,
    "redis": RedisSource,
    "chroma": ChromaSource,
    "volume": VolumeSource,
}
"""Driver -> what its table may say. Whoever adds a driver adds its kind of source."""


class Objectives(Table):
    """What the restore of a stack must keep to."""

    rto: timedelta | None = key(None, "How long a restore may take.")
    rpo: timedelta | None = key(None, "How much may be lost.")


class StackConfig(Table):
    """Sources that are restored together, to one instant."""

    sources: tuple[str, ...] = key(REQUIRED, "Their names.", least=1)
    objectives: Objectives = Objectives()


class ServeConfig(Table):
    """The agent that runs until it is stopped."""

    listen: str = key("127.0.0.1:8722", "Where /healthz and the console answer.")
    grace: timedelta = key(
        timedelta(seconds=5), "How long SIGTERM lets a run finish; docker stop kills after 10s."
    )
    jobs: int = key(2, "Runs at the same time.", least=1, most=64)
    prune_schedule: Schedule | None = key("30 3 * * *", "When the retention is carried out.")
    verify_schedule: Schedule | None = key("30 4 * * SUN", "When the repository is verified.")
    verify_data_percent: float = key(0.0, "How much content verify reads back.", least=0, most=100)

    def check(self) -> None:
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise Mistaken(
                f"listen {self.listen!r} is no address", 'write "127.0.0.1:8722" or "0.0.0.0:8722"'
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class Config(Table):
    """A whole configuration, valid."""

    repository: RepositoryConfig = RepositoryConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    sources: Mapping[str, Source] = MappingProxyType({})
    stacks: Mapping[str, StackConfig] = MappingProxyType({})
    serve: ServeConfig = ServeConfig()
    state: Path | None = key(None, "Where the agent keeps its history; a cache.")
    origin: str = ""
    """Where it was read from, for people."""

    @property
    def without_file(self) -> bool:
        """Made from the environment: nobody has written a configuration."""
        return self.origin == ENVIRONMENT

    @property
    def timezone(self) -> "ZoneInfo":
        """The zone of a time that carries none, and of what is shown."""
        from zoneinfo import ZoneInfo

        return ZoneInfo(self.defaults.timezone)

    @property
    def policies(self) -> dict[str, Policy]:
        """The effective retention of each source."""
        return {name: source.retention or Policy() for name, source in self.sources.items()}
