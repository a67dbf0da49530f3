"""TOML, or the environment, into frozen models; all mistakes at once, each with file, key and hint."""

from backupd.config.load import find, load, parse
from backupd.config.mistakes import ConfigInvalid, Mistake
from backupd.config.models import (
    SOURCES,
    ChromaSource,
    Config,
    DefaultsConfig,
    Objectives,
    PostgresSource,
    RedisSource,
    RepositoryConfig,
    ServeConfig,
    Source,
    SourceConfig,
    StackConfig,
    VolumeSource,
)
from backupd.config.secret import Secret
from backupd.config.table import Table
from backupd.config.values import closest, format_duration, parse_duration

__all__ = [
    "SOURCES",
    "ChromaSource",
    "Config",
    "ConfigInvalid",
    "DefaultsConfig",
    "Mistake",
    "Objectives",
    "PostgresSource",
    "RedisSource",
    "RepositoryConfig",
    "Secret",
    "ServeConfig",
    "Source",
    "SourceConfig",
    "StackConfig",
    "Table",
    "VolumeSource",
    "closest",
    "find",
    "format_duration",
    "load",
    "parse",
    "parse_duration",
]
