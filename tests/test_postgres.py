"""PostgreSQL dumps: what comes back, what the instant promises, and every way it can go wrong, on real servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import services as bed
from captured import Held, take
from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers import _process, postgres_client, postgres_sql
from backupd.drivers.postgres_client import InContainer, OnThisMachine, choose_client, script
from backupd.drivers.postgres_dump import Source
from backupd.drivers.postgres_logical import PostgresLogical
from backupd.errors import CaptureFailed, RestoreFailed, UsageError
from backupd.model import Container, Facts, Streams
from backupd.sandbox.docker import DockerSandbox, Engine

ENGINE = Engine()

CONTENT = r"""
CREATE ROLE app LOGIN PASSWORD 'pw1' CONNECTION LIMIT 7;
CREATE ROLE readers;
GRANT readers TO app WITH ADMIN OPTION;
CREATE ROLE "Odd; ""Role";
ALTER ROLE app SET statement_timeout = '9min';
COMMENT ON ROLE app IS 'it''s; a "comment"
CREATE ROLE readers;';
CREATE DATABASE "my db/ü" OWNER app;
COMMENT ON DATABASE "my db/ü" IS 'orders; and more';
ALTER DATABASE "my db/ü" SET work_mem = '8MB';
ALTER ROLE app IN DATABASE "my db/ü" SET search_path = 's';
REVOKE CONNECT ON DATABASE "my db/ü" FROM PUBLIC;
CREATE DATABASE "old ü" OWNER app TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C';
\c "my db/ü"
CREATE EXTENSION hstore;
CREATE SCHEMA s AUTHORIZATION app;
SET ROLE app;
ALTER DEFAULT PRIVILEGES IN SCHEMA s GRANT SELECT ON TABLES TO readers;
CREATE TABLE s."T ""x"(id serial PRIMARY KEY, t text DEFAULT 'é' CHECK (t <> ''));
INSERT INTO s."T ""x"(t) SELECT repeat('x', 100) FROM generate_series(1, 1000);
COMMENT ON TABLE s."T ""x" IS 'the table';
RESET ROLE;
SELECT lo_from_bytea(4711, 'a large object');
CREATE TABLE parts(id int, k text) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
CREATE INDEX ON parts(k);
INSERT INTO parts SELECT g, 'k' FROM generate_series(0, 99) g;
CREATE MATERIALIZED VIEW total AS SELECT count(*) FROM parts;
CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE UNLOGGED TABLE scratch AS SELECT 1;
\c "old ü"
CREATE TABLE latin(t text);
INSERT INTO latin VALUES (chr(252));
"""


def sql(container: Container, text: str, database: str = "postgres") -> str:
    """What psql prints."""
    client = InContainer(container)
    said = client.run("psql", "-AtXc", text, database=database, env={"PGCLIENTENCODING": "UTF8"})
    return b"".join(said).decode().strip()


def kill(container: Container, program: str) -> None:
    """End a program in it at once. Not waited for: the engine tells of no end while an output is stuck."""
    api, name = ENGINE.api, container.name
    argv = ["sh", "-c", f"kill -9 $(pidof {program})"]
    api.exec_start(api.exec_create(name, argv)["Id"], detach=True)


def driver_of(container: Container, **settings: Any) -> PostgresLogical:
    """A driver for the server in this container."""
    return PostgresLogical(Source(lambda: InContainer(container), lambda: container.image, **settings))


@pytest.fixture(scope="module")
def origin(module_services: bed.Services) -> Container:
    """A server with a bit of everything; not to be changed."""
    container = ENGINE.container(module_services.postgres(user="boss").name)
    script(InContainer(container), "postgres", CONTENT)
    return container


@pytest.fixture(scope="module")
def held(origin: Container) -> Held:
    """A capture of it."""
    return take(driver_of(origin))


@pytest.fixture
def start_home() -> Iterator[Callable[[Held], Container]]:
    """Starts fresh homes for captured points."""
    sandbox = DockerSandbox(ENGINE, f"test-{time.time_ns()}", labels=bed.labels())
    count = iter(range(99))

    def start(held: Held) -> Container:
        spec = PostgresLogical(Source(lambda: pytest.fail("a home needs no source"))).home(held.point)
        made = sandbox.create(f"pg{next(count)}", spec)
        made.start()
        sandbox.wait_ready(made, spec)
        return made

    yield start
    sandbox.destroy()


# --- what comes back -----------------------------------------------------------------------------------


def test_everything_comes_back(
    origin: Container, held: Held, start_home: Callable[[Held], Container]
) -> None:
    """Roles with passwords and memberships, databases of odd names with their owner, encoding, rights, comment
    and settings, extensions, large objects, partitions, default privileges: as they were."""
    assert list(held.files) == [
        "globals.sql", "app.dump", "my%20db%2F%C3%BC.dump", "old%20%C3%BC.dump", "postgres.dump",
    ]  # fmt: skip
    home = start_home(held)
    driver = driver_of(origin)
    driver.load(held, home)

    assert driver.facts(home) == held.point.facts
    rows = held.point.facts["databases"]["my db/ü"]["rows"]  # type: ignore[index,call-overload]
    assert rows == {'s."T ""x"': 1000, "public.parts_1": 100, "public.scratch": 1}
    same_everywhere = {
        "SELECT rolname, rolpassword, rolconnlimit, rolsuper, shobj_description(oid, 'pg_authid')"
        " FROM pg_authid WHERE rolname !~ '^pg_' ORDER BY 1": "postgres",
        "SELECT roleid::regrole, member::regrole, admin_option FROM pg_auth_members ORDER BY 1, 2": "postgres",
        "SELECT datname, datdba::regrole, (SELECT array_agg(a ORDER BY a::text) FROM unnest(datacl) a),"
        " pg_encoding_to_char(encoding), datcollate,"
        " shobj_description(oid, 'pg_database') FROM pg_database ORDER BY 1": "postgres",
        "SELECT d.datname, setrole::regrole, setconfig FROM pg_db_role_setting LEFT JOIN pg_database d"
        " ON d.oid = setdatabase ORDER BY 1, 2": "postgres",
        "SELECT defaclrole::regrole, defaclacl FROM pg_default_acl": "my db/ü",
        "SELECT relname, relowner::regrole, relacl, obj_description(oid, 'pg_class') FROM pg_class"
        " WHERE relnamespace IN ('s'::regnamespace, 'public'::regnamespace) ORDER BY 1": "my db/ü",
        'SELECT md5(string_agg(t::text, \'\' ORDER BY id)) FROM s."T ""x" t': "my db/ü",
        'SELECT nextval(\'s."T ""x_id_seq"\') > 1000': "my db/ü",
        "SELECT convert_from(lo_get(4711), 'UTF8'), one(), (SELECT * FROM total)": "my db/ü",
        "SELECT t, ascii(t) FROM latin": "old ü",
    }
    for query, database in same_everywhere.items():
        assert sql(home, query, database) == sql(origin, query, database), query
    assert (
        b"".join(
            home.exec(
                ["psql", "-h", "127.0.0.1", "-U", "app", "-d", "my db/ü", "-Atc", "SELECT current_user"],
                env={"PGPASSWORD": "pw1"},
            )
        )
        == b"app\n"
    )


def test_rows_are_counted_in_the_snapshot_that_is_dumped(
    start_postgres: Callable[..., bed.Service], start_home: Callable[[Held], Container]
) -> None:
    """While a client keeps writing: everything it was told before the instant is in the dump, and what is
    counted is what is restored."""
    service = start_postgres()
    container = ENGINE.container(service.name)
    sql(container, "CREATE TABLE t(id int, told timestamptz)", "app")
    import psycopg

    acknowledged: list[float] = []
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(
            host=service.host, port=service.port, user=service.user, password=service.password,
            dbname="app", autocommit=True,
        ) as connection:  # fmt: skip
            while not stop.is_set():
                connection.execute("INSERT INTO t VALUES (%s)", [len(acknowledged)])
                acknowledged.append(time.time())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(acknowledged) < 50:
            time.sleep(0.01)
        taken = take(driver_of(container))
    finally:
        stop.set()
        writer.join()
    before = sum(1 for at in acknowledged if at < taken.point.instant.timestamp())
    counted = taken.point.facts["databases"]["app"]["rows"]["public.t"]  # type: ignore[index,call-overload]
    assert 50 <= before <= counted <= before + 300  # type: ignore[operator]
    assert counted < len(acknowledged)  # type: ignore[operator]
    home = start_home(taken)
    driver_of(container).load(taken, home)
    assert driver_of(container).facts(home) == taken.point.facts
    assert int(sql(home, "SELECT count(*) FROM t", "app")) == counted
    assert int(sql(home, "SELECT count(DISTINCT id) FROM t WHERE id < " + str(before), "app")) == before


def test_an_unchanged_database_dumps_to_nearly_the_same_bytes(origin: Container, held: Held) -> None:
    """Only the header (with the time of the dump) differs: a second backup costs next to nothing."""
    name = "my%20db%2F%C3%BC.dump"
    again = take(driver_of(origin, databases=["my db/ü"])).files[name]
    before = held.files[name]
    assert len(again) == len(before)
    assert sum(a != b for a, b in zip(again, before, strict=True)) < 32


def test_only_the_databases_named_are_dumped_and_compared(
    origin: Container, start_home: Callable[[Held], Container]
) -> None:
    """`databases` narrows both the dump and the facts; `facts = false` measures nothing."""
    driver = driver_of(origin, databases=["my db/ü"])
    taken = take(driver)
    assert list(taken.files) == ["globals.sql", "my%20db%2F%C3%BC.dump"]
    home = start_home(taken)
    driver.load(taken, home)
    assert driver.facts(home) == taken.point.facts
    assert take(driver_of(origin, databases=["app"], facts=False)).point.facts == {}


def test_a_home_is_what_the_source_was(held: Held) -> None:
    """Image, superuser and data directory follow the source; without its image, the official one of its major
    version, or of a newer client's; each home gets a password of its own."""
    driver = PostgresLogical(Source(lambda: pytest.fail("a home needs no source")))
    first, second = driver.home(held.point), driver.home(held.point)
    assert first.image == bed.POSTGRES_IMAGE
    assert first.env["POSTGRES_USER"] == "boss"
    assert first.env["POSTGRES_PASSWORD"] != second.env["POSTGRES_PASSWORD"]
    assert first.volumes == ("/var/lib/postgresql/data",)
    far = replace(held.point, attributes={"major": 16, "client_major": 18, "superuser": "postgres"})
    assert driver.home(far).image == "postgres:18"
    assert driver.home(far).volumes == ("/var/lib/postgresql",)


