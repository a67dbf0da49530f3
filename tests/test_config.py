"""The configuration: what it takes, what it refuses and how it says so, and what it never shows."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cronsim import CronSim, CronSimError
from hypothesis import given
from hypothesis import strategies as st

from backupd.cli.output import plain
from backupd.config import (
    Config,
    ConfigInvalid,
    PostgresSource,
    format_duration,
    load,
    parse,
    parse_duration,
)
from backupd.config.schema import json_schema
from backupd.config.values import Mistaken, check_name, check_schedule, parse_rate
from backupd.errors import UsageError
from backupd.retention import Policy

ROOT = Path(__file__).parent.parent
MINIMAL = """
[sources.uploads]
driver = "volume"
path = "/data"
"""


def read(text: str, *, base: Path = Path("/srv/app"), env: dict[str, str] | None = None) -> Config:
    return parse(text, origin="backupd.toml", base=base, env=env or {})


def mistakes(text: str, **options: object) -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigInvalid) as raised:
        read(text, **options)  # type: ignore[arg-type]
    return {m.key: (m.message, m.hint) for m in raised.value.mistakes}


# --- what it takes -----------------------------------------------------------------------------------


def test_a_source_takes_what_it_does_not_say_from_the_defaults() -> None:
    """Schedule, zone and retention of [defaults] hold for a source until it says otherwise."""
    config = read(
        """
        [defaults]
        schedule = "0 2 * * *"
        timezone = "Europe/Berlin"
        retention = { last = 3, within = "30d" }
        [sources.a]
        driver = "volume"
        path = "/a"
        [sources.b]
        driver = "volume"
        path = "/b"
        schedule = "@weekly"
        retention = { yearly = -1 }
        timezone = "UTC"
        [sources.c]
        driver = "volume"
        path = "/c"
        schedule = "never"
        """
    )
    a, b, c = config.sources.values()
    assert (a.name, a.schedule, a.timezone) == ("a", "0 2 * * *", "Europe/Berlin")
    assert a.retention == Policy(last=3, within=timedelta(days=30), timezone="Europe/Berlin")
    assert (b.schedule, b.timezone, b.retention) == ("0 0 * * SUN", "UTC", Policy(yearly=-1, timezone="UTC"))
    assert c.schedule is None
    assert config.policies["b"].yearly == -1


def test_relative_paths_count_from_the_file_and_not_from_where_one_stands() -> None:
    """cron and systemd start programs in `/`: the configuration must mean the same there."""
    config = read('[repository]\nlocation = "./backups"\n[sources.v]\ndriver = "volume"\npath = "data"')
    assert config.repository.location == "/srv/app/backups"
    assert config.sources["v"].path == Path("/srv/app/data")  # type: ignore[union-attr]


def test_values_come_from_the_environment_and_from_files(tmp_path: Path) -> None:
    """`${NAME}` anywhere in a text, `<key>_file` with the file's content trimmed, `$$` for a dollar sign."""
    (tmp_path / "secret").write_text("  pa$$w${x}rd\n\n")
    config = read(
        """
        [repository]
        location = "s3://${BUCKET}/x$${y}"
        access_key_id = "${ID}"
        secret_access_key_file = "secret"
        [sources.pg]
        driver = "postgres"
        url = "postgresql://backup@${HOST}/orders"
        password_file = "secret"
        databases = ["${DB}"]
        """,
        base=tmp_path,
        env={"BUCKET": "b", "HOST": "db", "DB": "orders", "ID": "key"},
    )
    assert config.repository.location == "s3://b/x${y}"
    source = config.sources["pg"]
    assert isinstance(source, PostgresSource)
    assert source.url == "postgresql://backup@db/orders"
    assert source.databases == ("orders",)
    assert source.password is not None
    assert source.password.get_secret_value() == "pa$$w${x}rd"  # a file's content is taken as it is


def test_a_password_in_a_url_becomes_a_secret() -> None:
    """The url can then be shown wherever it is needed."""
    config = read('[sources.pg]\ndriver = "postgres"\nurl = "postgresql://u:p%20w@h:5/d"')
    source = config.sources["pg"]
    assert isinstance(source, PostgresSource)
    assert source.url == "postgresql://u@h:5/d"
    assert source.password is not None
    assert source.password.get_secret_value() == "p w"


