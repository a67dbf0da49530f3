"""What a configuration may say, as frozen models. `load` applies the defaults and makes paths absolute."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from backupd.config.values import NICKNAMES, Mistaken, check_schedule, closest, parse_duration
from backupd.retention import Policy

ENVIRONMENT = "the environment"
"""The origin of a configuration without a file."""


def mistake(message: str, hint: str = "") -> PydanticCustomError:
    """A mistake as pydantic collects it; the hint travels in its context."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "hint": hint})


def _schedule(value: object) -> object:
    if not isinstance(value, str) or value in {"never", ""}:
        return "never" if value == "" else value
    try:
        return check_schedule(value)
    except Mistaken as wrong:
        raise mistake(wrong.message, wrong.hint) from None


def _duration(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except Mistaken as wrong:
            raise mistake(wrong.message, wrong.hint) from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise mistake(f"{value!r} has no unit", f'write for example "{value}s" or "{value}d"')
    return value


def _policy(value: object) -> object:
    if isinstance(value, Mapping) and isinstance(value.get("within"), str):
        with suppress(Mistaken):  # left as it is, pydantic reports it beside the other mistakes in the table
            return {**value, "within": parse_duration(value["within"])}
    return value


def _zone(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        from zoneinfo import available_timezones  # reads a directory tree: only for the hint

        hint = closest(value, available_timezones()) or 'write for example "UTC" or "Europe/Berlin"'
        raise mistake(f"{value!r} is not a time zone", hint) from None
    return value


_CRON = f"Five fields of cron with weekday names, one of {', '.join(NICKNAMES)}, or never."
Schedule: TypeAlias = Annotated[str, BeforeValidator(_schedule), Field(description=_CRON)]
Duration: TypeAlias = Annotated[
    timedelta,
    BeforeValidator(_duration),
    WithJsonSchema({"type": "string", "description": "A number with ms, s, m, h, d or w: 60s, 15m, 30d."}),
]
Zone: TypeAlias = Annotated[
    str, BeforeValidator(_zone), Field(description="A time zone: UTC, Europe/Berlin.")
]
_COUNT = {"type": "integer", "minimum": -1}
Retention: TypeAlias = Annotated[
    Policy,
    BeforeValidator(_policy),
    WithJsonSchema(
        {
            "type": "object",
            "description": "What prune keeps. Every rule adds; -1 is no limit; no rule removes nothing.",
            "properties": {
                **dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly", "yearly"), _COUNT),
                "within": {"type": "string", "description": "All this close to the newest point: 30d."},
                "timezone": {"type": "string", "description": "Where a day begins; else the source's."},
            },
            "additionalProperties": False,
        }
    ),
]


class Frozen(BaseModel):
    """Unknown keys are mistakes; nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class RepositoryConfig(Frozen):
    """Where recovery points are kept: a directory, or `s3://bucket/prefix` with its options."""

    location: str = Field("./backups", description="A directory, or s3://bucket/prefix.")
    endpoint_url: str | None = Field(None, description="The S3 server, where it is not AWS.")
    region: str | None = None
    access_key_id: str | None = Field(None, description="Else boto3's own chain: environment, role, profile.")
    secret_access_key: SecretStr | None = None
    path_style: bool | None = Field(None, description="bucket in the path, not in the host name.")
    ca_bundle: Path | None = Field(None, description="Certificates to trust for the endpoint.")
    request_checksum: Literal["when_supported", "when_required"] | None = Field(
        None, description="when_required for servers that refuse newer checksums."
    )

    @model_validator(mode="after")
    def _check(self) -> RepositoryConfig:
        scheme, separator, rest = self.location.partition("://")
        if not self.location.strip():
            raise mistake("location is empty", 'write a directory or "s3://bucket/prefix"')
        if separator and scheme not in {"s3", "file"}:
            raise mistake(f"{scheme}:// is no store", 'write a directory or "s3://bucket/prefix"')
        if scheme == "s3" and "@" in rest.partition("/")[0]:
            raise mistake("location holds credentials", "use access_key_id and secret_access_key_file")
        if scheme == "s3" and not rest.partition("/")[0]:
            raise mistake("location names no bucket", 'write "s3://bucket/prefix"')
        if bool(self.access_key_id) != bool(self.secret_access_key):
            absent = "secret_access_key" if self.access_key_id else "access_key_id"
            raise mistake(f"{absent} is missing", "an access key and its secret go together")
        return self

    @property
    def is_s3(self) -> bool:
        return self.location.startswith("s3://")


class DefaultsConfig(Frozen):
    """What a source uses where it says nothing itself."""

    schedule: Schedule = "never"
    timezone: Zone = "UTC"
    retention: Retention = Policy()


class SourceConfig(Frozen):
    """What every kind of source has. From `load`, `schedule` is None where nothing is scheduled, and
    `timezone` and `retention` are set."""

    name: str = Field("", exclude=True)
    """Its key in `[sources.<name>]`."""
    schedule: Schedule | None = Field(None, description="When to back up; else defaults.schedule.")
    timezone: Zone | None = Field(None, description="Of the schedule; else defaults.timezone.")
    retention: Retention | None = Field(None, description="Else defaults.retention.")
    facts: bool = Field(True, description="Measure the source, so that a restore can be compared with it.")


def _split_password(data: object) -> object:
    """A password inside a url becomes the secret it is, so that the url can be shown."""
    if not isinstance(data, dict) or not isinstance(data.get("url"), str):
        return data
    try:
        url = urlsplit(data["url"])
        inside = url.password
    except ValueError:
        raise mistake("url cannot be read", "write scheme://user@host:port/name") from None
    if inside is None:
        return data
    if data.get("password"):
        raise mistake("the password is given twice, in url and in password", "take it out of url")
    bare = url._replace(netloc=(url.username or "") + "@" + url.netloc.rpartition("@")[2])
    return {**data, "url": urlunsplit(bare).replace("//@", "//"), "password": unquote(inside)}


def _one_of(model: BaseModel, *names: str) -> None:
    given = [n for n in names if getattr(model, n) is not None]
    if not given:
        raise mistake(f"one of {' or '.join(names)} is needed", "it says where the source is")
    if len(given) > 1:
        raise mistake(f"{' and '.join(given)} exclude each other", f"keep one of {' or '.join(names)}")


def _scheme(url: str | None, *schemes: str) -> None:
    if url is not None and urlsplit(url).scheme not in schemes:
        raise mistake(f"url does not begin with {schemes[0]}://", f"write {schemes[0]}://user@host:port/name")


class PostgresSource(SourceConfig):
    """A PostgreSQL server."""

    driver: Literal["postgres"] = "postgres"
    url: str | None = Field(None, description="postgresql://user@host:port/database")
    container: str | None = Field(None, description="The server's container; its own client makes the dump.")
    user: str | None = None
    password: SecretStr | None = None
    databases: tuple[str, ...] | None = Field(None, description="Else every database of the server.")
    mode: Literal["dump"] = Field("dump", description="dump: pg_dump of each database, and the globals.")

    _split = model_validator(mode="before")(_split_password)

    @model_validator(mode="after")
    def _check(self) -> PostgresSource:
        _one_of(self, "url", "container")
        _scheme(self.url, "postgresql", "postgres")
        if self.databases is not None and not self.databases:
            raise mistake("databases is empty", "name at least one, or leave it out for all of them")
        return self


class RedisSource(SourceConfig):
    """A Redis or Valkey server."""

    driver: Literal["redis"] = "redis"
    url: str | None = Field(None, description="redis://host:port/0, rediss:// for TLS, unix://path")
    container: str | None = None
    username: str | None = Field(None, description="An ACL user.")
    password: SecretStr | None = None
    path: Path | None = Field(None, description="The server's data directory, as this process sees it.")
    source_of_rdb: Literal["auto", "file", "container", "wire"] = Field(
        "auto", description="Where the RDB is read from after BGSAVE; wire: as a replica does."
    )

    _split = model_validator(mode="before")(_split_password)

    @model_validator(mode="after")
    def _check(self) -> RedisSource:
        _one_of(self, "url", "container")
        _scheme(self.url, "redis", "rediss", "unix")
        if self.source_of_rdb == "file" and self.path is None:
            raise mistake('source_of_rdb = "file" needs path', "path is the server's data directory")
        if self.source_of_rdb == "container" and self.container is None:
            raise mistake('source_of_rdb = "container" needs container', "name the server's container")
        return self


class ChromaSource(SourceConfig):
    """The persistent directory of a ChromaDB server."""

    driver: Literal["chroma"] = "chroma"
    path: Path | None = Field(None, description="The persistent directory.")
    container: str | None = None
    url: str | None = Field(None, description="http://host:8000, to count and compare what it holds.")
    quiesce: Literal["lock", "pause"] = Field(
        "lock", description="lock: SQLite's write lock; pause: the container stands still meanwhile."
    )
    staging: Path | None = Field(None, description="Where the copy is made; else a temporary directory.")

    @model_validator(mode="after")
    def _check(self) -> ChromaSource:
        if self.path is None and self.container is None:
            raise mistake("one of path or container is needed", "it says where the source is")
        _scheme(self.url, "http", "https")
        if self.quiesce == "pause" and self.container is None:
            raise mistake('quiesce = "pause" needs container', "name the container to pause")
        return self


class VolumeSource(SourceConfig):
    """A directory, or a named Docker volume."""

    driver: Literal["volume"] = "volume"
    path: Path | None = Field(None, description="A directory this process can read.")
    volume: str | None = Field(None, description="The name of a Docker volume.")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = Field((), description="Patterns such as *.tmp, cache/, **/node_modules.")
    read_through: Literal["auto", "path", "helper"] = Field(
        "auto", description="helper: a container that mounts the volume, read-only."
    )
    helper_image: str | None = Field(None, description="The helper's image.")

    @model_validator(mode="after")
    def _check(self) -> VolumeSource:
        _one_of(self, "path", "volume")
        if self.read_through == "helper" and self.volume is None:
            raise mistake('read_through = "helper" needs volume', "name the Docker volume")
        return self


Source: TypeAlias = Annotated[
    PostgresSource | RedisSource | ChromaSource | VolumeSource, Discriminator("driver")
]
SOURCES: dict[str, type[SourceConfig]] = {
    "postgres": PostgresSource,
    "redis": RedisSource,
    "chroma": ChromaSource,
    "volume": VolumeSource,
}


class Objectives(Frozen):
    """What the restore of a stack must keep to."""

    rto: Duration | None = Field(None, description="How long a restore may take.")
    rpo: Duration | None = Field(None, description="How much may be lost.")


class StackConfig(Frozen):
    """Sources that are restored together, to one instant."""

    sources: tuple[str, ...] = Field(min_length=1)
    objectives: Objectives = Objectives()


class ServeConfig(Frozen):
    """The agent that runs until it is stopped."""

    listen: str = Field("127.0.0.1:8722", description="Where /healthz and the console answer.")
    grace: Duration = Field(
        timedelta(seconds=5), description="How long SIGTERM lets a run finish; docker stop kills after 10s."
    )
    jobs: int = Field(2, ge=1, le=64, description="Runs at the same time.")
    prune_schedule: Schedule | None = Field("30 3 * * *", description="When the retention is carried out.")
    verify_schedule: Schedule | None = Field("30 4 * * SUN", description="When the repository is verified.")
    verify_data_percent: float = Field(0, ge=0, le=100, description="How much content verify reads back.")

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise mistake(f"listen {self.listen!r} is no address", 'write "127.0.0.1:8722" or "0.0.0.0:8722"')
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class Config(Frozen):
    """A whole configuration, valid."""

    repository: RepositoryConfig = RepositoryConfig()
    defaults: DefaultsConfig = DefaultsConfig()
    sources: dict[str, Source] = Field(default_factory=dict)
    stacks: dict[str, StackConfig] = Field(default_factory=dict)
    serve: ServeConfig = ServeConfig()
    state: Path | None = Field(None, description="Where the agent keeps its history; a cache.")
    origin: str = Field("", exclude=True)
    """Where it was read from, for people."""

    @property
    def without_file(self) -> bool:
        """Made from the environment: nobody has written a configuration."""
        return self.origin == ENVIRONMENT

    @property
    def timezone(self) -> ZoneInfo:
        """The zone of a time that carries none, and of what is shown."""
        return ZoneInfo(self.defaults.timezone)

    @property
    def policies(self) -> dict[str, Policy]:
        """The effective retention of each source."""
        return {name: source.retention or Policy() for name, source in self.sources.items()}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file: the models, and `<key>_file` beside every string, without inner fields."""
    schema = Config.model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        properties = model.get("properties", {})
        for inner in ("name", "origin"):
            properties.pop(inner, None)
        if any("string" in str(p) for p in properties.values()):
            model["patternProperties"] = {
                "_file$": {"type": "string", "description": "A file that holds the value, such as a secret."}
            }
    schema["title"] = "backupd.toml"
    return schema
