"""What is asked of a PostgreSQL server, and what is made of its answers. Pure.

Every query gives one JSON value a line, so that no name, however odd, can be taken for something else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from backupd.model import Json

LIVE = """
SELECT jsonb_build_object('version', current_setting('server_version_num')::int,
  'server_version', current_setting('server_version'),
  'clock', extract(epoch FROM clock_timestamp())::text,
  'recovery', pg_is_in_recovery(),
  'user', current_user,
  'superuser', (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
  'reads_passwords', has_table_privilege('pg_catalog.pg_authid', 'SELECT'),
  'bootstrap', (SELECT rolname FROM pg_roles WHERE oid = 10),
  'preload', (SELECT setting FROM pg_settings WHERE name = 'shared_preload_libraries'),
  'system_identifier', (SELECT system_identifier::text FROM pg_control_system()),
  'tablespaces', (SELECT coalesce(jsonb_agg(spcname ORDER BY spcname), '[]') FROM pg_tablespace
    WHERE spcname NOT IN ('pg_default', 'pg_global')),
  'databases', (SELECT coalesce(jsonb_object_agg(datname, jsonb_build_object(
      'connect', datallowconn AND datconnlimit <> -2 AND has_database_privilege(oid, 'CONNECT'),
      'valid', datconnlimit <> -2)), '{}')
    FROM pg_database WHERE datallowconn AND NOT datistemplate));
"""
"""About the server as a whole. A connection limit of -2 marks a database whose DROP was interrupted."""

SETTINGS = """
SELECT set_config('lock_timeout', '{lock_timeout}', false) \\g /dev/null
SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout',
  'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout') \\g /dev/null
SET row_security = off;
"""
"""A server's own limits would end the transaction that holds the snapshot. With row security off, rows that
this role may not see are an error and not a smaller count."""

CLOCK = """
SELECT jsonb_build_object('instant', extract(epoch FROM CASE WHEN pg_is_in_recovery()
  THEN least(clock_timestamp(), coalesce(pg_last_xact_replay_timestamp(), clock_timestamp()))
  ELSE clock_timestamp() END)::text);
"""
"""Asked before the snapshot is taken: what was acknowledged before this instant is in it. On a standby only what
was replayed can be."""

SNAPSHOT = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT jsonb_build_object('snapshot', pg_export_snapshot(),
  'lsn', CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END);
"""

ROLES = """
SELECT jsonb_build_object(
  'roles', (SELECT coalesce(jsonb_agg(rolname ORDER BY rolname), '[]') FROM pg_roles
    WHERE rolname !~ '^pg_'),
  'memberships', (SELECT coalesce(jsonb_agg(pair ORDER BY pair), '[]') FROM (
    SELECT DISTINCT r.rolname || ' in ' || g.rolname AS pair FROM pg_auth_members m
      JOIN pg_roles r ON r.oid = m.member JOIN pg_roles g ON g.oid = m.roleid
    WHERE r.rolname !~ '^pg_') AS pairs));
"""

MINE = """
WITH members AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
spaces AS (SELECT oid, nspname FROM pg_namespace
  WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'),
relations AS (SELECT c.oid, s.nspname, c.relname, c.relkind, c.relpersistence
  FROM pg_class c JOIN spaces s ON s.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND NOT EXISTS (SELECT FROM members
    WHERE classid = 'pg_class'::regclass AND objid = c.oid)),
functions AS (SELECT p.oid FROM pg_proc p JOIN spaces s ON s.oid = p.pronamespace
  WHERE NOT EXISTS (SELECT FROM members WHERE classid = 'pg_proc'::regclass AND objid = p.oid))
"""
"""What people made: not the system's, not an extension's (CREATE EXTENSION makes those again)."""

DATABASE = f"""{MINE}
SELECT jsonb_build_object(
  'owner', pg_get_userbyid(d.datdba), 'encoding', pg_encoding_to_char(d.encoding),
  'collate', d.datcollate, 'ctype', d.datctype,
  'extensions', (SELECT coalesce(jsonb_object_agg(extname, extversion), '{{}}')
    FROM pg_extension),
  'large_objects', (SELECT count(*) FROM pg_largeobject_metadata),
  'functions', (SELECT count(*) FROM functions),
  'indexes', (SELECT count(*) FROM pg_index i JOIN relations r ON r.oid = i.indrelid WHERE i.indisvalid),
  'triggers', (SELECT count(*) FROM pg_trigger t JOIN relations r ON r.oid = t.tgrelid
    WHERE NOT t.tgisinternal),
  'constraints', (SELECT count(*) FROM pg_constraint c JOIN relations r ON r.oid = c.conrelid
    WHERE c.contype IN ('c', 'f', 'p', 'u', 'x')),
  'kinds', (SELECT coalesce(jsonb_object_agg(relkind, number), '{{}}') FROM
    (SELECT relkind, count(*) AS number FROM relations GROUP BY relkind) AS kinds))
FROM pg_database d WHERE d.datname = current_database();
"""  # noqa: S608  both parts stand above