@pytest.mark.parametrize("shown", ["repr", "str", "json", "dump"])
def test_no_secret_is_ever_shown(shown: str, tmp_path: Path) -> None:
    """Not by printing a configuration, not by dumping it."""
    (tmp_path / "s").write_text("hunter2secret")
    config = read(
        """
        [repository]
        location = "s3://b"
        access_key_id = "id"
        secret_access_key = "hunter2secret"
        [sources.pg]
        driver = "postgres"
        url = "postgresql://u:hunter2secret@h/d"
        [sources.r]
        driver = "redis"
        url = "redis://h"
        password_file = "s"
        """,
        base=tmp_path,
    )
    text = {
        "repr": repr(config),
        "str": str(config),
        "json": json.dumps(plain(config)),
        "dump": str(vars(config)),
    }[shown]
    assert "hunter2" not in text
    assert "*****" in text


def test_a_mistake_beside_a_secret_does_not_show_it() -> None:
    """The message of a wrong value names the key, not the value."""
    found = mistakes('[sources.pg]\ndriver = "postgres"\nurl = "mysql://u:hunter2@h"\npassword = 5')
    assert "hunter2" not in str(found)


# --- what it refuses ---------------------------------------------------------------------------------


def test_five_mistakes_are_all_told_each_with_its_key_and_its_fix() -> None:
    """Nobody mends a file five times over."""
    found = mistakes(
        """
        [repository]
        locaton = "./b"
        [defaults]
        schedule = "0 25 * * *"
        retention = { dayly = 7, within = "30 moons" }
        [sources.orders]
        driver = "postgress"
        url = "postgresql://h/orders"
        [sources.cache]
        driver = "redis"
        url = "redis://redis"
        password = "${NOT_SET}"
        timezone = "Europe/Berln"
        [stacks.shop]
        sources = ["orders", "cach"]
        """
    )
    assert found["repository.locaton"] == ("unknown key", 'did you mean "location"?')
    assert found["defaults.schedule"] == ("hour '25' is not one", "hour goes from 0 to 23")
    assert found["defaults.retention.dayly"] == ("unknown key", 'did you mean "daily"?')
    assert "duration" in found["defaults.retention.within"][0]
    assert found["sources.orders.driver"] == ('there is no driver "postgress"', 'did you mean "postgres"?')
    assert found["sources.cache.password"][0] == "${NOT_SET} is not set"
    assert found["sources.cache.timezone"][1] == 'did you mean "Europe/Berlin"?'
    assert found["stacks.shop.sources.1"] == ('there is no source "cach"', 'did you mean "cache"?')
    assert len(found) == 8
    assert all(hint for _, hint in found.values())


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ('[sources.a]\npath = "/a"', "sources.a.driver", "is missing"),
        ('[sources.a]\ndriver = "volume"', "sources.a", "one of path or volume is needed"),
        ('[sources.a]\ndriver = "volume"\npath = "/a"\nvolume = "b"', "sources.a", "exclude each other"),
        ('[sources.a]\ndriver = "postgres"\nurl = "http://h"', "sources.a", "postgresql://"),
        ('[sources.a]\ndriver = "postgres"\ncontainer = "c"\ndatabases = []', "sources.a", "empty"),
        ('[sources.a]\ndriver = "redis"\nurl = "redis://h"\nsource_of_rdb = "tape"', "sources.a.source_of_rdb",
         "none of those"),
        ('[sources.a]\ndriver = "redis"\nurl = "redis://h"\nsource_of_rdb = "file"', "sources.a", "needs path"),
        ('[sources.a]\ndriver = "chroma"\npath = "/c"\nquiesce = "pause"', "sources.a", "needs container"),
        ('[sources.a]\ndriver = "volume"\npath = "/a"\nname = "b"', "sources.a.name", "unknown key"),
        ('[sources."a/b"]\ndriver = "volume"\npath = "/a"', "sources.a/b", "cannot be a name"),
        ('[sources.a]\ndriver = "volume"\npath = "/a"\nfacts = "maybe"', "sources.a.facts", "boolean"),
        ('[stacks.s]\nsources = []', "stacks.s.sources", "at least 1"),
        ('[stacks.s]\nsources = ["x"]\nobjectives = { rto = 15 }', "stacks.s.objectives.rto", "no unit"),
        ('[repository]\nlocation = "ftp://h"', "repository", "ftp:// is no store"),
        ('[repository]\nlocation = "s3:///prefix"', "repository", "no bucket"),
        ('[repository]\nlocation = "s3://k:s@bucket"', "repository", "credentials"),
        ('[repository]\nlocation = "s3://b"\naccess_key_id = "x"', "repository", "secret_access_key is missing"),
        ('[serve]\nlisten = "8080"', "serve", "no address"),
        ('[serve]\njobs = 0', "serve.jobs", "greater than or equal to 1"),
        ('origin = "x"', "origin", "unknown key"),
        ('sources = 5', "sources", "should be a table"),
        ('[defaults]\nretention = { last = -2 }', "defaults.retention", "last must be"),
        ('[defaults]\nretention = { last = 1, timezone = "Mars" }', "defaults.retention", "not a time zone"),
        ('[defaults]\nretention = { last = "many" }', "defaults.retention.last", "integer"),
        ('[sources.a]\ndriver = "volume"\npath_file = "/nonexistent/x"', "sources.a.path_file", "cannot be read"),
        ('[sources.a]\ndriver = "volume"\npath = "/a"\npath_file = "/x"', "sources.a.path_file", "both given"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key(text: str, key: str, said: str) -> None:
    """One case each of what goes wrong in files that people write."""
    found = mistakes(text)
    assert key in found, found
    assert said in found[key][0]


def test_sources_that_cannot_be_told_apart_are_refused() -> None:
    """Names that differ in case alone, a stack named like a source, the same place twice, twice in a stack."""
    found = mistakes(
        """
        [sources.a]
        driver = "volume"
        path = "/x"
        [sources.A]
        driver = "volume"
        path = "/y"
        [sources.b]
        driver = "volume"
        path = "/x"
        [stacks.a]
        sources = ["b", "b"]
        """
    )
    assert "case" in found["A"][0]
    assert found["sources.b"][0] == "is the same as sources.a"
    assert "source has this name" in found["stacks.a"][0]
    assert "twice" in found["stacks.a.sources.1"][0]


def test_a_table_written_twice_is_refused() -> None:
    """TOML itself forbids it; the hint says what it means here."""
    found = mistakes(MINIMAL + MINIMAL)
    assert "sources" in found[""][0]
    assert "once" in found[""][1]


def test_what_is_no_toml_is_told_with_its_line() -> None:
    """The parser's own words name line and column."""
    message, hint = mistakes("[sources.a]\ndriver = volume")[""]
    assert "line 2" in message
    assert "quotes" in hint


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Absent, a directory, not text."""
    with pytest.raises(UsageError, match="there is no configuration"):
        load(tmp_path / "none.toml", {})
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load(tmp_path / "binary.toml", {})


# --- schedules, durations, names ---------------------------------------------------------------------


def test_weekdays_are_names() -> None:
    """1 is Monday to cron and Tuesday to others: the fix is spelt out."""
    with pytest.raises(Mistaken) as raised:
        check_schedule("0 2 * * 1")
    assert raised.value.hint == 'write the name: "0 2 * * MON"'
    assert check_schedule("0 2 * * mon-fri") == "0 2 * * MON-FRI"


@pytest.mark.parametrize(
    ("text", "named"),
    [("0 3 * * 0", "0 3 * * SUN"), ("0 3 * * 7", "0 3 * * SUN"), ("0 3 * * 1-5", "0 3 * * MON-FRI"),
     ("0 3 * * 5-7", "0 3 * * FRI,SAT,SUN"), ("5 4 * * 1,3", "5 4 * * MON,WED"),
     ("0 3 * * 1-7/2", "0 3 * * MON,WED,FRI,SUN"), ("0 3 * * 7/2", "0 3 * * SUN"), ("@daily", "0 0 * * *")],
)  # fmt: skip
def test_cron_lines_of_older_backup_containers_keep_their_meaning(text: str, named: str) -> None:
    """Where numbers are taken, they are cron's."""
    assert check_schedule(text, weekday_numbers=True) == named


_FIELD = st.sampled_from(
    ["*", "*/5", "0", "5", "23", "31", "59", "60", "1-5", "5-1", "1,2", "L", "LW", "MON", "SUN-MON", "MON#1",
     "MON#6", "5L", "JAN", "*/0", "1/2", "1-7/2", "", "x", "-", "30", "2", "FEB", "30,31", "*/"]
)  # fmt: skip


@given(st.lists(_FIELD, min_size=4, max_size=6).map(" ".join), st.booleans())
def test_every_schedule_that_is_accepted_has_a_next_time(text: str, numbers: bool) -> None:
    """The scheduler takes whatever the configuration let pass; there is no second, differing grammar."""
    try:
        accepted = check_schedule(text, weekday_numbers=numbers)
    except Mistaken as wrong:
        assert wrong.hint
        return
    try:
        assert next(CronSim(accepted, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        pytest.fail(f"{text!r} was accepted as {accepted!r}: {error}")


_WEEKDAYS = st.from_regex(r"[0-7](-[0-7])?(/[1-7])?(,[0-7](-[0-7])?)?", fullmatch=True)


@given(_WEEKDAYS)
def test_naming_the_weekdays_changes_none_of_them(weekdays: str) -> None:
    """The numbered line and the named one come due at the same times."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    try:
        numbered = CronSim(f"0 2 * * {weekdays}", start)
    except CronSimError:
        return
    named = CronSim(check_schedule(f"0 2 * * {weekdays}", weekday_numbers=True), start)
    assert [next(numbered) for _ in range(8)] == [next(named) for _ in range(8)]


@given(st.lists(_FIELD.filter(lambda f: f and f not in "x-"), min_size=5, max_size=5).map(" ".join))
def test_what_the_scheduler_can_run_is_accepted(text: str) -> None:
    """The check is no narrower than cron, numbered weekdays apart."""
    try:
        next(CronSim(text, datetime(2026, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration):
        return
    assert len(check_schedule(text, weekday_numbers=True).split()) == 5


@given(st.integers(0, 10**6), st.sampled_from(["ms", "s", "m", "h", "d", "w"]))
def test_durations_are_read_as_they_are_said(number: int, unit: str) -> None:
    """A number and a unit; several add up."""
    milliseconds = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}[unit]
    assert parse_duration(f"{number}{unit}") == timedelta(milliseconds=number * milliseconds)
    assert parse_duration(f"1h {number}{unit}") == parse_duration("1h") + parse_duration(f"{number}{unit}")


@pytest.mark.parametrize("text", ["", "15", "m", "15 parsecs", "-5s", "1h-", "1e9d", "99999999999999999999w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """With examples of what is."""
    with pytest.raises(Mistaken) as raised:
        parse_duration(text)
    assert "30d" in raised.value.hint


@given(
    st.integers(1, 10**6),
    st.sampled_from(["kB", "MB", "GB", "kiB", "MiB", "GiB"]),
    st.sampled_from(["", "/s"]),
)
def test_rates_are_read_as_they_are_said(number: int, unit: str, second: str) -> None:
    base, power = (1024 if "i" in unit else 1000), "kMG".index(unit[0]) + 1
    assert parse_rate(f"{number}{unit}{second}") == number * base**power
    assert parse_rate("unlimited") == 0


@pytest.mark.parametrize("text", ["", "15", "MB", "0MB/s", "-5MB/s", "1MB/h", "1e9MB", "5 Mbit/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    """With an example of what is."""
    with pytest.raises(Mistaken) as raised:
        parse_rate(text)
    assert "100MB/s" in raised.value.hint


@given(st.integers(0, 10**9))
def test_a_duration_shown_can_be_read_again(seconds: int) -> None:
    """To its two largest units."""
    shown = parse_duration(format_duration(timedelta(seconds=seconds)))
    assert shown <= timedelta(seconds=seconds) < shown * 1.05 + timedelta(seconds=1)


def test_a_short_duration_is_shown_to_the_tenth() -> None:
    """Skew of a second and a half must not look like one."""
    shown = [format_duration(timedelta(seconds=s)) for s in (0, 0.02, 1, 1.25, 9.97, 12.6, 3600, -90)]
    assert shown == ["0s", "20ms", "1s", "1.2s", "10s", "13s", "1h", "-1m 30s"]


@given(st.text(max_size=70))
def test_a_name_is_safe_in_keys_and_paths(name: str) -> None:
    """No separator, no leading dot or dash, nothing that a shell or a store minds."""
    try:
        check_name(name)
    except Mistaken:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever stands in the file, the answer is a configuration or its mistakes."""
    try:
        read(text)
    except ConfigInvalid as invalid:
        assert invalid.mistakes


# --- without a file ----------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a container with two directories to protect, and no configuration."""
    for name in ("uploads", "my files", ".hidden"):
        (tmp_path / "backup" / name).mkdir(parents=True)
    (tmp_path / "backup" / "a file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return {"BACKUPD_BACKUP_ROOT": str(tmp_path / "backup")}


def test_two_variables_and_a_mount_are_a_configuration(mounted: dict[str, str]) -> None:
    """Every directory under /backup is a source, /backups the repository: as containers before us had it."""
    config = load(
        None, {**mounted, "BACKUP_SCHEDULE": "30 1 * * 0", "RETENTION_DAYS": "14", "TZ": "Europe/Rome"}
    )
    assert list(config.sources) == ["my-files", "uploads"]
    for source in config.sources.values():
        assert (source.schedule, source.timezone) == ("30 1 * * SUN", "Europe/Rome")
        assert source.retention == Policy(within=timedelta(days=14), timezone="Europe/Rome")
    assert config.repository.location == "/backups"
    assert config.without_file


def test_without_retention_days_nothing_is_ever_removed(mounted: dict[str, str]) -> None:
    """No policy is not a policy of removing."""
    assert not any(load(None, mounted).policies.values())


def test_mistakes_in_variables_are_told_by_their_names(mounted: dict[str, str]) -> None:
    """Both at once."""
    with pytest.raises(ConfigInvalid) as raised:
        load(None, {**mounted, "BACKUP_SCHEDULE": "daily", "RETENTION_DAYS": "a week", "TZ": "Mars"})
    assert [m.key for m in raised.value.mistakes] == ["BACKUP_SCHEDULE", "RETENTION_DAYS", "TZ"]


def test_nothing_to_protect_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no mount: what could be done is said."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        load(None, {"BACKUPD_BACKUP_ROOT": str(tmp_path / "none")})
    assert "backupd init" in raised.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing is mounted"):
        load(None, {"BACKUPD_BACKUP_ROOT": str(tmp_path / "empty")})


def test_a_repository_alone_is_enough_to_restore_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the worst day there is no configuration."""
    monkeypatch.chdir(tmp_path)
    env = {"BACKUPD_BACKUP_ROOT": str(tmp_path / "none")}
    assert load(None, env, location="here").repository.location == str(tmp_path / "here")
    assert load(None, {**env, "BACKUPD_REPOSITORY": "s3://b/p"}).repository.location == "s3://b/p"


def test_another_location_can_be_named_for_a_configuration(tmp_path: Path) -> None:
    """Everything else stays as the file says."""
    (tmp_path / "backupd.toml").write_text(MINIMAL)
    config = load(tmp_path / "backupd.toml", {}, location="s3://copy")
    assert config.repository.location == "s3://copy"
    assert list(config.sources) == ["uploads"]


# --- what is published -------------------------------------------------------------------------------


def test_the_published_schema_is_current() -> None:
    """Made anew by: backupd config schema > schedules/backupd.schema.json"""
    assert json.loads((ROOT / "schedules" / "backupd.schema.json").read_text()) == json_schema()


def _ready_made() -> list[Path]:
    return sorted((ROOT / "schedules").glob("*.toml"))


def test_there_are_ready_made_configurations() -> None:
    """So that the next test cannot pass over nothing."""
    assert len(_ready_made()) >= 4


@pytest.mark.parametrize("path", _ready_made(), ids=lambda p: p.stem)
def test_every_ready_made_configuration_loads_as_it_stands(path: Path, tmp_path: Path) -> None:
    """With the variables and the secrets that its first lines name, and nothing else."""
    text = path.read_text()
    named = re.search(r"^# Needs: (.*)$", text, re.M)
    env = dict.fromkeys(re.findall(r"\$(\w+)", named[1]), "x") if named else {}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(env), "what it needs is said in its first lines"
    secret = tmp_path / "secret"
    secret.write_text("x")
    config = parse(
        re.sub(r"/run/secrets/\w+", str(secret), text), origin=path.name, base=path.parent, env=env
    )
    assert config.sources
    assert all(source.schedule for source in config.sources.values())
    assert all(config.policies.values()), "a ready-made schedule must not fill the disk for ever"