# --- what must fail ------------------------------------------------------------------------------------


def test_a_dump_that_is_killed_half_way_fails_at_its_end(
    start_postgres: Callable[..., bed.Service],
) -> None:
    """The bytes stop as they do at a good end; the capture says that it was none."""
    container = ENGINE.container(start_postgres().name)
    sql(
        container,
        "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 8) FROM generate_series(1, 100000) g",
        "app",
    )
    received = 0
    with (
        pytest.raises(CaptureFailed, match=r"dump of app failed.*signal 9 \(SIGKILL\)"),
        driver_of(container).capture(None) as capture,
    ):
        assert isinstance(capture.content, Streams)
        for stream in capture.content.streams:
            for chunk in stream.chunks:
                received += len(chunk)
                if stream.name == "app.dump" and 10_000_000 < received < 14_000_000:
                    kill(container, "pg_dump")
                    received = 20_000_000
    assert received < 40_000_000


def test_a_capture_given_up_half_way_leaves_nothing_running(
    start_postgres: Callable[..., bed.Service],
) -> None:
    """No pg_dump goes on for nobody, and no transaction holds back the server's clean-up."""
    container = ENGINE.container(start_postgres().name)
    sql(
        container,
        "CREATE TABLE t AS SELECT g, repeat(md5(g::text), 8) FROM generate_series(1, 200000) g",
        "app",
    )
    with pytest.raises(ZeroDivisionError), driver_of(container).capture(None) as capture:
        assert isinstance(capture.content, Streams)
        for stream in capture.content.streams:
            for _ in stream.chunks:
                if stream.name == "app.dump":
                    raise ZeroDivisionError
    assert b"".join(container.exec(["sh", "-c", "pidof pg_dump psql || echo none"])) == b"none\n"
    bed.wait_until(
        lambda: (
            sql(container, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'backupd'") == "1"
        ),
        timeout=10,
        what="the server's sessions",
    )


def test_streams_left_unread_are_no_capture(origin: Container) -> None:
    """A reader that skips a database must not get a recovery point."""
    with pytest.raises(CaptureFailed, match="app, my db/ü"), driver_of(origin).capture(None) as capture:
        assert isinstance(capture.content, Streams)
        for stream in capture.content.streams:
            b"".join(stream.chunks)
            break


def test_a_failing_second_statement_of_the_globals_is_a_failed_restore(
    held: Held, start_home: Callable[[Held], Container]
) -> None:
    """psql goes on after errors unless it is told not to; the report names the statement, without a password."""
    home = start_home(held)
    bad = (
        b"CREATE ROLE fine;\nALTER ROLE nobody WITH PASSWORD 'SCRAM-SHA-256$4096:hush';\nCREATE ROLE late;\n"
    )
    with pytest.raises(RestoreFailed, match=r'role "nobody" does not exist.*ALTER ROLE nobody') as failure:
        driver_of(home).load(Held(held.point, {**held.files, "globals.sql": bad}), home)
    assert "hush" not in failure.value.message
    assert sql(home, "SELECT count(*) FROM pg_roles WHERE rolname = 'late'") == "0"


def test_a_failing_statement_of_a_dump_is_a_failed_restore(
    held: Held, start_home: Callable[[Held], Container]
) -> None:
    """A dump cut short; an extension that the new server does not have."""
    home = start_home(held)
    cut = {"app.dump": held.files["app.dump"][:-100]}
    with pytest.raises(RestoreFailed, match=r"'app'.*end of file"):
        driver_of(home).load(Held(held.point, cut), home)
    list(home.exec(["sh", "-c", "rm $(find / -xdev -name hstore.control)"]))
    with pytest.raises(RestoreFailed, match=r"'my db/ü'.*hstore.*CREATE EXTENSION"):
        driver_of(home).load(held, home)


def test_a_restore_never_goes_over_data(origin: Container, held: Held) -> None:
    """A server that holds tables of somebody is refused, and left as it is."""
    before = sql(origin, "SELECT sum(n_live_tup) FROM pg_stat_user_tables", "my db/ü")
    with pytest.raises(RestoreFailed, match=r"already holds data: .*in the database my db/ü") as failure:
        driver_of(origin).load(held, origin)
    assert "fresh" in failure.value.hint
    assert sql(origin, "SELECT sum(n_live_tup) FROM pg_stat_user_tables", "my db/ü") == before


def test_a_locked_table_fails_the_backup_in_time(start_postgres: Callable[..., bed.Service]) -> None:
    """A dump waits for a lock only so long, then says why."""
    container = ENGINE.container(start_postgres().name)
    sql(container, "CREATE TABLE t(id int)", "app")
    holder = container.exec(
        ["psql", "-U", "postgres", "-d", "app", "-qAt"],
        stdin=iter([b"BEGIN; LOCK TABLE t; SELECT 'held'; SELECT pg_sleep(30);\n"]),
    )
    assert next(holder) == b"held\n"
    started = time.monotonic()
    with pytest.raises(CaptureFailed, match=r"dump of app.*LOCK TABLE public\.t") as failure:
        take(driver_of(container, lock_timeout=1.0))
    assert time.monotonic() - started < 15
    assert "pg_stat_activity" in failure.value.hint
    holder.close()  # type: ignore[attr-defined]


def test_an_empty_server_is_told_and_fails_where_it_held_tables(
    start_postgres: Callable[..., bed.Service], held: Held
) -> None:
    """An image that moved its data directory starts an empty server: that is no backup of the old one."""
    container = ENGINE.container(start_postgres().name)
    driver = driver_of(container)
    assert ["no table" in problem.message and not problem.fatal for problem in driver.check()] == [True]
    taken = take(driver)
    assert taken.point.facts["empty"] is True
    assert any("no table" in warning for warning in taken.point.warnings)
    with (
        pytest.raises(CaptureFailed, match="holds no table at all; it held"),
        driver.capture(held.point) as c,
    ):
        assert isinstance(c.content, Streams)
        for stream in c.content.streams:
            b"".join(stream.chunks)


def test_a_role_without_superuser_backs_up_without_passwords(
    start_postgres: Callable[..., bed.Service], start_home: Callable[[Held], Container]
) -> None:
    """To read the tables is enough; that passwords are missing is a warning, not a surprise."""
    container = ENGINE.container(start_postgres().name)
    sql(
        container,
        "CREATE ROLE saver LOGIN PASSWORD 'p'; CREATE TABLE t AS SELECT 1 AS x; GRANT SELECT ON t TO saver",
    )
    driver = PostgresLogical(Source(lambda: InContainer(container, user="saver", password="p")))
    taken = take(driver)
    assert any("may not read passwords" in warning for warning in taken.point.warnings)
    assert b"SCRAM" not in taken.files["globals.sql"]
    home = start_home(taken)
    driver_of(home).load(taken, home)
    assert driver_of(home).facts(home) == taken.point.facts


# --- from this machine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client_16(module_services: bed.Services, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a client of version 16 on this machine: the image's, where none is installed."""
    installed = postgres_client.installed_clients()
    if 16 in installed:
        return installed[16]
    import io
    import tarfile

    container = ENGINE.container(module_services.container(bed.POSTGRES_IMAGE, ["true"], start=False).name)
    into = tmp_path_factory.mktemp("client")
    with tarfile.open(fileobj=io.BytesIO(b"".join(container.read("/usr/lib/postgresql/16")))) as tar:
        tar.extractall(into, filter="tar")
    return into / "16" / "bin"


def url_of(service: bed.Service, **changes: str) -> str:
    """Where this machine reaches it."""
    password = quote(changes.get("password", service.password))
    return f"postgresql://{service.user}:{password}@{service.host}:{changes.get('port', service.port)}/{service.db}"


def test_a_server_reached_by_url_is_dumped_by_a_client_that_fits(
    start_postgres: Callable[..., bed.Service],
    start_home: Callable[[Held], Container],
    client_16: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of the server's version is chosen among those installed, and no secret stands in its argv."""
    monkeypatch.setattr(postgres_client, "FOLDERS", (*postgres_client.FOLDERS, str(client_16)))
    service = start_postgres(password="very secret")
    container = ENGINE.container(service.name)
    sql(container, "CREATE TABLE t AS SELECT generate_series(1, 10) AS x", "app")
    seen: list[str] = []
    run = _process.run

    def watched(argv: Sequence[str], **settings: Any) -> Iterator[bytes]:
        seen.append(" ".join(argv))
        return run(argv, **settings)

    monkeypatch.setattr(_process, "run", watched)
    driver = PostgresLogical(Source(lambda: OnThisMachine(url_of(service))))
    assert driver.check() == []
    taken = take(driver)
    assert taken.point.attributes["client_major"] == 16
    assert any(f"{client_16}/pg_dump " in line for line in seen)
    assert "very" not in "".join(seen)
    home = start_home(taken)
    driver.load(taken, home)
    assert driver.facts(home) == taken.point.facts


def test_a_client_older_than_the_server_is_refused_with_a_hint(
    start_postgres: Callable[..., bed.Service], client_16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pg_dump would refuse as well, but only say that versions differ."""
    monkeypatch.setattr(postgres_client, "installed_clients", lambda: {15: client_16})
    monkeypatch.setattr("backupd.drivers.postgres_dump.installed_clients", lambda: {15: client_16})
    driver = PostgresLogical(Source(lambda: OnThisMachine(url_of(service))))
    service = start_postgres()
    (problem,) = driver.check()
    assert "too old" in problem.message
    assert "postgresql-client-16" in problem.hint


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"password": "wrong"}, "password authentication failed", "check user and password"),
        ({"port": "1"}, "Connection refused", "running"),
    ],
)
def test_a_server_that_lets_nobody_in_fails_in_one_line(
    session_postgres: bed.Service, client_16: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str], message: str, hint: str,
) -> None:  # fmt: skip
    """Check and capture say the same: what happened, and what to do; never the password."""
    monkeypatch.setattr(postgres_client, "FOLDERS", (str(client_16),))
    driver = PostgresLogical(Source(lambda: OnThisMachine(url_of(session_postgres, **changes))))
    with pytest.raises(CaptureFailed, match=message) as failure:
        take(driver)
    assert hint in failure.value.hint
    assert "\n" not in failure.value.message
    (problem,) = driver.check()
    assert message in problem.message
    assert problem.fatal
    assert "wrong" not in failure.value.message + problem.message


def test_what_is_not_there_fails_in_one_line(
    session_postgres: bed.Service, start_container: Callable[..., bed.Service]
) -> None:
    """No such container, one that is stopped, one without PostgreSQL, no such database, no such role."""
    stopped = start_container("redis:7", start=False).name
    other = start_container("redis:7").name
    here = session_postgres.name
    cases: list[tuple[Source, str]] = [
        (Source(lambda: InContainer(ENGINE.container("nosuch"))), "No such container"),
        (Source(lambda: InContainer(ENGINE.container(stopped))), "is not running"),
        (Source(lambda: InContainer(ENGINE.container(other))), "psql.*not found"),
        (Source(lambda: InContainer(ENGINE.container(here)), databases=["x"]), "no database x"),
        (Source(lambda: InContainer(ENGINE.container(here), user="x")), 'role "x" does not exist'),
    ]
    for source, message in cases:
        driver = PostgresLogical(source)
        with pytest.raises(CaptureFailed, match=message) as failure:
            take(driver)
        assert failure.value.hint or "psql" in message, message
        assert len(driver.check()) == 1, message


def test_a_url_that_cannot_be_read_is_a_mistake_of_the_configuration() -> None:
    """Without showing it: a password may stand in it."""
    with pytest.raises(UsageError) as failure:
        OnThisMachine("postgresql://u:hush@h:notaport/x?nosuch=1")
    assert "hush" not in str(failure.value) + failure.value.hint


# --- pure ----------------------------------------------------------------------------------------------


def test_globals_skip_roles_that_are_there_and_tablespaces_that_cannot_be() -> None:
    """Nothing else, and nothing that only looks like them."""
    text = (
        "--\n-- Roles\n--\n\n\\restrict abc\n\nCREATE ROLE boss;\nALTER ROLE boss WITH SUPERUSER PASSWORD 'a;b';\n"
        "CREATE ROLE \"Boss\";\nCOMMENT ON ROLE boss IS 'x;\nCREATE ROLE boss;\n';\n"
        "CREATE TABLESPACE fast OWNER boss LOCATION '/x;y';\nGRANT ALL ON TABLESPACE fast TO boss;\n"
        "GRANT a TO b GRANTED BY boss;\n\\unrestrict abc\n"
    )
    kept = postgres_sql.globals_for(text, {"boss"})
    assert (
        kept
        == text.replace("CREATE ROLE boss;\nALTER", "ALTER")
        .replace(
            "\nCREATE TABLESPACE fast OWNER boss LOCATION '/x;y';\nGRANT ALL ON TABLESPACE fast TO boss;", ""
        )
        .replace("--\n-- Roles\n--\n\n", "--\n-- Roles\n--\n\n")
        or "TABLESPACE" not in kept
    )
    assert "CREATE ROLE boss;\nALTER" not in kept
    assert 'CREATE ROLE "Boss";' in kept
    assert "IS 'x;\nCREATE ROLE boss;\n';" in kept
    assert kept.count("\\restrict abc\n") == 1


@given(st.lists(st.text(alphabet="ab ;'\"\n-\\", max_size=12)), st.sampled_from(["'", '"']))
def test_statements_lose_nothing(parts: list[str], quote: str) -> None:
    """Whatever stands in quotes, all statements together are the script again, and quotes are never cut."""
    made = [f"S {quote}{part.replace(quote, quote * 2)}{quote};\n" for part in parts]
    script_text = "".join(made)
    found = list(postgres_sql.statements(script_text))
    assert len(found) == len(made)
    assert script_text.startswith("".join(found))


@given(st.text(min_size=1).filter(lambda name: "\0" not in name))
def test_any_name_survives_a_conninfo_string(name: str) -> None:
    """libpq reads back the very name, whatever stands in it."""
    from psycopg.conninfo import conninfo_to_dict

    try:
        name.encode()
    except UnicodeEncodeError:
        return
    assert conninfo_to_dict(postgres_sql.conninfo({"dbname": name}))["dbname"] == name


def test_the_client_of_the_servers_version_is_preferred() -> None:
    """Else the next newer; never an older."""
    here = {major: Path(str(major)) for major in (14, 16, 18)}
    assert [choose_client(here, server) for server in (13, 14, 15, 16, 17, 18, 19)] == [
        14,
        14,
        16,
        16,
        18,
        18,
        None,
    ]


def test_the_first_error_names_its_statement() -> None:
    """As pg_restore, psql and pg_dump write them."""
    assert (
        postgres_sql.first_error(
            'pg_restore: error: could not execute query: ERROR:  type "x" does not exist\nLINE 2: ...\n'
            "Command was: CREATE TABLE t (a x);\n"
        )
        == 'type "x" does not exist (in: CREATE TABLE t (a x);)'
    )
    assert "hush" not in postgres_sql.first_error(
        "psql:<stdin>:3: ERROR:  no\nSTATEMENT:  ALTER ROLE a WITH PASSWORD 'hush';"
    )
    assert postgres_sql.first_error("something odd\nlast words") == "last words"


def test_the_empty_maintenance_database_is_no_fact() -> None:
    """A fresh server has one, whether the old one had or not."""
    empty: Facts = dict.fromkeys(("tables", "views", "functions"), 0)
    assert postgres_sql.whole_facts({"postgres": empty})["databases"] == {}
    assert list(postgres_sql.whole_facts({"postgres": {**empty, "views": 1}})["databases"]) == ["postgres"]  # type: ignore[arg-type]