ROWS = f"""{MINE}
SELECT format('SELECT jsonb_build_array(%L, count(*)) FROM ONLY %I.%I',
  format('%I.%I', nspname, relname), nspname, relname)
FROM relations WHERE relkind = 'r' AND (relpersistence <> 'u' OR NOT pg_is_in_recovery())
ORDER BY nspname, relname \\gexec
"""  # noqa: S608  both parts stand above
"""One line a table that holds rows itself: partitions, not their parents. No materialized views: they are made
again from their query, and may have been stale. An unlogged table cannot be read on a standby."""

KINDS = {
    "r": "tables", "p": "partitioned_tables", "v": "views", "m": "materialized_views", "S": "sequences",
    "f": "foreign_tables",
}  # fmt: skip


USED = (
    "tables", "partitioned_tables", "views", "materialized_views", "foreign_tables", "sequences", "functions",
    "large_objects",
)  # fmt: skip
"""What a database holds when somebody used it."""


# --- answers -------------------------------------------------------------------------------------------


def database_facts(about: Mapping[str, Any], rows: Sequence[Sequence[Any]] | None) -> dict[str, Json]:
    """What must be equal after a restore, from the answers to DATABASE and ROWS.

    Not the versions of extensions: a newer image brings newer ones.
    """
    facts: dict[str, Json] = {key: about[key] for key in ("owner", "encoding", "collate", "ctype")}
    facts["extensions"] = sorted(about["extensions"])
    for key in ("large_objects", "functions", "indexes", "triggers", "constraints"):
        facts[key] = about[key]
    facts.update({word: about["kinds"].get(letter, 0) for letter, word in KINDS.items()})
    if rows is not None:
        facts["rows"] = {str(table): int(number) for table, number in rows}
    return facts


def whole_facts(measured: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    """Facts of all databases. The maintenance database `postgres` counts only when somebody uses it: a fresh
    server has one whether the old one had or not."""
    kept: dict[str, Json] = {
        name: dict(of) for name, of in measured.items() if name != "postgres" or any(map(of.get, USED))
    }
    tables = sum(number(of.get("tables")) + number(of.get("partitioned_tables")) for of in measured.values())
    return {"databases": kept, "tables": tables, "empty": tables == 0}


def instant(epoch: str) -> datetime:
    """PostgreSQL's clock, to the microsecond."""
    seconds, _, fraction = epoch.partition(".")
    return datetime.fromtimestamp(int(seconds), UTC).replace(microsecond=int((fraction + "000000")[:6]))


def number(value: Json) -> int:
    """A number of the answers; 0 for what is none."""
    return value if isinstance(value, int) else 0


# --- names ---------------------------------------------------------------------------------------------


def conninfo(values: Mapping[str, str]) -> str:
    """`key='value' ...` as libpq reads it: no name of a database can be taken for more than a name."""
    quoted = {key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in values.items()}
    return " ".join(f"{key}='{value}'" for key, value in quoted.items())


def identifier(name: str) -> str:
    """A name in double quotes, as SQL reads it."""
    return '"' + name.replace('"', '""') + '"'


def is_named_awkwardly(name: str, encoding: str) -> bool:
    """The names of databases are kept in no encoding of their own. In a dump of such a database its name reads
    differently than outside of it, so that pg_restore makes one of one name and looks for it under another."""
    return not name.isascii() and encoding not in {"UTF8", "SQL_ASCII"}


def create_database(name: str, about: Mapping[str, Any]) -> str:
    """A database as `pg_restore --create` would make it, without rights, comment and settings."""
    texts = {key: "'" + str(about[key]).replace("'", "''") + "'" for key in ("encoding", "collate", "ctype")}
    return (
        f"CREATE DATABASE {identifier(name)} TEMPLATE template0 OWNER {identifier(str(about['owner']))} "
        f"ENCODING {texts['encoding']} LC_COLLATE {texts['collate']} LC_CTYPE {texts['ctype']};\n"
    )


# --- globals -------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""
      '(?:[^']|'')*'            # a string; pg_dumpall writes backslashes as E'..\\..', doubled
    | "(?:[^"]|"")*"            # a quoted name
    | --[^\n]*                  # a comment
    | \A\\[^\n]*\n | (?<=\n)\\[^\n]*\n   # a psql command: \restrict, \connect
    | ;
    """,
    re.VERBOSE,
)


def statements(script: str) -> Iterator[str]:
    """The statements of a script as pg_dumpall writes it, each with the comments and blank lines before it."""
    begin = 0
    for token in _TOKEN.finditer(script):
        if token.group() == ";" or token.group().startswith("\\"):
            yield script[begin : token.end()]
            begin = token.end()
    if script[begin:].strip():
        yield script[begin:]


def globals_for(script: str, existing: Collection[str]) -> str:
    """The globals for a server that already has the roles `existing`.

    pg_dumpall writes CREATE ROLE and then ALTER ROLE with everything about it, so for a role that is there (the
    bootstrap superuser always is) leaving out the first loses nothing. Tablespaces are directories of the old
    machine: what lived in them is restored to the default one.
    """
    made = {f"CREATE ROLE {form};" for name in existing for form in (name, identifier(name))}
    kept = []
    for statement in statements(script):
        bare = _bare(statement)
        if bare in made or re.match(r"(CREATE|ALTER) TABLESPACE |COMMENT ON TABLESPACE ", bare):
            continue
        if re.match(r"(GRANT|REVOKE) .* ON TABLESPACE ", bare):
            continue
        kept.append(statement)
    return "".join(kept)


def _bare(statement: str) -> str:
    """Without the comments before it, on one line."""
    lines = [line for line in statement.strip().splitlines() if not line.startswith("--")]
    return "\n".join(lines).strip()


# --- errors --------------------------------------------------------------------------------------------

_SECRET = re.compile(r"(PASSWORD\s+)E?'(?:[^']|'')*'?", re.IGNORECASE)
_ERROR = re.compile(r"\b(ERROR|FATAL|PANIC|error|fatal):\s*(?P<what>.*)")
_STATEMENT = re.compile(r"(?:^Command was|STATEMENT|Query was):\s*(?P<what>.+)$", re.MULTILINE)


def first_error(stderr: str) -> str:
    """The first line that tells of an error, with the statement it is about; without passwords."""
    lines = stderr.strip().splitlines()
    found = next((m for line in lines if (m := _ERROR.search(line))), None)
    told = found.group("what") if found else (lines[-1] if lines else "no reason given")
    # "pg_restore: error: could not execute query: ERROR:  type does not exist": the last one says it
    told = re.split(r"\b(?:ERROR|FATAL):\s+", told)[-1].strip()
    statement = _STATEMENT.search(stderr)
    if statement:
        told += f" (in: {statement.group('what').strip()[:200]})"
    return _SECRET.sub(r"\1'***'", told)


_HINTS = (
    ("password authentication failed", "check user and password of this source"),
    ("no password supplied", "give this source its password, or password_file"),
    (
        "no pg_hba.conf entry for replication",
        "add to pg_hba.conf: host replication ROLE all scram-sha-256 (`host all all ..` does not cover it)",
    ),
    ("permission denied to start WAL sender", "ALTER ROLE .. REPLICATION"),
    ("must be superuser or replication role", "ALTER ROLE .. REPLICATION"),
    ("max_wal_senders", "raise max_wal_senders: a base backup and the log need one each"),
    ("all replication slots are in use", "raise max_replication_slots, or drop a slot that nobody uses"),
    (
        "is active for PID",
        "another agent records this source; one that was killed is noticed within wal_sender_timeout",
    ),
    ("no pg_hba.conf entry", "let this role in from here: pg_hba.conf"),
    ("Peer authentication failed", "the container's socket asks for an account of that name: set user"),
    ("could not translate host name", "check the host in url"),
    ("Connection refused", "is the server running, and the port right?"),
    ("No such file or directory", "is the server running in that container?"),
    ("timeout expired", "is the host right, and reachable from here?"),
    ("starting up", "the server is starting: try again in a moment"),
    ("LOCK TABLE", "something holds the table locked: look at pg_stat_activity, or back up at another hour"),
    ("lock timeout", "something holds a lock: look at pg_stat_activity, or back up at another hour"),
    (
        "permission denied",
        "GRANT pg_read_all_data TO the role, or name what it may read with databases = [..]",
    ),
    ("row-level security", "the role must bypass row security: ALTER ROLE .. BYPASSRLS"),
    ("too many clients", "raise max_connections, or name fewer databases"),
    ("server version mismatch", "install the client of the server's version"),
    ("does not exist", "check its name"),
    ("No space left", "free space in the container's volume"),
)


def hint_for(stderr: str) -> str:
    """What to do about it; empty where nothing is known."""
    return next((hint for sign, hint in _HINTS if sign in stderr), "")
